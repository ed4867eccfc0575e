"""Tabulate the scores over seeds of the runs of scripts/compare_methods.sh, and draw them.

Reads the last epoch of each run FOLDER/METHOD_SEED, and the scores of the teacher and of bicubic upscaling (at scale 1: of
the input) in FOLDER/compare.csv. Writes to FOLDER:

methods.csv: the scores and the training time of each run. methods.md: mean ± standard deviation over seeds, that of a sample
(n - 1); a single seed has none. The last column is the mean difference to the best method on that data set with its 95 %
confidence interval, by a bootstrap of 10,000 samples of the seeds and of the images, the same ones for both methods.
methods_gap.png: the part of the teacher's gain over bicubic that each method reaches. methods_time.png: PSNR against the
training time.
"""
import csv
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

import option
from option_types import home_path, positive_number
from plotting import set_log_x, to_png
from system.errors import UserError
from system.signals import run_script

log = logging.getLogger("sr")
COLUMNS = "method", "seed", "dataset", "psnr", "ssim", "seconds"
TITLES = "method", "dataset", "PSNR (dB)", "SSIM", "seeds", "training (min)", "difference to the best (dB) [95 %]"
RESAMPLES = 10_000


class Run(NamedTuple):
    """The last test of a run on one data set; `images`: the PSNR of each image; `seconds`: the time of the training."""

    method: str
    seed: str
    dataset: str
    psnr: float
    ssim: float
    seconds: float
    images: dict[str, float]


class Ends(NamedTuple):
    """The PSNR of the teacher on a data set, and of bicubic upscaling, or at scale 1 of the input, with its label."""

    label: str
    baseline: float
    teacher: float


def main() -> int:
    """Write and print the table, or print a number of iterations, and return the exit status; raises UserError."""
    args = parse()
    from checkpoint import write_table  # noqa: PLC0415 - after the flags: --help and mistakes should not wait for torch
    from system.files import atomic_write  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    if args.iterations_in:
        log.info("%d", 60 * args.iterations_in / seconds_per_iteration(args.folder))
        return 0
    runs = [run for method in args.methods for seed in args.seeds for run in last_test(args.folder, method, seed)]
    ends = read_ends(args.folder / "compare.csv")
    rows = [(run.method, run.seed, run.dataset, f"{run.psnr:.4f}", f"{run.ssim:.5f}", f"{run.seconds:.1f}") for run in runs]
    write_table(args.folder / "methods.csv", [dict(zip(COLUMNS, row)) for row in rows])
    table = to_markdown(runs, args.random_features)
    atomic_write(args.folder / "methods.md", f"{table}\n".encode())
    log.info(table)
    for name, draw in (("methods_gap.png", draw_gaps), ("methods_time.png", draw_times)):
        atomic_write(args.folder / name, draw(runs, ends))
    return 0


def parse(argv: list[str] | None = None):
    """Parse the flags."""
    parser = option.Parser(description="Tabulate and draw the mean and standard deviation over seeds of the PSNR and SSIM "
                                       "of runs.", allow_abbrev=False)
    parser.add_argument("folder", type=home_path, help="folder that contains the runs, METHOD_SEED each")
    parser.add_argument("--methods", nargs="+", default=[], help="names of the methods")
    parser.add_argument("--seeds", nargs="+", default=[], help="seeds of each method")
    parser.add_argument("--random_features", nargs="*", default=[], help="methods whose feature network was a random one")
    parser.add_argument("--iterations_in", type=positive_number, metavar="MINUTES",
                        help="print only how many iterations the run in `folder` would do in this time")
    args = parser.parse_args(argv)
    if not args.iterations_in and not (args.methods and args.seeds):
        parser.error("give --methods and --seeds, or --iterations_in")
    return args


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV file of a run; raises UserError where it is not there, is empty, or lacks a column or a cell."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, ValueError, csv.Error):
        rows = []
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise UserError(f"{path}: not there, or without the scores of a run; it needs --data_test with ground truth")
    return rows


def last_test(folder: Path, method: str, seed: str) -> list[Run]:
    """Return a Run for each data set on which the last epoch of a run was tested; raises UserError."""
    path = folder / f"{method}_{seed}"
    scores = read_rows(path / "metrics.csv", ("epoch", "dataset", "psnr", "ssim"))
    images = read_rows(path / "images.csv", ("checkpoint", "dataset", "image", "psnr"))
    seconds = read_rows(path / "time.csv", ("seconds",))
    try:
        return [Run(method, seed, row["dataset"], float(row["psnr"]), float(row["ssim"]), float(seconds[-1]["seconds"]),
                    {image["image"]: float(image["psnr"]) for image in images
                     if image["checkpoint"] == "model_latest.pt" and image["dataset"] == row["dataset"]})
                for row in scores if row["epoch"] == scores[-1]["epoch"]]
    except ValueError as error:
        raise UserError(f"{path}: a score of the run is no number ({error})") from None


