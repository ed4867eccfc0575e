"""Reading and writing of image files: as uint8 RGB arrays, whatever their format and mode, or with their own channels."""
import io
import logging
import os
import re
import stat
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from system.errors import UserError, reason_of, writing
from system.files import atomic_path

log = logging.getLogger("sr")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"))
FORMATS = "PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"  # for others Pillow starts programs: Ghostscript for EPS
WRITABLE = ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"
MAX_SIDE = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}  # pixels; these formats have 8 bits per channel
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
    as `read_channels`.
    """
    image, _ = read_channels(path)
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    alpha = image[..., -1] if image.shape[2] in (2, 4) else None
    if alpha is not None and (alpha == 255).all():
        alpha = None
    colour = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return np.ascontiguousarray(colour), alpha


def read_channels(path: Path | str) -> tuple[np.ndarray, bytes | None]:
    """Return an image with its own channels and bit depth, and its ICC profile, if it has one for these channels.

    The array is H x W x C, uint8 or uint16: gray, gray and alpha, RGB, or RGBA, for C from 1 to 4. Palette and CMYK images
    are converted to RGB, CMYK and premultiplied alpha of 16 bits to 8, and the EXIF orientation is applied. Raises UserError
    for a file that is no image, is damaged, or holds several images or pixels of another type.
    """
    try:
        image, number, info, raw_modes = _decode(path)
        if raw_modes:
            planes = [_decode(path, raw_mode)[0] for raw_mode in raw_modes]
            image = np.stack(planes, axis=-1).reshape(*planes[0].shape[:2], -1, 2).view(">u2")[..., 0].astype(np.uint16)
    except Exception as error:  # every decoder has its own exceptions
        raise UserError(f"{path}: unreadable image ({_reason(error, path)}); repair or remove it") from None
    if number > 1 and Path(path).suffix.lower() not in WITH_PREVIEWS:
        raise UserError(f"{path}: holds several images ({number}); save the one to use as a file of its own")
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    if image.dtype == np.dtype(">u2"):
        image = image.astype(np.uint16)
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: pixels of type {image.dtype}; save it with 8 or 16 bits per channel")
    image = image.reshape(*image.shape[:2], -1)
    if image.dtype == np.uint16 and info.get("transparency") is not None:
        is_opaque = (image != np.asarray(info["transparency"])).any(axis=2, keepdims=True)
        image = np.concatenate([image, is_opaque * np.uint16(65535)], axis=2)
    profile = info.get("icc_profile") or b""
    return image, profile if profile[16:20] == (b"GRAY" if image.shape[2] < 3 else b"RGB ") else None


def _decode(path, raw_mode=None):
    """Return an image as an array, the number of images in its file, Pillow's info on it, and its `_raw_modes`.

    raw_mode: how Pillow unpacks the file's bytes, in place of its own choice.
    """
    # an open file, since Pillow maps a named one into memory and then garbles TIFF images with an orientation
    with open(path, "rb") as stream, Image.open(stream, formats=FORMATS) as file:
        number = getattr(file, "n_frames", 1)
        file.seek(0)
        info, raw_modes = dict(file.info), _raw_modes(file)
        if raw_mode:
            file.tile = [tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
                         for tile in file.tile]
        return np.array(ImageOps.exif_transpose(file if raw_modes else _to_grey_or_rgb(file))), number, info, raw_modes


def _raw_modes(file):
    """Return the raw modes of Pillow that give the upper and the lower bytes of a file of 16 bits and several channels.

    Pillow has no modes of 16 bits for them and drops the lower bytes, which are the upper ones in the other byte order. Gray
    with alpha, which has no such raw mode, is read as four channels of 8 bits. Returns an empty list for other files; raises
    ValueError where Pillow would mix up the channels.
    """
    raw_mode = file.tile[0].args if file.tile else ""
    raw_mode = raw_mode if isinstance(raw_mode, str) else str(raw_mode[0])
    if file.format == "TIFF" and file.tag_v2.get(284) == 2 and max(file.tag_v2.get(258, (1,))) > 8:
        raise ValueError("16 bits per channel in separate planes; save them interleaved")
    if raw_mode == "LA;16B":
        return ["RGBA"]
    match = re.fullmatch("(RGB[AX]?);16([BLN])", raw_mode)
    if not match:
        return []
    is_big_endian = match[2] == "B" or (match[2] == "N" and sys.byteorder == "big")
    return [f"{match[1]};16{order}" for order in ("BL" if is_big_endian else "LB")]


def _to_grey_or_rgb(image):
    """Convert an image to a mode whose pixels are grey or RGB, with alpha if it has a transparent colour."""
    if image.mode == "PA" or ("transparency" in image.info and image.mode in ("1", "L", "P", "RGB")):
        return image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        with suppress(ImageCms.PyCMSError, OSError):  # a damaged profile
            converted = ImageCms.profileToProfile(image, io.BytesIO(image.info["icc_profile"]),
                                                  ImageCms.createProfile("sRGB"), outputMode="RGB")
            converted.info = image.info  # the orientation is in there
            return converted
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


def write_image(path: Path | str, image: np.ndarray, profile: bytes | None = None) -> None:
    """Write an image as PNG, JPEG, WebP or TIFF, as the suffix of the path states, with its ICC profile, atomically.

    image: H x W x C, uint8, or for PNG and TIFF uint16: gray, gray and alpha, RGB, or RGBA, for C from 1 to 4. JPEG has no
    alpha; PNG, TIFF and WebP are lossless.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, sync=False) as part:
        if suffix in (".tif", ".tiff"):
            import tifffile  # noqa: PLC0415 - it takes a third of a second

            tifffile.imwrite(part, image if image.shape[2] > 1 else image[..., 0], iccprofile=profile, metadata=None,
                             photometric="rgb" if image.shape[2] > 2 else "minisblack", compression="zlib", predictor=True,
                             planarconfig="contig" if image.shape[2] > 1 else None,
                             extrasamples=["unassalpha"] if image.shape[2] in (2, 4) else None)
        elif image.dtype == np.uint16:
            part.write_bytes(_png_of_16_bits(image, profile))
        else:
            settings = {".png": dict(format="PNG", compress_level=3), ".webp": dict(format="WEBP", lossless=True)}
            Image.fromarray(image if image.shape[2] > 1 else image[..., 0]).save(
                part, icc_profile=profile, **settings.get(suffix, dict(format="JPEG", quality=95, subsampling=0)))


def _png_of_16_bits(image, profile):
    """Return a PNG file of uint16 H x W x C, which Pillow cannot write for C above 1."""
    height, width, channels = image.shape
    rows = image.astype(">u2").view(np.uint8).reshape(height, -1)
    lines = np.empty((height, rows.shape[1] + 1), np.uint8)
    lines[:, 0] = 2  # the filter Up: differences from the row above
    lines[:, 1:] = rows
    lines[1:, 1:] -= rows[:-1]
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    PngImagePlugin.putchunk(file, b"IHDR", size, bytes((16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)))
    if profile:
        PngImagePlugin.putchunk(file, b"iCCP", b"ICC Profile\0\0", zlib.compress(profile))
    PngImagePlugin.putchunk(file, b"IDAT", zlib.compress(lines, 3))
    PngImagePlugin.putchunk(file, b"IEND", b"")
    return file.getbuffer()
