"""Filters of batches of images, a kernel for each image, and the kernels of blur.

Kernels of blur are N x k x k, of sum 1, and computed from one value for each image. Gaussian, generalised Gaussian, plateau
and sinc kernels are those of Real-ESRGAN (Wang et al., ICCVW 2021).
"""
import math

import torch
import torch.nn.functional as F

from data.degrade import padding_index


def filter_images(images: torch.Tensor, kernels: torch.Tensor, padding: str = "reflect") -> torch.Tensor:
    """Correlate each image of N x C x H x W with its own kernel of N x k x l, whose sides are odd.

    padding: what np.pad calls its mode; unlike PyTorch's, the padding may be larger than the image.
    """
    (n, c, height, width), sides = images.shape, kernels.shape[1:]
    for axis, size, side in zip((2, 3), (height, width), sides):
        if side > 1:
            images = images.index_select(axis, padding_index(size, side // 2, padding, images.device))
    kernels = kernels.to(images, non_blocking=True).repeat_interleave(c, 0)[:, None]
    return F.conv2d(images.reshape(1, n * c, *images.shape[2:]), kernels, groups=n * c).view(n, c, height, width)


def gaussian(sigma: torch.Tensor, radius: torch.Tensor, largest: int = 5) -> torch.Tensor:
    """Compute one-dimensional kernels N x (2 * largest + 1), zero beyond the radius, from N x 1 of each."""
    place = torch.arange(-largest, largest + 1)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2) * (place.abs() <= radius)
    return kernel / kernel.sum(1, keepdim=True)


def elliptic_kernels(family: str, sigma: torch.Tensor, angle: torch.Tensor, beta: torch.Tensor, radius: torch.Tensor,
                     largest: int) -> torch.Tensor:
    """Compute kernels whose level lines are ellipses.

    With q the squared distance from the centre, divided by the variance of its direction, a kernel is proportional to
    exp(-q^beta / 2), a generalised Gaussian (Pascal et al., 2013), or to 1 / (1 + q^beta), a plateau. family: `gaussian` or
    `plateau`. sigma: N x 2, standard deviations along the two axes in pixels. angle: N, of the first axis from the x axis.
    beta: N. radius: N, beyond which (in x or y) a kernel is zero.
    """
    x, y = _grid(largest)
    cos, sin, beta = (value[:, None, None] for value in (angle.cos(), angle.sin(), beta))
    first, second = sigma[:, 0, None, None], sigma[:, 1, None, None]
    q = (((cos * x + sin * y) / first) ** 2 + ((cos * y - sin * x) / second) ** 2) ** beta
    return _normalised(torch.exp(-0.5 * q) if family == "gaussian" else 1 / (1 + q), radius, largest)


def sinc_kernels(cutoff: torch.Tensor, radius: torch.Tensor, largest: int) -> torch.Tensor:
    """Compute circular low-pass filters, J1(cutoff * r) * cutoff / (2 pi r) at the distance r; they ring.

    cutoff: N, in radians per pixel, at most pi. radius: N, beyond which a kernel is zero.
    """
    x, y = _grid(largest)
    distance, cutoff = (x ** 2 + y ** 2).sqrt(), cutoff[:, None, None]
    kernel = cutoff * torch.special.bessel_j1(cutoff * distance) / (2 * math.pi * distance)
    return _normalised(torch.where(distance > 0, kernel, cutoff ** 2 / (4 * math.pi)), radius, largest)


def motion_kernels(length: torch.Tensor, direction: torch.Tensor, largest: int) -> torch.Tensor:
    """Compute the kernels of motions at constant speed.

    length: N, in pixels, at most 2 * largest. direction: N x K, the angle of each of K equal steps from the x axis, constant
    for a linear motion. The centre of mass is in the middle; the points of a path are spread bilinearly.
    """
    path = torch.stack([direction.cos(), direction.sin()]).cumsum(2) * (length / direction.shape[1])[:, None]
    path = path - path.mean(2, keepdim=True)
    place = torch.arange(-largest, largest + 1)
    x, y = (1 - (path[..., None] - place).abs()).clamp(min=0)
    return _normalised(y.transpose(1, 2) @ x)


def _grid(largest):
    place = torch.arange(-largest, largest + 1).to(torch.get_default_dtype())
    return place[None, None], place[None, :, None]


def _normalised(kernels, radius=None, largest=0):
    if radius is not None:
        x, y = _grid(largest)
        kernels = kernels * (torch.maximum(x.abs(), y.abs()) <= radius[:, None, None])
    return kernels / kernels.sum((1, 2), keepdim=True)


def usm_sharpen(images: torch.Tensor) -> torch.Tensor:
    """Sharpen images in [0, 255] by an unsharp mask, with the settings of Real-ESRGAN's ground truth.

    The difference from a Gaussian blur (51 x 51, sigma 8) is added with weight 0.5 where it exceeds 10 grey levels; the mask
    of these places is blurred in the same way.
    """
    kernel = gaussian(torch.tensor([[8.0]]), torch.tensor([[25]]), 25).expand(len(images), -1)

    def blur(x):
        return filter_images(filter_images(x, kernel[:, :, None]), kernel[:, None])

    difference = images - blur(images)
    mask = blur((difference.abs() > 10).to(images))
    return torch.lerp(images, (images + 0.5 * difference).clamp(0, 255), mask)