def read_ends(path: Path) -> dict[str, Ends]:
    """Return {data set: scores of the teacher and of what it improves} from the compare.csv of compare.py."""
    scores = {}
    for row in read_rows(path, ("network", "dataset", "psnr")):
        scores.setdefault(row["dataset"].rpartition(" x")[0], {})[row["network"]] = float(row["psnr"])
    return {dataset: Ends(*next(iter(psnrs.items())), psnrs["teacher"]) for dataset, psnrs in scores.items()}


def seconds_per_iteration(folder: Path) -> float:
    """Return the time of an iteration in the fastest epoch but the first of a run."""
    rows = read_rows(folder / "time.csv", ("iteration", "seconds"))
    points = [(int(row["iteration"]), float(row["seconds"])) for row in rows]
    if len(points) < 2:
        raise UserError(f"{folder / 'time.csv'}: a single epoch; the time of an iteration needs two or more")
    return min((seconds - before) / (iteration - start) for (start, before), (iteration, seconds) in pairwise(points))


def grouped(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return {data set: {method: runs}}, in the order of the methods."""
    groups = {}
    for run in runs:
        groups.setdefault(run.dataset, {}).setdefault(run.method, []).append(run)
    return groups


def to_markdown(runs: Sequence[Run], random_features: Sequence[str] = ()) -> str:
    """Return a Markdown table, a line for each data set and method, best first, with TITLES as its head."""
    cells = [TITLES]
    for dataset, methods in grouped(runs).items():
        ranked = sorted(methods, key=lambda method: -np.nan_to_num(np.mean([run.psnr for run in methods[method]])))
        for method in ranked:
            label = f"{method} (random features)" if method in random_features else method
            found = methods[method]
            difference = "-" if method == ranked[0] else bootstrap(found, methods[ranked[0]])
            cells.append((label, dataset, mean_and_deviation([run.psnr for run in found], 3),
                          mean_and_deviation([run.ssim for run in found], 4), str(len(found)),
                          f"{np.mean([run.seconds for run in found]) / 60:.1f}", difference))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def bootstrap(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """Return the mean difference in PSNR of the first runs to the others, with its 95 % confidence interval.

    Seeds and images are drawn with replacement, the same ones for both, as both have the same seeds and images.
    """
    names = sorted(runs[0].images)
    difference = np.array([[run.images[name] - other.images[name] for name in names] for run, other in zip(runs, others)])
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(difference), size=(RESAMPLES, len(difference), 1))
    images = rng.integers(len(names), size=(RESAMPLES, 1, len(names)))
    low, high = np.quantile(difference[seeds, images].mean((1, 2)), [0.025, 0.975])
    return f"{difference.mean():.3f} [{low:.3f}, {high:.3f}]"


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return 'mean ± sample standard deviation', or the value alone of a single one."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def draw_gaps(runs: Sequence[Run], ends: dict[str, Ends]) -> bytes:
    """Draw the part of the teacher's gain that each method reaches, and return a PNG file."""
    groups = grouped(runs)
    figure, axes = panels(len(groups))
    for axis, (dataset, methods) in zip(axes, groups.items()):
        label, baseline, teacher = ends[dataset]
        parts = [[100 * (run.psnr - baseline) / (teacher - baseline) for run in found] for found in methods.values()]
        means = [np.mean(values) for values in parts]
        axis.barh(range(len(means)), means, xerr=[deviation(values) for values in parts], color="C0", capsize=3)
        axis.set_yticks(range(len(means)), methods)
        axis.invert_yaxis()
        axis.set_xlim(min(means) - 8, max(means) + 8)  # bars from 0 would hide what differs
        axis.set_xlabel(f"part of the teacher's gain over {label} (%)")
        axis.set_title(f"{dataset}: {label} {baseline:.2f} dB, teacher {teacher:.2f} dB", fontsize="medium")
        axis.grid(axis="x", alpha=0.3)
    return to_png(figure)


def draw_times(runs: Sequence[Run], ends: dict[str, Ends]) -> bytes:
    """Draw PSNR against the training time, a point with a standard deviation for each method; return a PNG file."""
    groups = grouped(runs)
    figure, axes = panels(len(groups))
    for axis, (dataset, methods) in zip(axes, groups.items()):
        for number, (method, found) in enumerate(methods.items()):
            minutes, psnrs = np.mean([run.seconds for run in found]) / 60, [run.psnr for run in found]
            axis.errorbar(minutes, np.mean(psnrs), deviation(psnrs), fmt="o", capsize=3, color=f"C{number}")
            axis.annotate(method, (minutes, np.mean(psnrs)), xytext=(6, 4), textcoords="offset points", fontsize="small")
        set_log_x(axis)  # methods differ by more than ten times
        axis.margins(x=0.2)
        axis.set_xlabel("training time (min)")
        axis.set_ylabel("PSNR (dB)")
        axis.set_title(f"{dataset}: teacher {ends[dataset].teacher:.2f} dB", fontsize="medium")
        axis.grid(alpha=0.3)
    return to_png(figure)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation, 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def panels(count: int):
    """Return a figure with panels side by side, and their axes."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5 * count, 3.6), dpi=110, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


if __name__ == "__main__":
    run_script(main)
