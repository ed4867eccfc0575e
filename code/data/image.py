"""Image files as uint8 RGB arrays, whatever is in them."""
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from system.errors import UserError, writing
from system.files import atomic_path

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"))
PREVIEWED = frozenset((".jpg", ".jpeg"))  # cameras put smaller copies behind the photo


def list_images(folder):
    """Sorted image files of a folder, empty where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.is_dir())


def read_image(path):
    """-> (uint8 H x W x 3 RGB, alpha uint8 H x W or None where all is opaque).

    Grey and CMYK become RGB, 16 bits become 8, palettes their colours; a photo is turned as its camera says. Raises
    UserError for a file that is no image, is broken, or holds several images or numbers that are no pixels.
    """
    try:
        with iio.imopen(path, "r", plugin="pillow") as file:
            number = file.properties(index=...).n_images
            image = file.read(index=0, mode=_mode(file.metadata(index=0)), rotate=True)
    except Exception as error:  # every decoder has its own exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: unreadable image ({reason}); repair or remove it") from None
    if number > 1 and Path(path).suffix.lower() not in PREVIEWED:
        raise UserError(f"{path}: holds several images ({number}); save the one that is meant")
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(f"{path}: pixels of type {image.dtype}; save it with 8 or 16 bits per channel")
    if image.ndim == 2:
        image = image[..., None]
    alpha = image[..., -1] if image.shape[2] in (2, 4) else None
    if alpha is not None and (alpha == 255).all():
        alpha = None
    colour = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return np.ascontiguousarray(colour), alpha


def _mode(about):
    """Pillow's mode to convert to, None where the pixels can stay as they are."""
    if "transparency" in about and about["mode"] in ("1", "L", "P", "RGB"):  # a colour stands for it
        return "RGBA"
    return "RGB" if about["mode"] in ("CMYK", "YCbCr", "LAB", "HSV") else None


def read_photo(path):
    """uint8 H x W x 3 RGB of an image for training or scoring; raises UserError also for a transparent one."""
    colour, alpha = read_image(path)
    if alpha is not None:
        raise UserError(f"{path}: has transparent parts; flatten it, a loss cannot see through it")
    return colour


def write_image(path, image):
    """Writes a uint8 H x W x 3 or 4 array as PNG: whole or not at all."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, sync=False) as part:
        iio.imwrite(part, image, plugin="pillow", extension=".png", compress_level=3)
