"""Time and memory of what this project computes its own way, against the plain ways of plain/. Run from this folder.

python benchmark.py     python benchmark.py --only affinity+san_pooling --sizes 32+48+64 --repeats 9

figure/benchmark.png is the picture of a whole run on two cores: how cost grows.
"""
import csv
import io
import logging
import os
import platform
import statistics
import time
from contextlib import closing

import option
from system.errors import UserError, run, writing

log = logging.getLogger("sr")
PATIENCE = 30  # seconds after which a row's rounds are not repeated any more
BUSY = 0.9  # of a core
ACROSS = 5  # pairs of panels beside each other in the picture
COLUMNS = ("comparison", "size", "of", "runs", "plain_s", "ours_s", "faster", "plain_MB", "ours_MB", "leaner", "difference",
           "TFLOP/s", "of_ceiling")
WIDTHS = 15, 6, 30, 6, 10, 10, 9, 11, 10, 9, 12, 9, 12
NOTES = """\
plain_s, ours_s: median of `runs` that alternate. MB (10^6 bytes): of the tensors alive at once beyond inputs and weights,
forward and, where there is one, backward; counted as they are made, without what kernels need inside; on a GPU the most that
its allocator gave out; for `data` of arrays, without files in memory. faster, leaner: plain / ours. difference: the largest,
in parts of the largest value; - where the ways draw or approximate differently. TFLOP/s: 10^12 operations of products,
convolutions and attention a second, ours; of_ceiling: in parts of what a large matrix product reaches here."""


def main():
    args = parse()
    from reference import COMPARISONS  # noqa: PLC0415
    from system.device import pick_device  # noqa: PLC0415
    from system.files import atomic_write  # noqa: PLC0415 - after the flags: --help should not wait for torch
    from system.flops import ceiling  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415

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
            row, remarks = measure(name, size, compare, device, args.repeats, limit)
            show(row)
            rows.append(row)
            notes += remarks
    share = (time.process_time() - used) / (time.perf_counter() - start)
    if device.type == "cpu" and share < BUSY:
        notes.append(f"busy machine: this process had {share:.0%} of one core; short runs look better than they are")
    kinds = ["float32", "bf16"] + ["TF32"] * (device.type == "cuda")
    notes.append("ceilings, TFLOP/s: " + ", ".join(f"{ceiling(kind, device) / 1e12:.3g} in {kind}" for kind in kinds))
    log.info("\n".join(notes))

    folder = option.ROOT / "experiment" / "benchmark"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((COLUMNS, *rows))
    atomic_write(folder / "benchmark.csv", text.getvalue().encode())
    atomic_write(folder / "benchmark.png", picture(rows))
    log.info("table and picture: %s and benchmark.png", os.path.relpath(folder / "benchmark.csv"))
    return 0


def parse(argv=None):
    parser = option.Parser(description="Time and peak memory against plain references: a table, CSV and picture in "
                                       "experiment/benchmark/.", allow_abbrev=False)
    parser.add_argument("--only", type=option.parse_list, help="comparisons, A+B (default: all of those in plain/)")
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
    """-> (a row of the table, remarks on it); raises AssertionError where plain and ours disagree."""
    import torch  # noqa: PLC0415
    from system.flops import ceiling, counter  # noqa: PLC0415
    from system.memory import memory_from_shapes  # noqa: PLC0415

    torch.manual_seed(0)
    remarks, error = [], None
    with closing(compare(size, device)) as pair:
        torch.backends.cudnn.allow_tf32 = False  # its 10 bits would drown differences
        with counter() as flops:
            result, memory = pair.peak(pair.ours, device)  # the first run, which its time should not show
        right = pair.right or pair.plain
        needed = {way: memory_from_shapes(way) if pair.from_shapes else 0 for way in (pair.plain, right)}
        found = {way: pair.peak(way, device) for way, most in needed.items() if most <= limit}
        if pair.tolerance is not None and right in found:
            error = difference(result, found[right][0])
            assert error <= pair.tolerance, f"{name} {size}: plain and ours differ by {error:.1e} of the largest value"
        if pair.remark and len(found) == len(needed):
            remarks.append(f"{name} {size}: {pair.remark(found[pair.plain], found[right])}")
        ways, plain_memory = [pair.plain, pair.ours], found.get(pair.plain, (None, needed[pair.plain]))[1]
        if pair.plain not in found:
            ways = [pair.ours]
            remarks.append(f"{name} {size}: the plain way would take more than {limit / 1e6:,.0f} MB (--memory) and was not "
                           "run; its MB are worked out from shapes")
        del result, found
        torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it, and so training
        rounds = alternate(ways, device, repeats)
    *plain, ours = map(statistics.median, zip(*rounds))
    rate = flops.get_total_flops() / ours
    return (name, f"{size}", pair.what, f"{len(rounds)}", f"{plain[0]:.4g}" if plain else "-", f"{ours:.4g}",
            f"{plain[0] / ours:.2f}" if plain else "-", f"{plain_memory / 1e6:.1f}", f"{memory / 1e6:.1f}",
            f"{plain_memory / memory:.2f}", "-" if error is None else f"{error:.1e}", f"{rate / 1e12:.3g}" if rate else "-",
            f"{rate / ceiling(pair.arithmetic, device):.2f}" if rate else "-"), remarks


