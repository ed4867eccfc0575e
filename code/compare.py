"""Compare several checkpoints and bicubic upscaling, at scale 1 the input: compare.csv, compare.png, compare_speed.png.

With --html also compare.html, a page to look at them. Run from this folder:
python compare.py --ckp_path scratch=A.pt+distilled=B.pt+teacher=RCAN --data_test Sample --ckp_dir quickstart
"""
import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

import html_page
import option
from option_types import parse_labelled
from plotting import set_log_x, to_png
from system.errors import UserError, writing
from system.signals import run_script

if TYPE_CHECKING:
    import torch

    from data import Images

log = logging.getLogger("sr")
CROP = 96  # HR pixels a side


def main() -> int:
    """Compare the checkpoints that the flags name, and return the exit status; raises UserError."""
    args = option.parse(training=False)
    import evaluation  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for torch
    from checkpoint import write_table  # noqa: PLC0415
    from data import make_benchmarks  # noqa: PLC0415
    from perceptual import make_metrics  # noqa: PLC0415
    from system.device import pick_device  # noqa: PLC0415
    from system.files import atomic_write  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    nets = load(args)
    args.scale = next(iter(nets.values())).scale
    device = pick_device(args)
    metrics, baseline = make_metrics(args.metrics, device), baseline_of(args.scale)
    methods = {baseline: evaluation.by_bicubic(args.scale)}
    methods |= {label: evaluation.by_network(net, device, args, label) for label, net in nets.items()}
    folder = option.ROOT / "experiment" / args.ckp_dir
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    benchmarks = make_benchmarks(args)
    for images in benchmarks:
        if not images.has_hr:
            raise UserError(f"{images.name} has no HR images to compare with")
    gallery = html_page.Gallery(args.html_images, hardest) if args.html else None
    rows = []
    for images in benchmarks:
        size = megapixels(images)
        for label, upscale in methods.items():
            if gallery:
                gallery.label = label
            # a warm-up: the first forward pass takes longer, which the time should not include
            evaluation.upscale_image(upscale, images, 0, images.lr(0))
            score = evaluation.score(upscale, images, gallery, space=args.metric_space, perceptual=metrics)
            if gallery:
                gallery.add_scores(score)
            parameters = sum(p.numel() for p in nets[label].parameters()) if label in nets else 0
            rows.append((label, f"{images.name} x{args.scale}", f"{score.psnr:.3f}", f"{score.ssim:.4f}",
                         *(f"{value:.4f}" for value in score.perceptual.values()), f"{parameters}",
                         f"{1000 * score.seconds:.1f}", f"{1000 * score.seconds / size:.1f}"))
    columns = ("network", "dataset", "psnr", "ssim", *args.metrics, "parameters", "ms_per_image", "ms_per_megapixel")
    widths = (max(12, *map(len, methods)) + 2, 16, 9, 9, *map(evaluation.width, args.metrics), 13, 15, 18)
    for row in (columns, *rows):
        log.info("".join(f"{cell:<{width}}" if k < 2 else f"{cell:>{width}}"
                         for k, (cell, width) in enumerate(zip(row, widths))))

    write_table(folder / "compare.csv", [dict(zip(columns, row)) for row in rows])
    atomic_write(folder / "compare.png", picture(benchmarks[0], methods, args.metric_space))
    atomic_write(folder / "compare_speed.png", draw_speed([row for row in rows if row[0] != baseline]))
    if gallery:
        page = html_page.page(folder.name, *describe(args, benchmarks, device), columns, rows,
                              {metric.name: metric.lower_is_better for metric in metrics}, gallery)
        atomic_write(folder / "compare.html", page)
        log.info("page: %s, %.1f MB", os.path.relpath(folder / "compare.html"), len(page) / 1e6)
    log.info("table and pictures: %s, compare.png and compare_speed.png", os.path.relpath(folder / "compare.csv"))
    return 0


def describe(args: SimpleNamespace, benchmarks: list["Images"], device: "torch.device") -> tuple[str, str]:
    """Return what the page compares, and how it was measured."""
    sets = ", ".join(f"{images.name} ({len(images)} image{'s' * (len(images) > 1)})" for images in benchmarks)
    space = "the Y channel" if args.metric_space == "y" else "RGB"
    how = f"{args.precision} precision on {device.type}" + ", self-ensemble" * args.self_ensemble + ", in tiles" * args.chop
    return (f"scale {args.scale}, {sets}",
            f"PSNR and SSIM on {space}, {option.shave_of(args)} pixels shaved off each border. Times: {how}.")


