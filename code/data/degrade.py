"""Bicubic resizing, bit-identical to the official LR_bicubic images, which MATLAB's imresize made.

MATLAB widens the kernel when it shrinks (antialiasing), extends the image symmetrically, works on one axis after the other
(height first) and rounds to uint8 after each. PyTorch's antialiased bicubic has the same kernel (a = -0.5) but clips it at
the border, hence the extension here.
"""
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

MARGIN = 4  # pixels of the smaller image on each side; the kernel reaches 2


def downscale(image, scale):
    """uint8 H x W x 3 -> uint8 H/s x W/s x 3, after a crop to a multiple of the scale."""
    image = crop_to_multiple(image, scale)
    height, width = image.shape[:2]
    if not (height and width):
        raise ValueError(f"an image smaller than the scale {scale} cannot be downscaled")
    return _resize(image, height // scale, width // scale, MARGIN * scale, MARGIN)


def upscale(image, scale):
    """uint8 H x W x 3 -> uint8 sH x sW x 3."""
    height, width = image.shape[:2]
    return _resize(image, height * scale, width * scale, MARGIN, MARGIN * scale)


def downscale_batch(images, scale):
    """N x C x H x W in [0, 255], uint8 or floating -> N x C x H/s x W/s of whole numbers, of the same type and device.

    What `downscale` makes of each image, after the same crop to a multiple of the scale.
    """
    height, width = (size // scale for size in images.shape[2:])
    if not (height and width):
        raise ValueError(f"an image smaller than the scale {scale} cannot be downscaled")
    images = images[..., :height * scale, :width * scale]
    return _resize_batch(images, height, width, MARGIN * scale, MARGIN)


def crop_to_multiple(image, scale):
    """Cuts H x W x ... at the bottom and right to multiples of the scale; a view."""
    height, width = image.shape[:2]
    return image[:height - height % scale, :width - width % scale]


def _resize(image, height, width, before, after):
    """`_resize_batch` of one array H x W x C."""
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return np.ascontiguousarray(_resize_batch(batch, height, width, before, after)[0].permute(1, 2, 0).numpy())


def _resize_batch(x, height, width, before, after):
    """Resizes each axis in turn, extended by `before` pixels and cropped by `after` of the result."""
    for axis, size in ((2, height), (3, width)):
        extended = x.index_select(axis, _extension(x.shape[axis], before, x.device)).double()
        shape = [size + 2 * after if a == axis else x.shape[a] for a in (2, 3)]
        resized = F.interpolate(extended, shape, mode="bicubic", antialias=True)
        x = resized.add_(0.5).floor_().clamp_(0, 255).narrow(axis, after, size).to(x.dtype)
    return x


@lru_cache(maxsize=64)
def _extension(size, before, device):
    """Which pixel stands in each place of an axis that is extended symmetrically."""
    return torch.from_numpy(np.pad(np.arange(size), before, mode="symmetric")).to(device)