def alternate(ways, device, repeats):
    """[[seconds of each way] of each round]; no round begins after PATIENCE seconds but the first."""
    from system.flops import seconds  # noqa: PLC0415

    start, rounds = time.perf_counter(), []
    while not rounds or (len(rounds) < repeats and time.perf_counter() - start < PATIENCE):
        rounds.append([seconds(way, device) for way in ways])
    return rounds


def difference(ours, plain):
    """The largest over pairs of tensors of max |ours - plain| / max |plain|; NaN counts as infinite."""
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).nan_to_num(nan=float("inf")).item()
               for a, b in zip(ours, plain))


def picture(rows):
    """PNG bytes: how time and memory grow, of each comparison at several sizes; the ratios of the others as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = {}
    for row in rows:
        lines.setdefault(row[0], []).append(dict(zip(COLUMNS, row)))
    panels = [of_one for of_one in lines.values() if len(of_one) > 1]
    single = [of_one[0] for of_one in lines.values() if len(of_one) == 1]
    count = len(panels) + bool(single)
    figure = Figure(figsize=(3.4 * min(count, ACROSS), 5.4 * -(-count // ACROSS)), dpi=110, layout="constrained")
    grid = figure.subplots(2 * -(-count // ACROSS), min(count, ACROSS), squeeze=False)
    columns = [axes for k in range(0, len(grid), 2) for axes in zip(grid[k], grid[k + 1])]
    for axes, of_one in zip(columns, panels):
        draw_growth(axes, of_one)
    if single:
        draw_ratios(columns[len(panels)], single)
    for axis in [axis for axes in columns[count:] for axis in axes]:
        axis.axis("off")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def draw_growth(axes, lines):
    """Seconds above MB against N, side x side; hollow where the plain way was not run."""
    for axis, unit in zip(axes, ("s", "MB")):
        for way, colour in (("plain", "C0"), ("ours", "C1")):
            known = [line for line in lines if line[f"{way}_{unit}"] != "-"]
            not_run = [line for line in known if line[f"{way}_s"] == "-"]
            for part, style in ((known, dict(label=way)), (not_run, dict(label="from shapes" if not_run else None,
                                                                          linestyle="", markerfacecolor="white"))):
                axis.plot([int(line["size"]) ** 2 for line in part], [float(line[f"{way}_{unit}"]) for line in part],
                          color=colour, marker="o", **style)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylabel({"s": "seconds", "MB": "MB at once"}[unit])
        sizes = sorted({int(line["size"]) for line in lines})
        axis.set_xticks([size**2 for size in sizes], [f"{size}²" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_title(f"{lines[0]['comparison']}\n{lines[0]['of']}", fontsize="medium")
    axes[1].set_xlabel("N, positions of a map")


def draw_ratios(axes, lines):
    """plain / ours of comparisons at one size, time above memory, as bars with their numbers."""
    for axis, ratio, title in zip(axes, ("faster", "leaner"), ("seconds, plain / ours", "MB at once, plain / ours")):
        known = [line for line in reversed(lines) if line[ratio] != "-"]
        names = [f"{line['comparison']} {line['size']}" for line in known]
        bars = axis.barh(names, [float(line[ratio]) - 1 for line in known], left=1)
        axis.bar_label(bars, [line[ratio] for line in known], padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.margins(x=0.3)
        axis.set_title(title, fontsize="medium")


if __name__ == "__main__":
    run(main)
