"""Degraded LR images, made from HR on the fly (--degrade).

noise25, noise0-55   Gaussian noise of this standard deviation, in grey levels; of a range, uniform for each image
jpeg40, jpeg10-40    JPEG compression of this quality (data/jpeg.py)
blur, blur5-15       synthetic motion blur along a path of this length in pixels, which bends at random
rain                 synthetic rain: motion-blurred sparse noise, added to the image as in the model O = B + R of Li et al.
                     (Rain Streak Removal Using Layer Priors, CVPR 2016)
realesrgan           the second-order degradations of Real-ESRGAN (Wang et al., ICCVW 2021)

and sums, such as blur+noise10+jpeg50-90, which are applied in this order. HR is downscaled before the first noise or JPEG
compression, at the latest at the end. LR is rounded to integers in [0, 255], as a file has them. Real-ESRGAN departs from
its authors' code in that JPEG compression rounds its input and has the chroma interpolation of libjpeg, and there is no pool
of pairs: the images of a batch share the factors of resizing. The discriminator's real images are sharpened, too.
"""
import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from data.degrade import downscale_batch, to_array, to_batch
from data.filters import elliptic_kernels, filter_images, motion_kernels, sinc_kernels, usm_sharpen
from data.jpeg import compress
from option_types import degradation_steps
from system.distributed import global_batch_size, local_shard

MODES = "area", "bilinear", "bicubic"  # of resizing
AFTER_DOWNSCALING = "noise", "jpeg"
PATH_STEPS = 64
TURN = 1.5  # radians: the largest standard deviation of a motion's direction at its end
RAIN_LENGTH, RAIN_RADIUS = (15, 35), 20  # pixels
RAIN_ANGLE = math.pi / 6  # largest angle from the vertical
RAIN_DENSITY = 1e-3, 6e-3  # of drops, per pixel
RAIN_BRIGHTNESS = 50, 150  # grey levels that a streak adds at most
BLUR_RADIUS = 10  # of Real-ESRGAN's kernels, 21 x 21
# of the two stages: standard deviation of the blur; probabilities of a larger and of a smaller size, and the range of their
# factors; standard deviation of Gaussian noise; factor of Poisson noise
STAGES = (dict(sigma=(0.2, 3), resize=(0.2, 0.7), factors=(0.15, 1.5), gaussian=(1, 30), poisson=(0.05, 3)),
          dict(sigma=(0.2, 1.5), resize=(0.3, 0.4), factors=(0.3, 1.2), gaussian=(1, 25), poisson=(0.05, 2.5)))
SINC, SECOND_BLUR, FINAL_SINC, GAUSSIAN, GRAY = 0.1, 0.8, 0.8, 0.5, 0.4  # probabilities
QUALITY = 30, 95  # of JPEG compression
# kernels: family, whether both axes have the same sigma, range of beta (half of the draws are below 1), probability
KERNELS = (("gaussian", True, (1, 1), 0.45), ("gaussian", False, (1, 1), 0.25),
           ("gaussian", True, (0.5, 4), 0.12), ("gaussian", False, (0.5, 4), 0.03),
           ("plateau", True, (1, 2), 0.12), ("plateau", False, (1, 2), 0.03))


