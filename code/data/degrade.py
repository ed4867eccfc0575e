"""Bicubic resizing, bit-identical to MATLAB's imresize, with which the official LR_bicubic images were made.

For downscaling MATLAB widens the kernel (antialiasing). It extends the image symmetrically, resizes one axis after the other
(height first), and rounds to uint8 after each. PyTorch's antialiased bicubic has the same kernel (a = -0.5), but truncates
and renormalises it at the border; therefore images are extended here before they are resized, and cropped afterwards.
"""
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

MARGIN = 4  # pixels of the smaller image by which each side is extended; the kernel's radius is 2


def downscale(image: np.ndarray, scale: int) -> np.ndarray:
    """Downscale uint8 H x W x C by an integer factor to H/s x W/s x C, after a crop to a multiple of the scale.

    Raises ValueError for an image smaller than the scale.
    """
    return to_array(downscale_batch(to_batch(image), scale))


def upscale(image: np.ndarray, scale: int) -> np.ndarray:
    """Upscale uint8 H x W x C by an integer factor to sH x sW x C; at scale 1 return a copy."""
    if scale == 1:
        return np.array(image)
    height, width = image.shape[:2]
    return to_array(_resize(to_batch(image), height * scale, width * scale, MARGIN, MARGIN * scale))


def downscale_batch(images: torch.Tensor, scale: int, rounded: bool = True) -> torch.Tensor:
    """Downscale a batch N x C x H x W in [0, 255], uint8 or floating-point, as `downscale` does each of its images.

    Returns integers N x C x H/s x W/s of the same dtype, on the same device; without `rounded` the values of the kernel,
    neither rounded nor clamped, as float32.
    """
    height, width = (size // scale for size in images.shape[2:])
    if not (height and width):
        raise ValueError(f"an image smaller than the scale {scale} cannot be downscaled")
    images = images[..., :height * scale, :width * scale]
    return _resize(images, height, width, MARGIN * scale, MARGIN, rounded)


def crop_to_multiple(image: np.ndarray, scale: int) -> np.ndarray:
    """Crop H x W x ... at the bottom and right to multiples of the scale, and return a view."""
    height, width = image.shape[:2]
    return image[:height - height % scale, :width - width % scale]


def to_batch(image: np.ndarray) -> torch.Tensor:
    """Copy H x W x C to 1 x C x H x W."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def to_array(batch: torch.Tensor) -> np.ndarray:
    """Convert 1 x C x H x W to H x W x C."""
    return np.ascontiguousarray(batch[0].permute(1, 2, 0).numpy())


def _resize(x, height, width, extension, margin, rounded=True):
    """Resize each axis in turn: extend it by `extension` pixels, resize, and crop `margin` pixels of the result."""
    kind = x.dtype if rounded else torch.float32
    for axis, size in ((2, height), (3, width)):
        extended = x.index_select(axis, padding_index(x.shape[axis], extension, "symmetric", x.device)).double()
        shape = [size + 2 * margin if a == axis else x.shape[a] for a in (2, 3)]
        resized = F.interpolate(extended, shape, mode="bicubic", antialias=True)
        x = (resized.add_(0.5).floor_().clamp_(0, 255) if rounded else resized).narrow(axis, margin, size)
    return x.to(kind)


@lru_cache(maxsize=256)
def padding_index(size: int, extension: int, mode: str, device: torch.device) -> torch.Tensor:
    """Return the index that extends an axis of `size` pixels on both sides, in a mode of np.pad; F.pad has few of them."""
    return torch.from_numpy(np.pad(np.arange(size), extension, mode=mode)).to(device, non_blocking=True)
