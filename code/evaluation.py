"""Scoring a network on test sets, and writing its images in the background.

The PSNR of a test set is the mean over its images, except those that are reproduced exactly, whose PSNR is infinite: a line
of the log states their number. The mean is infinite only where all images are exact. The mean SSIM includes exact images.
"""
import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import inference
from data import Images, degrade
from data.image import write_image
from metric import psnr, ssim
from model.reparameterisation import fuse
from perceptual import PerceptualMetric
from system import distributed
from system.device import autocast
from system.errors import UserError, writing
from system.files import remove_stale_parts
from system.logger import redraw_interval
from system.memory_budget import retain_freed_memory

log = logging.getLogger("sr")


@dataclass
class Score:
    """Means over a test set: PSNR in dB, without exact images, and SSIM in 0..1; both None without ground truth."""

    dataset: str
    images: int
    psnr: float | None
    ssim: float | None
    seconds: float  # per image, of the upscaling alone
    per_image: list[tuple[str, float, float]] = field(default_factory=list)  # name, PSNR, SSIM of those with ground truth
    perceptual: dict[str, float | None] = field(default_factory=dict)  # means of --metrics; None where all images lack HR
    perceptual_per_image: dict[str, dict[str, float]] = field(default_factory=dict)  # of each image, by its name


