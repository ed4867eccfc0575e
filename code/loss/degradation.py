"""Random degradations of batches of images: blur, resizing to another size and back, noise, in this order."""
import torch
import torch.nn.functional as F

from data.degradation import MODES, add_noise
from data.filters import filter_images, gaussian
from system.distributed import global_batch_size, local_shard

RADIUS = 5  # of the largest blur kernel, 11


def degrade(images: torch.Tensor, rgb_range: float, noise: float = 1, blur: float = 0, resize: float = 0) -> torch.Tensor:
    """Degrade images N x 3 x H x W in [0, rgb_range]; noise, blur and resize are the probabilities of each, per image.

    Strengths are drawn per image, those of resizing for the whole batch. The noise comes from the default generator of the
    images' device, all other random numbers from that of the CPU. Source: DCKD (Zhou et al., AAAI 2025), see the
    table of departures in scripts/README.md.
    """
    for probability, operation in ((blur, random_blur), (resize, random_resize), (noise, random_noise)):
        chosen = torch.rand(global_batch_size(len(images))) < probability
        if chosen.any():
            changed = operation(images, rgb_range)
            chosen = local_shard(chosen).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
            images = torch.where(chosen, changed, images).clamp(0, rgb_range)
    return images


def random_noise(images: torch.Tensor, rgb_range: float) -> torch.Tensor:
    """Add Gaussian noise, sigma uniform in [1, 30] out of 255; with probability 0.5 gray, equal in all channels."""
    sigma = uniform(len(images), 1, 30) * (rgb_range / 255)
    gray = local_shard(torch.rand(global_batch_size(len(images))) < 0.5)
    shape = global_batch_size(len(images)), *images.shape[1:]
    return add_noise(images, local_shard(torch.randn(shape, dtype=images.dtype, device=images.device)), sigma, gray)


def random_blur(images: torch.Tensor, _: float) -> torch.Tensor:
    """Blur with a Gaussian of odd size in 3..11 and sigma in [0.1, 2] for each axis; edge pixels are replicated."""
    radius = local_shard(torch.randint(1, RADIUS + 1, (global_batch_size(len(images)), 1)))
    for axis in (2, 1):
        kernels = gaussian(uniform(len(images), 0.1, 2)[:, None], radius)
        images = filter_images(images, kernels.unsqueeze(axis), "edge")
    return images


def random_resize(images: torch.Tensor, _: float) -> torch.Tensor:
    """Resize and back, each by area, bilinear or bicubic interpolation.

    The factor is uniform in [1, 1.5] with probability 0.25, else in [0.5, 1].
    """
    size = images.shape[2:]
    larger, part = torch.rand(2).tolist()
    factor = 1 + part / 2 if larger < 0.25 else 1 - part / 2
    for target in ([max(1, round(side * factor)) for side in size], size):
        mode = MODES[int(torch.randint(len(MODES), ()))]
        images = F.interpolate(images, size=tuple(target), mode=mode)
    return images


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    """Draw a number for each of the images of the local shard."""
    return low + (high - low) * local_shard(torch.rand(global_batch_size(count)))
