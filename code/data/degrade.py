"""Bicubic resizing, bit-identical to the official LR_bicubic images, which MATLAB's imresize made.

MATLAB widens the kernel when it shrinks (antialiasing), extends the image symmetrically, works on one axis after the other
(height first) and rounds to uint8 after each. PyTorch's antialiased bicubic has the same kernel (a = -0.5) but clips it at
the border, hence the extension here.
"""
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


def crop_to_multiple(image, scale):
    """Cuts H x W x ... at the bottom and right to multiples of the scale; a view."""
    height, width = image.shape[:2]
    return image[:height - height % scale, :width - width % scale]


def _resize(image, height, width, before, after):
    """Resizes each axis in turn, extended by `before` pixels and cropped by `after` of the result."""
    for axis, size in enumerate((height, width)):
        extended = np.pad(image, [(before, before) if a == axis else (0, 0) for a in range(3)], mode="symmetric")
        x = torch.from_numpy(extended).permute(2, 0, 1)[None].double()
        shape = [size + 2 * after if a == axis else x.shape[2 + a] for a in range(2)]
        x = F.interpolate(x, shape, mode="bicubic", antialias=True)
        x = x.add_(0.5).floor_().clamp_(0, 255).byte().narrow(2 + axis, after, size)
        image = x[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image)
