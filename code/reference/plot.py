"""The figure of a benchmark, drawn from the rows of its table."""
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plotting import to_png

PANELS_PER_ROW = 5
LABELS = {"reference": "reference", "ours": "this implementation"}


def picture(rows: list[dict[str, str]]) -> bytes:
    """Draw the rows of benchmark.csv, and return a PNG file.

    A comparison at several sizes has a panel with curves of time and memory. Those at a single size share a panel with bars
    of speedup and memory ratio.
    """
    comparisons = {}
    for row in rows:
        comparisons.setdefault(row["comparison"], []).append(row)
    curves = [sizes for sizes in comparisons.values() if len(sizes) > 1]
    single = [sizes[0] for sizes in comparisons.values() if len(sizes) == 1]
    count = len(curves) + bool(single)
    width, height = min(count, PANELS_PER_ROW), -(-count // PANELS_PER_ROW)
    figure = Figure(figsize=(3.4 * width, 5.4 * height), dpi=110, layout="constrained")
    grid = figure.subplots(2 * height, width, squeeze=False)
    panels = [axes for k in range(0, len(grid), 2) for axes in zip(grid[k], grid[k + 1])]
    for axes, sizes in zip(panels, curves):
        draw_curves(axes, sizes)
    if single:
        draw_ratios(panels[len(curves)], single)
    for axis in [axis for axes in panels[count:] for axis in axes]:
        axis.axis("off")
    return to_png(figure)


def draw_curves(axes: Sequence[Axes], rows: list[dict[str, str]]) -> None:
    """Draw time and memory of one comparison against N = side x side; hollow markers where the reference was not run."""
    for axis, unit in zip(axes, ("s", "MB")):
        for name, colour in (("reference", "C0"), ("ours", "C1")):
            measured = [row for row in rows if row[f"{name}_{unit}"] != "-"]
            not_run = [row for row in measured if row[f"{name}_s"] == "-"]
            for part, style in ((measured, dict(label=LABELS[name])),
                                (not_run, dict(label="from shapes" if not_run else None, linestyle="",
                                               markerfacecolor="white"))):
                axis.plot([int(row["size"]) ** 2 for row in part], [float(row[f"{name}_{unit}"]) for row in part],
                          color=colour, marker="o", **style)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylabel({"s": "time (s)", "MB": "peak memory (MB)"}[unit])
        sides = sorted({int(row["size"]) for row in rows})
        axis.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    axes[0].set_title(f"{rows[0]['comparison']}\n{rows[0]['setting']}", fontsize="medium")
    axes[1].set_xlabel("N = H x W")


def draw_ratios(axes: Sequence[Axes], rows: list[dict[str, str]]) -> None:
    """Draw speedup and memory ratio of comparisons at a single size as bars."""
    for axis, ratio in zip(axes, ("speedup", "memory_ratio")):
        measured = [row for row in reversed(rows) if row[ratio] != "-"]
        names = [f"{row['comparison']} {row['size']}" for row in measured]
        bars = axis.barh(names, [float(row[ratio]) - 1 for row in measured], left=1)
        axis.bar_label(bars, [row[ratio] for row in measured], padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.margins(x=0.3)
        axis.set_title(ratio.replace("_", " "), fontsize="medium")