class Draws:
    """Random numbers for the images of a batch: each image has its own generator, and there is one for all together.

    So the numbers of an image do not depend on the other images, nor on how they are divided among processes. Parameters are
    drawn on the CPU, noise on the device. seeds: of the batch, then of each image.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.device = device
        self.batch, *self.images = (torch.Generator().manual_seed(seed) for seed in seeds)
        self.noise = self.images if device.type == "cpu" else [
            torch.Generator(device).manual_seed(seed) for seed in seeds[1:]]

    def once(self) -> float:
        """Draw a number in [0, 1) for the batch."""
        return torch.rand((), generator=self.batch).item()

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Draw N x shape numbers in [low, high)."""
        return low + (high - low) * torch.stack([torch.rand(shape, generator=one) for one in self.images])

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw N x shape numbers from a normal distribution."""
        return torch.stack([torch.randn(shape, generator=one) for one in self.images])

    def whole(self, low: int, high: int) -> torch.Tensor:
        """Draw N whole numbers in low..high."""
        return self.uniform(low, high + 1).floor()

    def normal_noise(self, *shape: int) -> torch.Tensor:
        """Draw N x shape numbers from a normal distribution, on the device."""
        return torch.stack([torch.randn(shape, generator=one, device=self.device) for one in self.noise])

    def uniform_noise(self, *shape: int) -> torch.Tensor:
        """Draw N x shape numbers in [0, 1), on the device."""
        return torch.stack([torch.rand(shape, generator=one, device=self.device) for one in self.noise])

    def poisson(self, means: torch.Tensor) -> torch.Tensor:
        """Draw numbers from Poisson distributions with these means, N x ..."""
        return torch.stack([torch.poisson(mean, generator=one) for mean, one in zip(means, self.noise)])


class Degradation:
    """Make LR from batches of HR as --degrade describes it."""

    def __init__(self, description: str, scale: int):
        self.steps, self.scale = degradation_steps(description), scale
        self.from_hr = self.steps[0][0] not in AFTER_DOWNSCALING  # else LR is made from the downscaled image

    @torch.no_grad()
    def __call__(self, lr: torch.Tensor, hr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return LR and HR for a training batch, given uint8 tensors N x 3 x H x W and N x 3 x sH x sW.

        All random numbers follow from one draw of torch's generator on the CPU, for the global batch.
        """
        first, *seeds = torch.randint(2**31, (1 + global_batch_size(len(hr)),)).tolist()
        return self.apply(lr, hr, [first, *local_shard(torch.tensor(seeds)).tolist()])

    @torch.no_grad()
    def test_image(self, image: np.ndarray, name: str) -> np.ndarray:
        """Return LR for a test image, uint8 H x W x 3; its random numbers follow from the name of the image alone.

        image: HR if `from_hr`, else the downscaled image.
        """
        seed = zlib.crc32(name.encode())
        batch = to_batch(image)
        return to_array(self.apply(batch, batch, [seed, seed])[0])

    def apply(self, lr: torch.Tensor, hr: torch.Tensor, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return LR and HR, uint8; lr is used unless `from_hr`, hr otherwise. seeds: as of `Draws`."""
        draws = Draws(seeds, hr.device)
        if self.steps[0][0] == "realesrgan":
            hr = usm_sharpen(hr.float())
            return to_uint8(second_order(hr, self.scale, draws)), to_uint8(hr)
        images, downscaled = (hr if self.from_hr else lr).float(), not self.from_hr
        for name, low, high in self.steps:
            if name in AFTER_DOWNSCALING and not downscaled:
                images, downscaled = self.downscale(images), True
            images = OPERATIONS[name](images, low, high, draws)
        return to_uint8(images if downscaled else self.downscale(images)), hr

    def downscale(self, images: torch.Tensor) -> torch.Tensor:
        """Downscale HR images bicubically, without rounding."""
        return images if self.scale == 1 else downscale_batch(images, self.scale, rounded=False).to(images)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Round images in about [0, 255]."""
    return images.round().clamp(0, 255).to(torch.uint8)


# ---- operations: images N x 3 x H x W in about [0, 255], floating-point; low, high: the range of their parameter

def random_noise(images: torch.Tensor, low: float, high: float, draws: Draws) -> torch.Tensor:
    """Add Gaussian noise of a standard deviation in [low, high] for each image."""
    return add_noise(images, draws.normal_noise(*images.shape[1:]), draws.uniform(low, high))


def random_jpeg(images: torch.Tensor, low: int, high: int, draws: Draws) -> torch.Tensor:
    """Compress with a quality in low..high for each image."""
    return compress(images, draws.whole(low, high))


def random_motion_blur(images: torch.Tensor, low: float, high: float, draws: Draws) -> torch.Tensor:
    """Blur each image along a path of a length in [low, high] pixels.

    Its direction is a random walk, as in hand-held shots; the walk's strength, and so the bend, is uniform too.
    """
    walk = draws.normal(PATH_STEPS).cumsum(1) / PATH_STEPS ** 0.5
    direction = draws.uniform(0, 2 * math.pi, 1) + draws.uniform(0, TURN, 1) * walk
    return filter_images(images, motion_kernels(draws.uniform(low, high), direction, math.ceil(high)))


def random_rain(images: torch.Tensor, _low: float, _high: float, draws: Draws) -> torch.Tensor:
    """Add white streaks of one direction, length and density for each image."""
    height, width = (size + 2 * RAIN_RADIUS for size in images.shape[2:])  # drops outside have streaks inside
    direction = math.pi / 2 + draws.uniform(-RAIN_ANGLE, RAIN_ANGLE, 1).expand(-1, PATH_STEPS)
    length, density, brightness = (draws.uniform(*limits) for limits in (RAIN_LENGTH, RAIN_DENSITY, RAIN_BRIGHTNESS))
    density, brightness = (x.view(-1, 1, 1, 1).to(images, non_blocking=True) for x in (density, brightness))
    kernels = motion_kernels(length, direction, RAIN_RADIUS)
    kernels = kernels / kernels.amax((1, 2), keepdim=True)
    drops = draws.uniform_noise(1, height, width).to(images)
    drops = (drops < density) * drops / density  # uniform in [0, 1) where there is a drop
    streaks = filter_images(drops, kernels)[..., RAIN_RADIUS:-RAIN_RADIUS, RAIN_RADIUS:-RAIN_RADIUS]
    return (images + brightness * streaks.clamp(max=1)).clamp(0, 255)


OPERATIONS = {"noise": random_noise, "jpeg": random_jpeg, "blur": random_motion_blur, "rain": random_rain}


def add_noise(images: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor,
              gray: torch.Tensor | None = None) -> torch.Tensor:
    """Add noise N x 3 x H x W times sigma (N); for images that are chosen by `gray` (N), its first channel to all."""
    if gray is not None:
        noise = torch.where(gray.to(images.device, non_blocking=True).view(-1, 1, 1, 1), noise[:, :1], noise)
    return images + noise * sigma.view(-1, 1, 1, 1).to(images, non_blocking=True)


# ---- Real-ESRGAN

def second_order(images: torch.Tensor, scale: int, draws: Draws) -> torch.Tensor:
    """Degrade sharpened HR images N x 3 x sH x sW in [0, 255] to N x 3 x H x W."""
    size = [side // scale for side in images.shape[2:]]
    first, second = STAGES
    images = filter_images(images, blur_kernels(first["sigma"], draws))
    images = resize(images, images.shape[2:], first, draws)
    images = random_jpeg(either_noise(images, first, draws), *QUALITY, draws)
    kernels = blur_kernels(second["sigma"], draws)
    if draws.once() < SECOND_BLUR:
        images = filter_images(images, kernels)
    images = either_noise(resize(images, size, second, draws), second, draws)
    jpeg_last = draws.once() < 0.5
    if not jpeg_last:
        images = random_jpeg(images, *QUALITY, draws)
    images = F.interpolate(images, size=size, mode=random_mode(draws))
    images = filter_images(images, final_kernels(draws))
    return random_jpeg(images, *QUALITY, draws) if jpeg_last else images


def blur_kernels(sigma: tuple[float, float], draws: Draws) -> torch.Tensor:
    """Draw a kernel N x 21 x 21 of one of the families for each image; sigma: the range of the standard deviations."""
    radius, angle = draws.whole(3, BLUR_RADIUS), draws.uniform(-math.pi, math.pi)
    both, chosen, below = draws.uniform(*sigma, 2), draws.uniform(0, 1), draws.uniform(0, 1) < 0.5
    part, start = draws.uniform(0, 1), 0
    kernels = random_sinc(radius, draws, torch.where(radius < 6, math.pi / 3, math.pi / 5))
    is_sinc = draws.uniform(0, 1) < SINC
    for family, isotropic, (low, high), probability in KERNELS:
        beta = torch.where(below, low + (1 - low) * part, 1 + (high - 1) * part)
        axes = both[:, :1].expand(-1, 2) if isotropic else both
        is_family = ~is_sinc & (start <= chosen) & (chosen < start + probability)
        kernels = torch.where(is_family[:, None, None],
                              elliptic_kernels(family, axes, angle, beta, radius, BLUR_RADIUS), kernels)
        start += probability
    return kernels


def random_sinc(radius: torch.Tensor, draws: Draws, least: torch.Tensor | float) -> torch.Tensor:
    """Draw sinc kernels N x 21 x 21 with a cutoff from `least` to pi."""
    return sinc_kernels(least + (math.pi - least) * draws.uniform(0, 1), radius, BLUR_RADIUS)


def final_kernels(draws: Draws) -> torch.Tensor:
    """Draw a sinc kernel for most images, and for the others one that changes nothing."""
    kernels = random_sinc(draws.whole(3, BLUR_RADIUS), draws, math.pi / 3)
    identity = torch.zeros_like(kernels[0])
    identity[BLUR_RADIUS, BLUR_RADIUS] = 1
    return torch.where((draws.uniform(0, 1) < FINAL_SINC)[:, None, None], kernels, identity)


def resize(images: torch.Tensor, size: Sequence[int], stage: dict, draws: Draws) -> torch.Tensor:
    """Resize a batch to `size` times a random factor."""
    (larger, smaller), (low, high), kind = stage["resize"], stage["factors"], draws.once()
    factor = draws.once()
    factor = 1 + (high - 1) * factor if kind < larger else low + (1 - low) * factor if kind < larger + smaller else 1
    return F.interpolate(images, size=[max(1, int(side * factor)) for side in size], mode=random_mode(draws))


def random_mode(draws: Draws) -> str:
    """Draw the interpolation for a batch."""
    return MODES[int(len(MODES) * draws.once())]


def either_noise(images: torch.Tensor, stage: dict, draws: Draws) -> torch.Tensor:
    """Add Gaussian noise, or else Poisson noise, to a batch, for some images the same in all channels."""
    gray = draws.uniform(0, 1) < GRAY
    if draws.once() < GAUSSIAN:
        noise, strength = draws.normal_noise(*images.shape[1:]), draws.uniform(*stage["gaussian"])
    else:
        noise, strength = poisson_noise(images, gray, draws), draws.uniform(*stage["poisson"])
    return add_noise(images, noise, strength, gray).clamp(0, 255)


def poisson_noise(images: torch.Tensor, gray: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Draw the shot noise of images, for those chosen by `gray` (N) of their luminance.

    A pixel of value v in [0, 255] has v / 255 * c photons, where c is the number of different values in the image, rounded
    up to a power of two (as in scikit-image).
    """
    red, green, blue = images.split(1, 1)
    luminance = (0.2989 * red + 0.587 * green + 0.114 * blue).expand_as(images)
    images = torch.where(gray.to(images.device, non_blocking=True).view(-1, 1, 1, 1), luminance, images)
    images = images.round().clamp(0, 255)
    present = images.new_zeros(len(images), 256).scatter_(1, images.flatten(1).long(), 1)
    unit = 255 / 2 ** present.sum(1).log2().ceil().view(-1, 1, 1, 1)
    return unit * draws.poisson(images / unit) - images
