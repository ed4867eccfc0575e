"""Upscaling of image files and of raw video frames, for upscale.py."""
import argparse
import glob
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import inference
from data.image import MAX_SIDE, SUFFIXES, WRITABLE, read_channels, reading, write_image
from evaluation import forward_function
from model import describe, load_model, require_rgb
from model.onnx_file import OnnxNetwork
from model.teachers import FOLDER
from option_types import SCALES, OutputSize
from system.device import pick_device
from system.errors import UserError, is_out_of_memory, reason_of, writing
from system.files import file_size, remove_stale_parts
from system.logger import redraw_interval
from system.memory_budget import retain_freed_memory

log = logging.getLogger("sr")
DEFAULT = "Compact_M_x{}.pt"  # in teacher_checkpoint/
DTYPES = {"rgb24": "u1", "rgb48le": "<u2", "rgb48be": ">u2"}  # of the values of --pix_fmt


class Job(NamedTuple):
    """An image file and the file for its upscaled image."""

    source: Path
    target: Path


# ---- the network

class Upscaler:
    """Upscales arrays by a network, and bicubic where its scale is not the factor.

    forward: upscales 1 x 3 x H x W in [0, 255]. factor: of the size. alpha: how the alpha channel is upscaled, network or
    bicubic.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], factor: float, alpha: str):
        self.forward, self.factor, self.alpha = forward, factor, alpha

    def size(self, side: int) -> int:
        """Return the upscaled side of an image, in pixels."""
        return max(1, round(side * self.factor))

    def __call__(self, image: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Upscale H x W x C, gray, gray and alpha, RGB or RGBA, uint8 or uint16; the result has the given dtype.

        Gray and alpha channels pass the network as gray RGB images. Nothing is rounded before the end.
        """
        x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None].mul_(255 / np.iinfo(image.dtype).max)
        colour, alpha = x.split([x.shape[1] - 1, 1], 1) if x.shape[1] in (2, 4) else (x, None)
        channels = [self.resize(self.run(colour), image)]
        if alpha is not None:
            is_plain = self.alpha == "bicubic" or alpha.min() == alpha.max()
            channels.append(self.resize(alpha if is_plain else self.run(alpha), image))
        return inference.to_image(torch.cat(channels, 1), 255, getattr(torch, dtype.name))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network on 1 x 3 x H x W, or on 1 x 1 x H x W, which is repeated, and the outputs are averaged."""
        return self.forward(x) if x.shape[1] == 3 else self.forward(x.expand(-1, 3, -1, -1)).mean(1, keepdim=True)

    def resize(self, x: torch.Tensor, image: np.ndarray) -> torch.Tensor:
        """Resize 1 x C x H x W to the upscaled size of the image."""
        size = [self.size(side) for side in image.shape[:2]]
        return x if list(x.shape[2:]) == size else F.interpolate(x, size, mode="bicubic", antialias=True)


def make_upscaler(args: argparse.Namespace) -> Upscaler:
    """Load the network of the flags; raises UserError."""
    if args.model:
        device, net = torch.device("cpu"), OnnxNetwork(args.model, args.cpu)
        log.info("%s: ONNX, scale %d", args.model, net.scale)
    else:
        device, net = pick_device(args), load_network(args)
        log.info("%s: %s", args.ckp_path, describe(net))
    return Upscaler(forward_function(net, device, args), args.outscale or net.scale, args.alpha or "network")


def load_network(args: argparse.Namespace) -> torch.nn.Module:
    """Load the checkpoint of --ckp_path, or the default network, whose path is set as `args.ckp_path`; raises UserError."""
    if not args.ckp_path:
        scales = [scale for scale in SCALES if (FOLDER / DEFAULT.format(scale)).is_file()]
        reaching = [scale for scale in scales if scale >= (args.outscale or 2)] or scales[-1:]
        scale = args.scale or (reaching or [2])[0]
        if scale not in scales:
            held = ", ".join(map(str, scales))
            raise UserError(f"{FOLDER} holds no default network for scale {scale}"
                            + (f", only for {held}" if scales else "") + "; give a network with --ckp_path FILE or --model "
                            "FILE.onnx")
        args.ckp_path = FOLDER / DEFAULT.format(scale)
    return require_rgb(load_model(args.ckp_path, scale=args.scale), args.ckp_path)


# ---- files

def plan(args: argparse.Namespace) -> list[Job]:
    """Return the images to upscale and make the folders of their outputs; existing outputs are left out, unless --overwrite.

    Raises UserError where there are no images, or two have the same output.
    """
    out = args.output
    with reading(out):
        is_file = out.suffix.lower() in set(Image.registered_extensions()) and not out.is_dir()
        found = find_images(args.input, out.resolve())
    if is_file:
        if out.suffix.lower() not in WRITABLE:
            raise UserError(f"-o {out}: this format cannot be written; give {', '.join(WRITABLE)}, or a folder")
        if len(args.input) > 1 or len(found) > 1 or Path(args.input[0]).expanduser().is_dir():
            raise UserError(f"-o {out} is a file, but {' '.join(args.input)} is not a single image; give a folder")
        if args.ext or args.suffix:
            raise UserError(f"-o {out} is a file: --ext and --suffix apply to a folder")
    jobs = [Job(source, out if is_file else out / relative.parent / output_name(relative, args))
            for source, relative in found]
    targets = {}
    for job in jobs:
        first = targets.setdefault(job.target.resolve(), job)
        if job.target.resolve() == job.source.resolve():
            raise UserError(f"{job.source}: its upscaled image would replace it; give another folder, or a --suffix")
        if first is not job:
            raise UserError(f"{first.source} and {job.source} have the same output {job.target}; upscale them one after "
                            "the other, into different folders" + (", or give --ext auto" if args.ext else ""))
    own = [job for job in jobs if job.source.resolve() not in targets]
    if len(own) < len(jobs):
        log.info("%d of %d images are outputs of others, and are not upscaled", len(jobs) - len(own), len(jobs))
    jobs = [job for job in own if args.overwrite or not job.target.exists()]
    if len(jobs) < len(own):
        log.info("%d of %d outputs exist and are kept; --overwrite replaces them", len(own) - len(jobs), len(own))
    for folder in {job.target.parent for job in jobs}:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(folder)
    return jobs


def output_name(path: Path, args: argparse.Namespace) -> str:
    """Return the file name of an upscaled image."""
    suffix = path.suffix if path.suffix.lower() in WRITABLE else ".png"
    return path.stem + args.suffix + (suffix if args.ext in (None, "auto") else f".{args.ext}")


def find_images(inputs: list[str], out: Path) -> list[tuple[Path, Path]]:
    """Return image files, each with its path relative to the folder that was given, or to the fixed part of the pattern.

    inputs: files, folders, which are searched with their sub-folders except `out` and hidden ones, or patterns. Raises
    UserError where one of them has no images.
    """
    found = {}
    for word in inputs:
        path = Path(word).expanduser()
        if path.is_dir():
            base, files = path, files_below(path, out)
        elif path.exists() or not glob.has_magic(word):
            if not path.exists():
                raise UserError(f"-i {word}: no such file or folder")
            base, files = path.parent, [path]
        else:
            fixed = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
            base, files = Path(*path.parts[:fixed]), sorted(map(Path, glob.glob(str(path), recursive=True)))
        if files != [path]:  # a file that was named is an image, whatever its suffix
            files = [file for file in files if file.suffix.lower() in SUFFIXES and not file.is_dir()]
        if not files:
            raise UserError(f"-i {word}: no images there ({', '.join(sorted(SUFFIXES))})")
        found.update((file, file.relative_to(base)) for file in files)
    return list(found.items())


def files_below(folder: Path, out: Path) -> list[Path]:
    """Return the sorted files of a folder and its sub-folders, except those in `out` and hidden ones; raises OSError."""
    def fail(error):
        raise error

    files = []
    for inner, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if name[0] != "." and Path(inner, name).resolve() != out)
        files += [Path(inner, name) for name in sorted(names) if name[0] != "."]
    return files


@retain_freed_memory(torch.device("cpu"))
def upscale_files(jobs: list[Job], upscaler: Upscaler) -> int:
    """Upscale images, write each in the background, print the errors, and return 1 if there were any, else 0."""
    failed, pending = 0, None

    def attempt(function, *arguments):
        nonlocal failed
        try:
            return function(*arguments)
        except UserError as error:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
            return None

    with ThreadPoolExecutor(max_workers=1) as pool:
        for job in progress_bar(jobs, "image"):
            upscaled = attempt(upscale_file, job, upscaler)
            if pending:
                attempt(pending.result)
            pending = pool.submit(write_image, job.target, *upscaled) if upscaled else None
        if pending:
            attempt(pending.result)
    log.info("%d of %d images upscaled", len(jobs) - failed, len(jobs))
    return int(failed > 0)


def upscale_file(job: Job, upscaler: Upscaler) -> tuple[np.ndarray, bytes | None]:
    """Return the upscaled image of a job and its ICC profile; raises UserError."""
    file_size(job.source)  # raises UserError for a named pipe, which would be waited for
    image, profile = read_channels(job.source)
    suffix = job.target.suffix.lower()
    if suffix in (".jpg", ".jpeg") and image.shape[2] in (2, 4):
        if (image[..., -1] < np.iinfo(image.dtype).max).any():
            raise UserError(f"{job.source}: has transparent parts, which JPEG cannot hold; give another --ext")
        image = image[..., :-1]
    if max(map(upscaler.size, image.shape[:2])) > MAX_SIDE.get(suffix, math.inf):
        raise UserError(f"{job.source}: {suffix} images have sides of at most {MAX_SIDE[suffix]} pixels; give another --ext")
    dtype = np.dtype(np.uint8) if suffix in MAX_SIDE else image.dtype
    if dtype != image.dtype:
        log.info("%s: its 16 bits per channel become 8, as %s has no more", job.source, suffix)
    try:
        return upscaler(image, dtype), profile
    except FloatingPointError as error:
        raise UserError(f"{job.source}: {error}") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{job.source}: out of memory; give a smaller --chop_mem") from None


def progress_bar(items: Iterable, unit: str) -> tqdm:
    """Return the items with a progress bar on stderr."""
    return tqdm(items, "upscaling", unit=unit, mininterval=redraw_interval())


# ---- raw video

def take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Return stdin and stdout for the frames, and let everything else that is written to stdout go to stderr.

    Raises UserError where one of them is a terminal or closed.
    """
    if os.isatty(0) or os.isatty(1):
        raise UserError("--pipe reads raw frames from stdin and writes them to stdout; connect both, such as ffmpeg ... | "
                        "python upscale.py --pipe 640x360 | ffmpeg ...")
    try:
        streams = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
    except OSError as error:
        raise UserError(f"--pipe: stdin, stdout or stderr is closed ({reason_of(error)})") from None
    return streams


