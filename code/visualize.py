"""Draw the errors and the feature affinities of students and their teacher on an image. Run from this folder.

python visualize.py --ckp_path FILE --teacher RCAN --scale 2 --data_test Set5 --image butterfly --dir_data DATA_ROOT

The picture shows, for a crop around a pixel: (a) the results, and their absolute errors on Y; (b) the cosine similarity of
the feature vector at that pixel and those at all others, of teacher and students; (c) the spatial affinity matrix of FAKD
(He et al., ICIP 2020), the cosine similarities of all pairs of positions, here of those on a grid. The last rows are the
absolute differences from the teacher; SA is their mean over all pairs of positions of the crop, the term of that name.
"""
import logging
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import compare
import option
from plotting import to_png
from system.errors import UserError, writing
from system.signals import run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from torch import Tensor, nn

    from data import Images

log = logging.getLogger("sr")
CROP = 96  # HR pixels a side
SMALLEST, LARGEST = 8, 256  # LR pixels a side: the mean over all pairs takes a time that grows with the fourth power
CONTEXT = 128  # LR pixels around the crop that networks with global operations process as well
GRID = 12  # positions along each side of the crop whose affinity matrix is drawn
PANEL = 1.3  # inches
DPI = 110
LABEL = 20  # letters that fit beside a panel
MARK = "lime"  # visible on photos and on both colour maps