def load(args: SimpleNamespace) -> dict:
    """Load the networks of --ckp_path LABEL=FILE+..., where FILE may be a teacher's name; raises UserError.

    Returns {label: network}.
    """
    from model import fuse, load_model, load_with_flags  # noqa: PLC0415
    from model.teachers import teacher_path  # noqa: PLC0415

    named = parse_labelled(args.ckp_path)
    if not named:
        raise UserError("give the checkpoints to compare with --ckp_path LABEL=FILE+LABEL=FILE")
    nets = {}
    for label, name in named.items():
        path = teacher_path(name, args.scale, "--ckp_path")
        nets[label] = fuse(load_with_flags(path, args) if path == name else load_model(path))
    if len({net.scale for net in nets.values()}) > 1:
        scales = ", ".join(f"{label} x{net.scale}" for label, net in nets.items())
        raise UserError(f"--ckp_path: the checkpoints are for different scales, {scales}; compare those of one scale")
    baseline = baseline_of(next(iter(nets.values())).scale)
    if baseline in nets:
        raise UserError(f"--ckp_path {args.ckp_path}: the label {baseline} is in use for "
                        f"{'bicubic upscaling' if baseline == 'bicubic' else 'the input itself'}; give another label")
    return nets


def baseline_of(scale: int) -> str:
    """Return the label of the results without a network: bicubic upscaling, or at scale 1 the input."""
    return "bicubic" if scale > 1 else "input"


def picture(images: "Images", methods: dict[str, Callable], space: str, most: int = 4) -> bytes:
    """Draw crops of the results, and return a PNG file.

    images: a test set, of which the first `most` images are shown, one in a row. methods: {label: function that upscales an
    image}, a column each, with the PSNR. The crop is the one where the first of them has the largest error. space: y or rgb,
    that of the PSNR.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = []
    for index in range(min(most, len(images))):
        hr, lr = images.hr(index), images.lr(index)
        results = {label: upscale(lr) for label, upscale in methods.items()}
        inner = hardest(hr, next(iter(results.values())))
        rows.append([(images.pairs[index].name, hr[inner])] + [
            (f"{label} {crop_psnr(sr[inner], hr[inner], space):.2f} dB", sr[inner]) for label, sr in results.items()])
    figure = Figure(figsize=(2 * len(rows[0]), 2.15 * len(rows)), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, cells in zip(grid, rows):
        for axis, (title, crop) in zip(axes, cells):
            axis.imshow(crop, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    return to_png(figure)


def megapixels(images: "Images") -> float:
    """Return the mean number of pixels of the outputs, in millions."""
    return images.scale**2 * np.mean([images.lr(index)[..., 0].size for index in range(len(images))]) / 1e6


def draw_speed(rows: list[tuple[str, ...]]) -> bytes:
    """Draw PSNR against milliseconds per megapixel of output, and return a PNG file.

    rows: of the table. Each data set has a panel. A label may end in /GROUP, such as Compact_S/best: the networks of a group
    have one colour.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = {}
    for label, dataset, psnr, *_, milliseconds in rows:
        name, _, group = label.rpartition("/")
        points = panels.setdefault(dataset, {}).setdefault(group, [])
        points.append((float(milliseconds), float(psnr), name or label))
    figure = Figure(figsize=(5.5 * len(panels), 4), dpi=110, layout="constrained")
    for axis, (dataset, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for group, points in groups.items():
            axis.plot([point[0] for point in points], [point[1] for point in points], "o", label=group)
            for x, y, name in points:
                axis.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize="x-small")
        set_log_x(axis)
        axis.margins(0.15)
        axis.set_xlabel("milliseconds per megapixel of output")
        axis.set_ylabel("PSNR (dB)")
        axis.set_title(dataset, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower right")
    return to_png(figure)


def hardest(hr: np.ndarray, sr: np.ndarray, side: int = CROP) -> tuple[slice, slice]:
    """Return the slices of the side x side window, on a grid of half windows and at the ends, with the largest error."""
    error = ((hr.astype(float) - sr) ** 2).mean(2)
    ends = [max(size - side, 0) for size in error.shape]
    starts = [sorted({*range(0, end, max(side // 2, 1)), end}) for end in ends]
    top, left = max(((y, x) for y in starts[0] for x in starts[1]),
                    key=lambda at: error[at[0]:at[0] + side, at[1]:at[1] + side].mean())
    return np.s_[top:top + side, left:left + side]


def crop_psnr(sr: np.ndarray, hr: np.ndarray, space: str) -> float:
    """Return the PSNR in dB, on y or rgb, of a crop of H x W x 3 uint8 images."""
    from metric import psnr  # noqa: PLC0415 - imports scikit-image, which takes a second
    return psnr(np.ascontiguousarray(sr), np.ascontiguousarray(hr), 0, space)


if __name__ == "__main__":
    run_script(main)
