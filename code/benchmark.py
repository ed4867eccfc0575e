"""Time and memory of what this project computes its own way, against plain.py's plain references. Run from this folder.

python benchmark.py     python benchmark.py --only affinity+san_pooling --sizes 32+48+64 --repeats 9
"""
import csv
import io
import logging
import os
import platform
import statistics
import time

import option
from error import UserError, run

log = logging.getLogger("sr")
PATIENCE = 30  # seconds after which a row's rounds are not repeated any more
BUSY = 0.9  # of a core
COLUMNS = "comparison", "size", "of", "runs", "plain_s", "ours_s", "faster", "plain_MB", "ours_MB", "leaner", "difference"
WIDTHS = 13, 6, 22, 6, 10, 10, 9, 11, 10, 9, 12
NOTES = """\
plain_s, ours_s: median of `runs` that alternate. MB (10^6 bytes): of the tensors alive at once beyond inputs and weights,
forward and, where there is one, backward; counted as they are made, without what kernels need inside; on a GPU the most that
its allocator gave out. faster, leaner: plain / ours. difference: the largest, in parts of the largest value."""


def main():
    args = parse()
    from checkpoint import start_logging, write_whole  # noqa: PLC0415 - after the flags: --help should not wait for torch
    from device import pick_device  # noqa: PLC0415
    from plain import COMPARISONS  # noqa: PLC0415

    start_logging()
    unknown = [name for name in args.only or () if name not in COMPARISONS]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there are {', '.join(COMPARISONS)}")
    device = pick_device(args)
    limit = 1e9 * args.memory if args.memory else installed_memory(device) / 2
    log.info(describe(device))
    show(COLUMNS)
    rows, notes = [], [NOTES]
    start, used = time.perf_counter(), time.process_time()
    for name in args.only or COMPARISONS:
        compare, sizes = COMPARISONS[name]
        for size in args.sizes or sizes:
            rows.append(measure(name, size, compare, device, args.repeats, limit))
            show(rows[-1])
            if rows[-1][4] == "-":
                notes.append(f"{name} {size}: the plain way would take more than {limit / 1e6:,.0f} MB (--memory) and was "
                             "not run; its MB are worked out from shapes")
    share = (time.process_time() - used) / (time.perf_counter() - start)
    if device.type == "cpu" and share < BUSY:
        notes.append(f"busy machine: this process had {share:.0%} of one core; short runs look better than they are")
    log.info("\n".join(notes))

    folder = option.ROOT / "experiment" / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((COLUMNS, *rows))
    write_whole(folder / "benchmark.csv", text.getvalue().encode())
    write_whole(folder / "benchmark.png", picture(rows))
    log.info("table and picture: %s and benchmark.png", os.path.relpath(folder / "benchmark.csv"))
    return 0


def parse(argv=None):
    parser = option.Parser(description="Time and peak memory against plain references: a table, CSV and picture in "
                                       "experiment/benchmark/.", allow_abbrev=False)
    parser.add_argument("--only", type=option.parse_list, help="comparisons, A+B (default: all of those in plain.py)")
    parser.add_argument("--sizes", type=option.parse_numbers, help="pixels a side, A+B (default: each comparison's own)")
    parser.add_argument("--repeats", type=option.positive, default=5,
                        help=f"rounds of plain and ours (default: 5); none begins after {PATIENCE} seconds")
    parser.add_argument("--memory", type=option.positive_number,
                        help="GB: a plain way that takes more is not run (default: half of the device's)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--gpu_id", type=option.natural, default=0, help="which GPU to use (default: 0)")
    return parser.parse_args(argv)


def show(cells):
    log.info("".join(f"{cell:<{width}}" if k in (0, 2) else f"{cell:>{width - 2}}  "
                     for k, (cell, width) in enumerate(zip(cells, WIDTHS))).rstrip())


def describe(device):
    import torch  # noqa: PLC0415

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, PyTorch {torch.__version__}"


def installed_memory(device):
    """Bytes of the machine, or of its GPU."""
    import torch  # noqa: PLC0415

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(name, size, compare, device, repeats, limit):
    """A row of the table; raises AssertionError where plain and ours disagree."""
    import torch  # noqa: PLC0415

    from memory import memory_from_shapes, peak_memory  # noqa: PLC0415

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits would drown differences
    pair = compare(size, device)
    plain_memory, error = memory_from_shapes(pair.plain), None
    result, memory = peak_memory(pair.ours, device)  # the first run, which its time should not show
    ways = [pair.ours]
    if plain_memory <= limit:
        expected, plain_memory = peak_memory(pair.plain, device)
        error = difference(result, expected)
        assert error <= pair.tolerance, f"{name} {size}: plain and ours differ by {error:.1e} of the largest value"
        ways.insert(0, pair.plain)
        del expected
    del result

    start, rounds = time.perf_counter(), []
    while not rounds or (len(rounds) < repeats and time.perf_counter() - start < PATIENCE):
        rounds.append([seconds(way, device) for way in ways])
    *plain, ours = map(statistics.median, zip(*rounds))
    return (name, f"{size}", pair.what, f"{len(rounds)}", f"{plain[0]:.4g}" if plain else "-", f"{ours:.4g}",
            f"{plain[0] / ours:.2f}" if plain else "-", f"{plain_memory / 1e6:.1f}", f"{memory / 1e6:.1f}",
            f"{plain_memory / memory:.2f}", f"{error:.1e}" if plain else "-")


def seconds(way, device):
    import torch  # noqa: PLC0415

    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    way()
    wait()
    return time.perf_counter() - start


def difference(ours, plain):
    """The largest over pairs of tensors of max |ours - plain| / max |plain|; NaN counts as infinite."""
    return max(((a - b).abs().max() / b.abs().max()).nan_to_num(nan=float("inf")).item() for a, b in zip(ours, plain))


def picture(rows):
    """PNG bytes: time and memory of each comparison against size, plain and ours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = list(dict.fromkeys(row[0] for row in rows))
    figure = Figure(figsize=(3 * len(names), 5.4), dpi=110, layout="constrained")
    for column, name in zip(figure.subplots(2, len(names), squeeze=False, sharex="col").T, names):
        lines = [dict(zip(COLUMNS, row)) for row in rows if row[0] == name]
        for axis, unit in zip(column, ("s", "MB")):
            for way in ("plain", "ours"):
                known = [line for line in lines if line[f"{way}_{unit}"] != "-"]
                axis.plot([int(line["size"]) for line in known], [float(line[f"{way}_{unit}"]) for line in known], "o-",
                          label=way)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylabel(unit)
            axis.grid(alpha=0.3)
        column[0].set_title(name)
        sizes = sorted({int(line["size"]) for line in lines})
        column[1].set_xticks(sizes, map(str, sizes))
        column[1].set_xticks([], minor=True)
        column[1].set_xlabel("pixels a side")
        column[0].legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    run(main)