@dataclass
class Crop:
    """LR rows and columns of a crop, and the LR row and column of the marked pixel."""

    box: tuple[slice, slice]
    point: tuple[int, int]
    scale: int

    def surroundings(self, shape: tuple[int, ...], pad: int, align: int = 1) -> tuple[slice, slice]:
        """Return the LR rows and columns within `pad` pixels of the crop; they start at multiples of `align`."""
        return tuple(slice(max(side.start - pad, 0) // align * align, min(side.stop + pad, size))
                     for side, size in zip(self.box, shape))

    def cut(self, image: np.ndarray, within: tuple[slice, slice] = (slice(0, None), slice(0, None))) -> np.ndarray:
        """Cut the crop out of an HR-sized image, or out of the part of one that shows the LR rows and columns `within`."""
        return image[tuple(slice((side.start - outer.start) * self.scale, (side.stop - outer.start) * self.scale)
                           for side, outer in zip(self.box, within))]

    def corner_to_point(self) -> tuple[int, int]:
        """Return the LR row and column of the marked pixel within the crop."""
        return tuple(at - side.start for at, side in zip(self.point, self.box))


def main() -> int:
    """Draw the picture that the flags describe, and return the exit status; raises UserError."""
    args = option.parse(training=False)
    from data import degrade, make_benchmarks  # noqa: PLC0415 - after the flags: --help should not wait for torch
    from model.roles import make_teachers  # noqa: PLC0415
    from system.device import pick_device  # noqa: PLC0415
    from system.files import atomic_write  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    if len(args.teacher) > 1:
        raise UserError(f"--teacher [{','.join(args.teacher)}]: give one teacher")
    nets = compare.load(args)
    if "teacher" in nets:
        raise UserError(f"--ckp_path {args.ckp_path}: the label teacher is in use for --teacher; give another label")
    args.scale = next(iter(nets.values())).scale
    nets["teacher"] = make_teachers(args)[0]
    if args.self_ensemble:
        log.info("--self_ensemble has no effect: the feature maps are those of one forward pass")
    folder = option.ROOT / "experiment" / args.ckp_dir
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    images, index = find_image(make_benchmarks(args), args.image)
    lr, hr, name = images.lr(index), images.hr(index), images.pairs[index].name
    if hr is None:
        raise UserError(f"{images.name} has no HR images to compare with")
    crop = choose_crop(lr, hr, name, args)

    device = pick_device(args)
    within = crop.surroundings(lr.shape, degrade.MARGIN)
    results = {compare.baseline_of(args.scale): crop.cut(degrade.upscale(lr[within], args.scale), within)}
    features = {}
    for label, net in nets.items():
        results[label], features[label] = run(net.eval().to(device), lr, crop, args, label)
    path = folder / f"visualize_{name}.png"
    atomic_write(path, draw(hr, crop, results, features, args.metric_space))
    x, y = crop.point[1] * crop.scale, crop.point[0] * crop.scale
    log.info("%s, point %d,%d: %s", name, x, y, os.path.relpath(path))
    return 0


def find_image(benchmarks: list["Images"], name: str | None) -> tuple["Images", int]:
    """Return the first test set with an image of that name, by default its first image, and the number of the image."""
    names = [pair.name for images in benchmarks for pair in images.pairs]
    for images in benchmarks:
        for index, pair in enumerate(images.pairs):
            if name in (None, pair.name):
                return images, index
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise UserError(f"--image {name}: not in {'+'.join(images.name for images in benchmarks)}, which contain {some}")


def choose_crop(lr: np.ndarray, hr: np.ndarray, name: str, args: Namespace) -> Crop:
    """Return the crop of --crop around --point, moved into the image; raises UserError.

    lr, hr: uint8 H x W x 3 and sH x sW x 3. Without --point it is centred on the strongest edge of the window in which
    bicubic upscaling, at scale 1 the input, has the largest squared error.
    """
    from data import degrade  # noqa: PLC0415
    from metric import rgb_to_y  # noqa: PLC0415

    side = (args.crop or CROP) // args.scale
    if not SMALLEST <= side <= LARGEST:
        raise UserError(f"--crop {args.crop}: at scale {args.scale} a crop has {SMALLEST * args.scale} to "
                        f"{LARGEST * args.scale} pixels a side")
    sides = [min(side, size) for size in lr.shape[:2]]
    if args.point:
        x, y = args.point
        if y >= hr.shape[0] or x >= hr.shape[1]:
            raise UserError(f"--point {x},{y}: outside of {name}, which has {hr.shape[1]} x {hr.shape[0]} pixels")
        point = y // args.scale, x // args.scale
    else:
        hardest = compare.hardest(hr, degrade.upscale(lr, args.scale), side * args.scale)
        starts = [part.start // args.scale for part in hardest]
        # not near the border of the window, so that there are pixels around it
        window = tuple(slice(start + side // 4, start + side - side // 4) for start, side in zip(starts, sides))
        edges = np.hypot(*np.gradient(rgb_to_y(lr[window])))
        point = tuple(int(at) + part.start for at, part in zip(np.unravel_index(edges.argmax(), edges.shape), window))
    starts = [min(max(at - side // 2, 0), size - side) for at, side, size in zip(point, sides, lr.shape)]
    return Crop(tuple(slice(start, start + side) for start, side in zip(starts, sides)), point, args.scale)


def run(net: "nn.Module", lr: np.ndarray, crop: Crop, args: Namespace, label: str) -> tuple[np.ndarray, dict[int, "Tensor"]]:
    """Apply a network to the crop and the pixels around it, and return its SR crop and feature maps 1 x C x h x w.

    The pixels around it are those of the receptive field. Networks with global operations get CONTEXT pixels, or with --chop
    the overlap of tiles. Raises UserError where an output is not finite, or a feature map does not have the size of LR.
    """
    import torch  # noqa: PLC0415

    import inference  # noqa: PLC0415
    from system.device import autocast  # noqa: PLC0415

    pad = net.receptive_field or (inference.GLOBAL_TILE_PAD if args.chop else CONTEXT)
    within = crop.surroundings(lr.shape, pad, net.window)
    device = next(net.parameters()).device
    x = torch.from_numpy(np.array(lr[within])).permute(2, 0, 1)[None].to(device).float() * (net.rgb_range / 255)
    with torch.no_grad(), autocast(device, args.precision):
        sr, feature_maps = net(x, features=True)
    picked = {}
    for index in args.features:
        if index >= len(feature_maps) or feature_maps[index].shape[2:] != x.shape[2:]:
            raise UserError(f"{label}: {type(net).__name__} has no feature map {index} of the size of LR, which an affinity "
                            "needs; give other --features")
        rows, columns = (slice(side.start - outer.start, side.stop - outer.start) for side, outer in zip(crop.box, within))
        picked[index] = feature_maps[index][..., rows, columns].float().cpu()
    if not all(tensor.isfinite().all() for tensor in (sr, *picked.values())):
        raise UserError(f"the output or a feature map of {label} is NaN or infinite in --precision {args.precision}; "
                        "give another precision, or another checkpoint")
    return crop.cut(inference.to_image(sr, net.rgb_range), within), picked


def draw(hr: np.ndarray, crop: Crop, results: dict[str, np.ndarray], features: dict[str, dict[int, "Tensor"]],
         space: str) -> bytes:
    """Draw results, errors and affinities, and return a PNG file.

    hr: the whole image, uint8. results: {label: SR crop}. features: {label: {index: feature map 1 x C x h x w}}, where
    one label is "teacher". space: y or rgb, that of the PSNR.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    students, indices = len(features) - 1, len(features["teacher"])
    width = PANEL * max(len(results) + 1, 2 * indices)
    heights = 2 * width / (len(results) + 1) + 0.7, (1 + 2 * students) * width / (2 * indices) + 0.7
    figure = Figure(figsize=(width + 0.8, sum(heights)), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.02)
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    draw_errors(upper, hr, crop, results, space)
    draw_affinities(lower, crop, features)
    return to_png(figure)


def draw_errors(figure: "Figure", hr: np.ndarray, crop: Crop, results: dict[str, np.ndarray], space: str) -> None:
    """Draw the image with the crop, the crop of HR, and for each result its crop and |SR - HR| on Y with the PSNR below.

    space: y or rgb, that of the PSNR.
    """
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    from metric import rgb_to_y  # noqa: PLC0415

    truth = crop.cut(hr)
    errors = {label: np.abs(rgb_to_y(sr) - rgb_to_y(truth)) for label, sr in results.items()}
    limit = max(1, np.percentile(np.stack(list(errors.values())), 99.5))
    figure.suptitle("(a) results and absolute errors |SR - HR| on Y", fontsize=9)
    grid = figure.subplots(2, len(results) + 1)
    (first, *above), (overview, *below) = grid
    show(first, truth, "HR")
    mark(first, crop, crop.scale)
    show(overview, hr, interpolation="auto")
    top, left = (side.start * crop.scale for side in crop.box)
    overview.add_patch(Rectangle((left, top), truth.shape[1], truth.shape[0], fill=False, edgecolor=MARK, linewidth=1.5))
    for upper, lower, (label, sr) in zip(above, below, results.items()):
        show(upper, sr, text_of(label))
        drawn = show(lower, errors[label], cmap="magma", vmin=0, vmax=limit)
        lower.set_xlabel(f"{compare.crop_psnr(sr, truth, space):.2f} dB", fontsize=8)
    add_bar(figure, drawn, grid, "max", shrink=0.45, anchor=(0, 0.05))


def draw_affinities(figure: "Figure", crop: Crop, features: dict[str, dict[int, "Tensor"]]) -> None:
    """Draw the affinity of the marked pixel to the others, and the affinity matrix, of each network and feature map."""
    import torch  # noqa: PLC0415

    from loss.affinity import affinity_l1  # noqa: PLC0415

    y, x = crop.corner_to_point()
    points, matrices, distances = {}, {}, {}
    for label, feature_maps in features.items():
        for index, feature_map in feature_maps.items():
            unit = torch.nn.functional.normalize(feature_map[0], dim=0)
            points[label, index] = torch.einsum("c,chw->hw", unit[:, y, x], unit).numpy()
            rows, columns = (torch.linspace(0, size - 1, min(size, GRID)).round().long() for size in unit.shape[1:])
            vectors = unit[:, rows][:, :, columns].flatten(1)
            matrices[label, index] = (vectors.T @ vectors).numpy()
            distances[label, index] = affinity_l1(feature_map, features["teacher"][index]).item()
    students = [label for label in features if label != "teacher"]
    indices = list(features["teacher"])
    differences = [{(label, index): np.abs(kind[label, index] - kind["teacher", index]) for label in students
                    for index in indices} for kind in (points, matrices)]
    limit = np.percentile(np.concatenate([value.ravel() for kind in differences for value in kind.values()]), 99.5)

    titles = "(b) affinity of the marked pixel", "(c) spatial affinity matrix"
    halves = figure.subfigures(1, 2, width_ratios=(1, 1.13))
    for half, kind, difference, title in zip(halves, (points, matrices), differences, titles):
        half.suptitle(title, fontsize=9)
        grid = half.subplots(1 + 2 * len(students), len(indices), squeeze=False)
        for row, label in zip(grid, ("teacher", *students, *students)):
            row[0].set_ylabel(text_of(label), fontsize=8)
        for row, label in zip(grid, ("teacher", *students)):
            drawn = [show(axis, kind[label, index], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="auto")
                     for axis, index in zip(row, indices)]
        for row, label in zip(grid[1 + len(students):], students):
            row[0].set_ylabel(f"|{text_of(label)}\n- teacher|", fontsize=8)
            lower = [show(axis, difference[label, index], cmap="magma", vmin=0, vmax=limit or 1, interpolation="auto")
                     for axis, index in zip(row, indices)]
            for axis, index in zip(row, indices):
                if kind is matrices:
                    axis.set_xlabel(f"SA {distances[label, index]:.3f}", fontsize=8)
        for axis, index in zip(grid[0], indices):
            axis.set_title(f"feature map {index}", fontsize=8)
        for axis in grid.ravel() if kind is points else ():
            mark(axis, crop)
    add_bar(half, drawn[0], grid[:1 + len(students)], "neither")
    add_bar(half, lower[0], grid[1 + len(students):], "max")


def text_of(label: str) -> str:
    """Return a label, or the end of a long one, without the dollar signs that start mathematical text in matplotlib."""
    return (label if len(label) <= LABEL else "..." + label[3 - LABEL:]).replace("$", r"\$")


def show(axis: "Axes", image: np.ndarray, title: str = "", **settings) -> "AxesImage":
    """Draw an image without ticks."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=8)
    return axis.imshow(image, **{"interpolation": "nearest", **settings})


def mark(axis: "Axes", crop: Crop, scale: int = 1) -> None:
    """Mark the centre of the chosen LR pixel on a crop whose pixels are `scale` times smaller."""
    y, x = ((at + 0.5) * scale - 0.5 for at in crop.corner_to_point())
    axis.plot(x, y, marker="o", markersize=5, markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=1.2)


def add_bar(figure: "Figure", drawn: "AxesImage", axes: np.ndarray, extend: str, **place) -> None:
    """Add the colour bar of several panels at their right."""
    figure.colorbar(drawn, ax=axes, extend=extend, aspect=15, pad=0.02, **place).ax.tick_params(labelsize=7)


if __name__ == "__main__":
    run_script(main)