@retain_freed_memory(torch.device("cpu"))
def upscale_frames(source: BinaryIO, sink: BinaryIO, size: OutputSize, pix_fmt: str, upscaler: Upscaler) -> None:
    """Upscale raw frames of `source`, one at a time, and write them to `sink`.

    Raises UserError where a frame is incomplete, there is none, or the sink was closed.
    """
    dtype = np.dtype(DTYPES[pix_fmt])
    length = 3 * size.width * size.height * dtype.itemsize
    log.info("frames of %s become %dx%d, %s", size, *map(upscaler.size, size), pix_fmt)
    for number in progress_bar(itertools.count(), "frame"):
        data = source.read(length)
        if not data and not number:
            raise UserError("--pipe: there are no frames on stdin; it is to be connected to a program that writes them")
        if 0 < len(data) < length:
            raise UserError(f"--pipe {size}: stdin ended after {len(data):,} of the {length:,} bytes of frame {number + 1} "
                            f"in {pix_fmt}; compare size and format with those of the program that writes the frames")
        if not data:
            break
        frame = np.frombuffer(data, dtype).reshape(size.height, size.width, 3).astype(dtype.newbyteorder("="))
        try:
            sink.write(upscaler(frame, frame.dtype).astype(dtype, copy=False))
            sink.flush()
        except FloatingPointError as error:
            raise UserError(f"frame {number + 1}: {error}") from None
        except OSError as error:
            raise UserError(f"--pipe: frame {number + 1} cannot be written to stdout ({reason_of(error)})") from None
