"""Tabulate the mean ± standard deviation over seeds of the runs of scripts/compare_methods.sh.

Reads the last epoch in FOLDER/METHOD_SEED/metrics.csv of each run. Writes FOLDER/methods.csv, the scores of each run, and
FOLDER/methods.md, the table. The standard deviation is that of a sample (n - 1); a single seed has none.
"""
import csv
import io
import logging
from pathlib import Path

import numpy as np

import option
from option_types import home_path
from system.errors import UserError
from system.signals import run_script

log = logging.getLogger("sr")
COLUMNS = "method", "seed", "dataset", "psnr", "ssim"
TITLES = "method", "dataset", "PSNR (dB)", "SSIM", "seeds"


def main() -> int:
    """Write and print the table, and return the exit status; raises UserError."""
    args = parse()
    rows = [row for method in args.methods for seed in args.seeds for row in last_scores(args.folder, method, seed)]
    from system.files import atomic_write  # noqa: PLC0415 - after the flags: --help and mistakes should not wait for torch
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((COLUMNS, *rows))
    atomic_write(args.folder / "methods.csv", text.getvalue().encode())
    table = to_markdown(rows)
    atomic_write(args.folder / "methods.md", f"{table}\n".encode())
    log.info(table)
    return 0


def parse(argv: list[str] | None = None):
    """Parse the flags."""
    parser = option.Parser(description="Tabulate the mean and standard deviation over seeds of the PSNR and SSIM of runs.",
                           allow_abbrev=False)
    parser.add_argument("folder", type=home_path, help="folder that contains the runs, METHOD_SEED each")
    parser.add_argument("--methods", nargs="+", required=True, help="names of the methods")
    parser.add_argument("--seeds", nargs="+", required=True, help="seeds of each method")
    return parser.parse_args(argv)


def last_scores(folder: Path, method: str, seed: str) -> list[tuple[str, ...]]:
    """Return a row of COLUMNS for each data set on which the last epoch of a run was tested; raises UserError."""
    path = folder / f"{method}_{seed}" / "metrics.csv"
    try:
        scores = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        rows = [(method, seed, row["dataset"], f"{float(row['psnr']):.4f}", f"{float(row['ssim']):.5f}")
                for row in scores if row["epoch"] == scores[-1]["epoch"]]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        rows = []
    if not rows:
        raise UserError(f"{path}: not there, or without the scores of a run; it needs --data_test with ground truth")
    return rows


def to_markdown(rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table of mean ± standard deviation and the number of seeds, a line per method and data set."""
    groups = {}
    for method, _, dataset, psnr, ssim in rows:
        groups.setdefault((method, dataset), []).append((float(psnr), float(ssim)))
    cells = [TITLES]
    for names, scores in groups.items():
        psnr, ssim = zip(*scores)
        cells.append((*names, mean_and_deviation(psnr, 3), mean_and_deviation(ssim, 4), str(len(scores))))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def mean_and_deviation(values: tuple[float, ...], digits: int) -> str:
    """Return 'mean ± sample standard deviation', or the value alone of a single one."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    run_script(main)
