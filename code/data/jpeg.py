"""JPEG compression of batches of images on their device: what libjpeg's encoder and decoder make of them.

Follows the JPEG standard (ITU-T T.81, tables of Annex K; JFIF colours) and libjpeg's defaults: chroma of half the size
(4:2:0) by averages of four pixels, and interpolated bilinearly. Halves, frequent in flat areas, are rounded as there, but
the transforms of libjpeg round in between. Entropy coding loses nothing and is left out.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

from data.degrade import padding_index

LUMINANCE = (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
             14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
             49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99)
CHROMINANCE = (17, 18, 24, 47, *[99] * 4, 18, 21, 26, 66, *[99] * 4, 24, 26, 56, *[99] * 5, 47, 66, *[99] * 38)
HALF = 0.5001  # beyond the rounding error of a half, below the next value of a flat block
TO_YCC = (0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411)
TO_RGB = (1, 0, 1.402), (1, -0.344136286, -0.714136286), (1, 1.772, 0)


def compress(images: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Compress and decompress floating-point images N x 3 x H x W in [0, 255], which are rounded before and after.

    quality: N whole numbers in 1..100.
    """
    height, width = images.shape[2:]
    images = images.round().clamp(0, 255)
    for axis, size in ((2, height), (3, width)):  # whole blocks of chroma
        images = images.index_select(axis, padding_index(size, -size % 16, "edge", images.device)[-size % 16:])
    offset = torch.tensor([[[0.0]], [[128]], [[128]]]).to(images, non_blocking=True)
    y, chroma = (_mix(images, TO_YCC) + offset).round().split((1, 2), 1)
    chroma = F.avg_pool2d(chroma, 2)
    chroma = (chroma + 0.25 + _odd(chroma) / 4).floor()  # halves down and up in turn
    y, chroma = (_quantise(x, quality, table) for x, table in ((y, LUMINANCE), (chroma, CHROMINANCE)))
    # interpolation must not use the blocks beyond the image
    chroma = chroma[..., :(height + 1) // 2, :(width + 1) // 2]
    chroma = F.interpolate(chroma, scale_factor=2.0, mode="bilinear")
    chroma = (chroma + 0.5 - _odd(chroma) / 16).floor()[..., :height, :width]  # sixteenths; halves up and down in turn
    return _mix(torch.cat([y[..., :height, :width], chroma], 1) - offset, TO_RGB).round().clamp(0, 255)


def tables(quality: torch.Tensor, base: tuple[int, ...]) -> torch.Tensor:
    """Compute the N x 64 quantisation tables for N qualities in 1..100, as libjpeg scales them."""
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)[:, None]
    return ((torch.tensor(base) * percent + 50) / 100).floor().clamp(1, 255)


def _quantise(planes, quality, base):
    """Round the cosine coefficients of the 8 x 8 blocks of planes N x C x H x W to multiples of the table."""
    n, c, height, width = planes.shape
    table = tables(quality, base).to(planes, non_blocking=True)[:, None]
    transform = _cosines().to(planes, non_blocking=True)
    blocks = (planes - 128).view(n, c, height // 8, 8, width // 8, 8).transpose(3, 4).reshape(n, -1, 64)
    blocks = blocks @ transform.T / table
    blocks = (blocks.abs() + HALF).floor().copysign(blocks) * table @ transform
    planes = blocks.view(n, c, height // 8, width // 8, 8, 8).transpose(3, 4).reshape(planes.shape)
    return (planes + 128 + HALF).floor().clamp(0, 255)


def _odd(planes):
    """Return 0 for the even and 1 for the odd columns."""
    return torch.arange(planes.shape[-1], device=planes.device) % 2


@lru_cache
def _cosines():
    """Return the discrete cosine transform of 8 x 8 blocks, as a matrix for rows of 64 pixels."""
    place = torch.arange(8, dtype=torch.float64)
    axis = torch.cos((2 * place + 1) * place[:, None] * torch.pi / 16) / 2
    axis[0] /= 2 ** 0.5
    return torch.kron(axis, axis)


def _mix(images, weights):
    """Multiply the three channels by a 3 x 3 matrix; a 1 x 1 convolution takes ten times as long on a CPU."""
    weights = torch.tensor(weights, dtype=torch.float64).to(images, non_blocking=True)
    return (weights @ images.flatten(2)).view(images.shape)