def by_network(net: nn.Module, device: torch.device, args: Namespace,
               label: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that upscales a uint8 H x W x 3 image with the network, as `forward_function` does."""
    # a tiled image stays in main memory, and only its tiles are moved to the device
    return by_function(forward_function(net, device, args, label), net.rgb_range, "cpu" if args.chop else device)


def forward_function(net: nn.Module, device: torch.device, args: Namespace,
                     label: str | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that upscales 1 x 3 x H x W in [0, net.rgb_range] with the network, which is moved to the device.

    It applies --precision, --chop and --self_ensemble, and raises FloatingPointError, with the label of the network, where
    an output is NaN or infinite. Re-parameterised convolutions are fused once, with the weights of this call.
    """
    # in channels_last, convolutions on a CPU do not have to reorder their inputs
    net = fuse(net).to(device, memory_format=torch.channels_last)

    def forward(x):
        with autocast(device, args.precision):
            sr = inference.upscale(net, x, args.chop, args.self_ensemble, args.chop_mem and 1e9 * args.chop_mem)
        if not torch.stack(sr.aminmax()).isfinite().all():  # one pass: NaN propagates to both
            advice = "use --precision single or bf16" if args.precision == "half" else "its weights do not suit this image"
            raise FloatingPointError(f"the output of {label or type(net).__name__} is NaN or infinite in --precision "
                                     f"{args.precision}; {advice}")
        return sr
    return forward


def by_function(run: Callable[[torch.Tensor], torch.Tensor], rgb_range: float,
                device: torch.device | str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that upscales a uint8 H x W x 3 image by `run`, which takes 1 x 3 x H x W in [0, rgb_range]."""
    def upscale(lr):
        x = degrade.to_batch(lr).to(device).float()
        x = x * (rgb_range / 255) if rgb_range != 255 else x
        return inference.to_image(run(x), rgb_range)
    return upscale


def by_bicubic(scale: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that upscales a uint8 H x W x 3 image bicubically; at scale 1 it returns the input."""
    return partial(degrade.upscale, scale=scale)


def upscale_image(upscale: Callable, images: Images, index: int, lr: np.ndarray) -> np.ndarray:
    """Apply `upscale` to an LR image; raises UserError, with its file name, where the output is not finite.

    index: that of the image in `images`.
    """
    try:
        return upscale(lr)
    except FloatingPointError as error:
        raise UserError(f"{images.pairs[index].lr or images.pairs[index].hr}: {error}") from None


@retain_freed_memory(torch.device("cpu"))
def score(upscale: Callable, images: Images, writer: "Writer | None" = None,
          stop: Callable[[], int] = lambda: False, space: str = "y",
          perceptual: Sequence[PerceptualMetric] = ()) -> Score | None:
    """Score `upscale` on a test set, and write the SR images with `writer`; return None if stop() became true.

    space: y or rgb, that of PSNR and SSIM. perceptual: further metrics. Several processes divide the images among
    themselves; the Score is that of all images.
    """
    psnrs, ssims, seconds, stopped = [0.0] * len(images), [0.0] * len(images), 0.0, 0
    others = np.zeros((len(perceptual), len(images)))
    if writer:
        writer.prepare(images)
    shard = range(distributed.rank(), len(images), distributed.world_size())
    for index in tqdm(shard, f"testing {images.name}", unit="image", leave=False,
                      mininterval=redraw_interval()):
        stopped = int(stop())
        if stopped:
            break
        pair = images.pairs[index]
        lr, hr = images.lr(index), images.hr(index)
        start = time.perf_counter()
        sr = upscale_image(upscale, images, index, lr)
        seconds += time.perf_counter() - start
        try:
            if hr is not None:
                psnrs[index], ssims[index] = (metric(sr, hr, images.shave, space) for metric in (psnr, ssim))
            for values, metric in zip(others, perceptual):
                if hr is not None or not metric.needs_hr:
                    values[index] = metric(sr, hr)
        except ValueError as error:
            raise UserError(f"{pair.hr or pair.lr}: {error}") from None
        if writer:
            writer.write(images, index, pair.name, sr, lr, hr)
    if distributed.all_reduce_max(stopped):
        return None
    # each image is scored by one process
    seconds, *values = distributed.all_reduce_sum([seconds, *psnrs, *ssims, *others.ravel().tolist()])
    values = [values[start:start + len(images)] for start in range(0, len(values), len(images))]
    per_image = [(pair.name, *pair_scores) for pair, *pair_scores in zip(images.pairs, *values[:2]) if pair.hr is not None]
    perceptual_per_image = {
        pair.name: {metric.name: value for metric, value in zip(perceptual, image_values)
                    if pair.hr is not None or not metric.needs_hr}
        for pair, *image_values in zip(images.pairs, *values[2:])}
    ssims, finite = [ssim for _, _, ssim in per_image], [psnr for _, psnr, _ in per_image if psnr != math.inf]
    exact = len(per_image) - len(finite)
    if exact:
        log.info("%s: %d of %d images are exact; their infinite PSNR is left out of the mean", images.name, exact,
                 len(images))
    psnr_mean = sum(finite) / len(finite) if finite else math.inf if exact else None
    ssim_mean = sum(ssims) / len(ssims) if ssims else None
    found = {metric.name: [row[metric.name] for row in perceptual_per_image.values() if metric.name in row]
             for metric in perceptual}
    perceptual_means = {name: sum(row) / len(row) if row else None for name, row in found.items()}
    return Score(images.name, len(images), psnr_mean, ssim_mean, seconds / len(images), per_image, perceptual_means,
                 perceptual_per_image)


def image_rows(checkpoint: str, epoch: int | None, scale: int,
               scores: dict[str, Sequence[tuple[str, float, float]]],
               perceptual: Mapping[str, dict[str, dict[str, float]]] = MappingProxyType({})) -> list[dict]:
    """Return the rows of images.csv: the PSNR in dB, the SSIM, and other metrics of each image.

    checkpoint: name of the file that was tested. epoch: that of the test, None outside of training. scores, perceptual: for
    each test set, `per_image` and `perceptual_per_image` of its `Score`.
    """
    rows = []
    for dataset, per_image in scores.items():
        cells = {name: dict(psnr=f"{psnr:.6f}", ssim=f"{ssim:.8f}") for name, psnr, ssim in per_image}
        for name, values in perceptual.get(dataset, {}).items():
            cells[name] = cells.get(name, {}) | {metric: f"{value:.6f}" for metric, value in values.items()}
        rows += [dict(checkpoint=checkpoint, epoch=epoch, dataset=dataset, scale=scale, image=name, **row)
                 for name, row in cells.items() if row]
    return rows


def best(history: list[dict]) -> dict[str, tuple[float, int]]:
    """Return {dataset: (PSNR, epoch)} of the epoch with the highest PSNR, the first of equal ones; NaN is never the highest.

    history: a dict for each epoch, as `Trainer.test_epoch` records it. The test sets are those of the last epoch.
    """
    found = {}
    for name in history[-1]["scores"]:
        scores = [(row["scores"][name][0], row["epoch"]) for row in history if name in row["scores"]]
        scores = [(psnr, epoch) for psnr, epoch in scores if not math.isnan(psnr)]
        if scores:
            found[name] = max(scores, key=lambda score: score[0])
    return found


def best_epoch(history: list[dict]) -> int:
    """Return the epoch of model_best.pt, 0 if there is none.

    It is the best on the first test set, as in EDSR; without ground truth it is the latest.
    """
    first = next(iter(history[-1]["scores"]), None)
    return history[-1]["epoch"] if first is None else best(history).get(first, (0, 0))[1]


class Writer:
    """Writes test images to folder/results-DATASET/ in the background; leaving the `with` waits for the last one."""

    LIMIT = 16  # images that may wait to be written, which bounds the memory

    def __init__(self, folder: Path, save_gt: bool):
        self.folder, self.save_gt = folder, save_gt
        self.pool = ThreadPoolExecutor(max_workers=2)
        self.waiting = []

    def __enter__(self):
        return self

    def __exit__(self, problem, *_):
        try:
            while self.waiting and not problem:
                self.waiting.pop(0).result()
        finally:
            self.pool.shutdown(cancel_futures=True)

    def folder_of(self, images: Images) -> Path:
        """Return the folder for the results on a test set."""
        return self.folder / f"results-{images.name}"

    def prepare(self, images: Images) -> None:
        """Make the folder of a test set; raises UserError, before the upscaling, where it cannot be written to."""
        folder = self.folder_of(images)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale_parts(folder)
            with TemporaryFile(dir=folder):
                pass

    def write(self, images: Images, index: int, name: str, sr: np.ndarray, lr: np.ndarray, hr: np.ndarray | None) -> None:
        """Write an SR image, with the alpha channel of its LR image if there is one, and with --save_gt also LR and HR."""
        alpha = images.alpha(index)
        if alpha is not None:
            sr = np.dstack([sr, degrade.upscale(alpha[..., None], images.scale)])
        kinds = {"SR": sr, **({"LR": lr, "HR": hr} if self.save_gt and hr is not None else {})}
        for kind, image in kinds.items():
            path = self.folder_of(images) / f"{name}_x{images.scale}_{kind}.png"
            self.waiting.append(self.pool.submit(write_image, path, np.array(image)))
        while len(self.waiting) > self.LIMIT:
            self.waiting.pop(0).result()


def width(name: str) -> int:
    """Return the width of the column of a metric in a table, in characters."""
    return max(9, len(name) + 2)


def table(scores: Sequence[Score], best: dict[str, tuple[float, int]] | None = None) -> str:
    """Format scores as lines of text; `best`, as `best()` returns it, adds two columns."""
    names = list(dict.fromkeys(name for s in scores for name in s.perceptual))
    header = f"{'dataset':<16}{'images':>7}{'PSNR':>9}{'SSIM':>9}" + "".join(f"{name:>{width(name)}}" for name in names)
    header += f"{'ms/image':>10}"
    lines = [header + (f"{'best':>9}{'epoch':>7}" if best else "")]
    for s in scores:
        line = f"{s.dataset:<16}{s.images:>7}" + (f"{'-':>9}{'-':>9}" if s.psnr is None else f"{s.psnr:>9.3f}{s.ssim:>9.4f}")
        for name in names:
            value = s.perceptual[name]
            line += f"{'-':>{width(name)}}" if value is None else f"{value:>{width(name)}.4f}"
        line += f"{1000 * s.seconds:>10.0f}"
        if best and s.dataset in best:
            line += f"{best[s.dataset][0]:>9.3f}{best[s.dataset][1]:>7}"
        lines.append(line)
    return "\n".join(lines)
