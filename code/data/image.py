"""Reading and writing of image files as uint8 RGB arrays, whatever their format and mode."""
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from system.errors import UserError, reason_of, writing
from system.files import atomic_path

log = logging.getLogger("sr")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"))
FORMATS = "PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"  # for others Pillow starts programs: Ghostscript for EPS
WITH_PREVIEWS = frozenset((".jpg", ".jpeg"))  # formats in which cameras append smaller copies of the photo
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # for twice as many pixels Pillow raises an error


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn an OSError raised in the body into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({reason_of(error)})") from None


def list_images(folder: Path | str) -> list[Path]:
    """Return the sorted image files of a folder, without those in its sub-folders; none if there is no such folder.

    Raises UserError for a folder or a file that cannot be read, for a pipe, socket or device with the name of an image
    (opening a pipe would wait forever), and for a folder whose images are all in sub-folders.
    """
    folder = Path(folder)
    images, folders = [], []
    with reading(folder):
        if not is_folder(folder):
            return []
        for file in folder.iterdir():
            is_image = file.suffix.lower() in SUFFIXES
            mode = file.stat().st_mode if is_image or file.is_dir() else 0
            if stat.S_ISDIR(mode):
                folders.append(file)
            elif is_image and not stat.S_ISREG(mode):
                raise UserError(f"{file}: no regular file but a pipe, socket or device; remove it")
            elif is_image:
                images.append(file)
        inner = next((inner for inner in sorted(folders) if _holds_images(inner)), None)
    if inner and not images:
        raise UserError(f"{folder}: no images but in its sub-folder {inner.name}; sub-folders are not read, move them up")
    if inner:
        log.info("%s: sub-folders are not read; there are images in %s", folder, inner.name)
    return sorted(images)


def is_folder(path: Path) -> bool:
    """Return whether the path is a folder; raises PermissionError, unlike os.path.isdir, if that cannot be determined."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _holds_images(folder):
    try:
        return any(os.path.splitext(name)[1].lower() in SUFFIXES for name in os.listdir(folder))
    except OSError:
        return False


def read_image(path: Path | str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return uint8 H x W x 3 RGB, and alpha as uint8 H x W or None where all is opaque.

    Grey, CMYK and palette images are converted to RGB, 16 bits to 8, and the EXIF orientation is applied. Raises UserError
    for a file that is no image, is damaged, or holds several images or pixels of another type.
    """
    try:
        # an open file, since Pillow maps a named one into memory and then garbles TIFF images with an orientation
        with open(path, "rb") as stream, Image.open(stream, formats=FORMATS) as file:
            number = getattr(file, "n_frames", 1)
            file.seek(0)
            image = np.array(ImageOps.exif_transpose(_to_grey_or_rgb(file)))
    except Exception as error:  # every decoder has its own exceptions
        raise UserError(f"{path}: unreadable image ({_reason(error, path)}); repair or remove it") from None
    if number > 1 and Path(path).suffix.lower() not in WITH_PREVIEWS:
        raise UserError(f"{path}: holds several images ({number}); save the one to use as a file of its own")
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


def _to_grey_or_rgb(image):
    """Convert an image to a mode whose pixels are grey or RGB, with alpha if it has a transparent colour."""
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        return image.convert("RGBA")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        return image.convert("RGB")
    if image.mode == "P":
        return image.convert(image.palette.mode)
    if image.mode == "I" and image.format == "PNG":  # 16 bits, in older versions of Pillow
        return image.convert("I;16")
    return image


def _reason(error, path):
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        with open(path, "rb") as file:
            start = file.read(16)
        if not start:
            return "empty"
        kind = next((name for name in FORMATS if Image.OPEN[name][1](start) is True), None)
        return f"its {kind} header is damaged or cut off" if kind else f"none of {', '.join(FORMATS)}"
    return reason_of(error)


def read_photo(path: Path | str) -> np.ndarray:
    """Return uint8 H x W x 3 RGB of an image for training or scoring; raises UserError also for a transparent one."""
    colour, alpha = read_image(path)
    if alpha is not None:
        raise UserError(f"{path}: has transparent parts; flatten it")
    return colour


def write_image(path: Path | str, image: np.ndarray) -> None:
    """Write a uint8 H x W x 3 or 4 array as PNG, atomically."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, sync=False) as part:
        Image.fromarray(image).save(part, format="PNG", compress_level=3)
