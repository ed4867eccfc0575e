"""Time and memory of this implementation against the reference implementations in reference/. Run from this folder.

python benchmark.py     python benchmark.py --only affinity+san_pooling --sizes 32+48+64 --repeats 9

Writes benchmark.csv and, drawn from its rows, benchmark.png. Those in figure/ are the result of
`bash scripts/benchmark.sh --output figure` on two otherwise idle CPU cores.
"""
import argparse
import csv
import io
import logging
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import option
from option_types import natural, parse_list, parse_numbers, positive, positive_number
from system.errors import UserError, writing
from system.signals import run_script

if TYPE_CHECKING:
    import torch

log = logging.getLogger("sr")
MIN_CPU_SHARE = 0.9  # of a core; below it, other processes have slowed the benchmark down
COLUMNS = ("comparison", "size", "setting", "runs", "reference_s", "ours_s", "speedup", "reference_MB", "ours_MB",
           "memory_ratio", "difference", "TFLOP/s", "fraction_of_peak")
WIDTHS = {"comparison": 14, "size": 5, "setting": 28}  # of the other columns: that of their names
NOTES = """\
reference_s, ours_s: median time in seconds of `runs` runs, in which the two implementations alternate.
speedup: reference_s / ours_s.
reference_MB, ours_MB: peak memory (10^6 bytes) of the tensors beyond inputs and weights, in the forward pass and, if
there is one, the backward pass, without workspaces inside kernels; on a GPU, the peak of PyTorch's allocator; for
`data`, the peak of Python and numpy without memory-mapped files.
memory_ratio: reference_MB / ours_MB.
difference: largest difference of the results, relative to the largest value; - where they are random or were not computed.
TFLOP/s: 10^12 operations of matrix products, convolutions and attention per second, of this implementation.
fraction_of_peak: these, divided by the FLOP/s of a large matrix product on this device."""


def main() -> int:
    """Measure the comparisons, print the table, and write it with its picture."""
    args = parse()
    from reference import COMPARISONS  # noqa: PLC0415 - after the flags: --help should not wait for torch
    from reference.measure import measure  # noqa: PLC0415
    from reference.plot import picture  # noqa: PLC0415
    from system.device import pick_device  # noqa: PLC0415
    from system.files import atomic_write  # noqa: PLC0415
    from system.flops import peak_flops  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415
    from system.memory_budget import installed_memory  # noqa: PLC0415

    start_logging()
    unknown = [name for name in args.only or () if name not in COMPARISONS]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there is no such comparison; choose from {', '.join(COMPARISONS)}")
    device = pick_device(args)
    folder = Path(args.output)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    limit = 1e9 * args.memory if args.memory else installed_memory(device) / 2
    log.info(describe(device))
    log.info(line(dict(zip(COLUMNS, COLUMNS))))
    rows, notes = [], [NOTES]
    start, cpu_start = time.perf_counter(), time.process_time()
    for name in args.only or COMPARISONS:
        make, sizes = COMPARISONS[name]
        for size in args.sizes or sizes:
            row, more = measure(name, size, make, device, args.repeats, limit)
            log.info(line(row))
            rows.append(row)
            notes += more
    notes += busy_note(device, start, cpu_start)
    kinds = ["float32", "bf16"] + ["TF32"] * (device.type == "cuda")
    notes.append("peak TFLOP/s: " + ", ".join(f"{peak_flops(kind, device) / 1e12:.3g} in {kind}" for kind in kinds))
    log.info("\n".join(notes))

    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    atomic_write(folder / "benchmark.csv", text.getvalue().encode())
    atomic_write(folder / "benchmark.png", picture(rows))
    log.info("table and picture: %s and benchmark.png", os.path.relpath(folder / "benchmark.csv"))
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = option.Parser(description="Compare time and peak memory with the reference implementations: a table, a CSV "
                                       "file and a picture.", allow_abbrev=False)
    parser.add_argument("--only", type=parse_list, help="comparisons, A+B (default: all of those in reference/)")
    parser.add_argument("--sizes", type=parse_numbers,
                        help="sides of the images or feature maps in pixels, A+B (default: each comparison's own)")
    parser.add_argument("--repeats", type=positive, default=5,
                        help="runs of each implementation (default: 5), fewer where they take long")
    parser.add_argument("--memory", type=positive_number,
                        help="GB; a reference implementation that needs more is not run (default: half of the device's)")
    parser.add_argument("--output", default=str(option.ROOT / "experiment" / "benchmark"),
                        help="folder for benchmark.csv and benchmark.png (default: experiment/benchmark)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--gpu_id", type=natural, default=0, help="index of the GPU (default: 0)")
    return parser.parse_args(argv)


def line(row: dict[str, str]) -> str:
    """Format a row of the table: text to the left, numbers to the right."""
    cells = ((row[name], WIDTHS.get(name, len(name)), "<" if name in ("comparison", "setting") else ">") for name in COLUMNS)
    return "  ".join(f"{cell:{align}{width}}" for cell, width, align in cells)


def busy_note(device: "torch.device", start: float, cpu_start: float) -> list[str]:
    """Return a note if other processes have slowed down this one on the CPU since start (wall time) and cpu_start."""
    share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    if device.type != "cpu" or share >= MIN_CPU_SHARE:
        return []
    return [f"busy machine: this process had {share:.0%} of one core; long runs were slowed down more"]


def describe(device: "torch.device") -> str:
    """Describe the device and the version of PyTorch."""
    import torch  # noqa: PLC0415

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, PyTorch {torch.__version__}"


if __name__ == "__main__":
    run_script(main)
