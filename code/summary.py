"""Tabulate what networks cost: parameters, FLOPs, activations, receptive field and memory; with --time, milliseconds.

python summary.py --ckp_path student=A.pt+teacher=B.pt --time     python summary.py --budget 20ms --scale 4

Run from this folder. Without --time and --budget the networks are not run.
"""
import logging
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import benchmark
import option
from option_types import PAPER_SIZE, OutputSize, parse_labelled
from system.errors import UserError
from system.signals import run_script
from template import TEMPLATES

if TYPE_CHECKING:
    import torch
    from torch.overrides import TorchFunctionMode

    from model.common import Network
    from model.slicing import Slice

log = logging.getLogger("sr")
PASSES, MAX_SECONDS = 9, 5  # of the measured forward passes of a network, and their total after which none begins
COLUMNS = ("network", "", "scale", "parameters", "GFLOPs", "activations M", "receptive field", "weights MB",
           "feature maps MB")
MEASURED_COLUMNS = "ms", "peak MB"
NOTES = """\
For an output of {0.width} x {0.height}: LR images of {0.width} / scale x {0.height} / scale pixels, rounded up.
parameters: the trained ones; re-parameterised convolutions are fused. GFLOPs: of convolutions, matrix products and
attention, two per multiply-add (papers mostly count one). activations: 10^6 output elements of convolutions and linear
layers. receptive field: LR pixels to each side. MB (10^6 bytes): of the weights, and the peak of the feature maps in a
forward pass in float32 without --chop or gradients; computed from shapes, without the workspaces of the kernels."""
MEASURED_NOTES = f"""\
ms: time of a forward pass, the median of up to {PASSES} after a warm-up (a single pass where it takes over {MAX_SECONDS} s).
peak MB: measured peak of the tensors beyond the weights; on a GPU that of PyTorch's allocator. -: more than the free memory
or --chop_mem; --chop takes less. Measured as in a test, in --precision {{}}, on {{}}."""
BUDGET_NOTES = """\
Presets at x{} whose forward pass takes at most {}, those with more FLOPs first: among networks of one architecture
these have the higher PSNR; across architectures that is only a rule of thumb."""


class Cost(NamedTuple):
    """Costs of one forward pass, computed from shapes."""

    flops: int
    activations: int  # output elements of convolutions and linear layers
    feature_maps: int  # peak bytes


class Measurement(NamedTuple):
    """Costs of one forward pass, measured."""

    seconds: float
    memory: int  # peak bytes beyond weights and input


def main() -> int:
    """Print the table, and return the exit status; raises UserError."""
    args = option.parse(training=False)
    from system.device import pick_device  # noqa: PLC0415 - after the flags: --help should not wait for torch
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    rows, notes = [COLUMNS], [NOTES.format(args.output_size)]
    if args.time or args.budget:
        device = pick_device(args)
        rows = [COLUMNS + MEASURED_COLUMNS]
        notes.append(MEASURED_NOTES.format(args.precision, benchmark.describe(device)))
    start, cpu_start = time.perf_counter(), time.process_time()
    if args.budget:
        rows += within_budget(args, device)
        notes.append(BUDGET_NOTES.format(args.scale, args.budget))
        if len(rows) == 1:
            line = f"no preset at x{args.scale} upscales to {args.output_size} in {args.budget} on this machine"
            log.info("\n".join([line, *benchmark.busy_note(device, start, cpu_start)]))
            return 0
    else:
        for label, net in load(args):
            row = describe(label, net, count(net, args.output_size))
            rows.append(row + describe_measurement(measure(net, device, args)) if args.time else row)
    if args.time or args.budget:
        notes += benchmark.busy_note(device, start, cpu_start)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        log.info("  ".join(f"{cell:<{width}}" if k < 2 else f"{cell:>{width}}"
                           for k, (cell, width) in enumerate(zip(row, widths))))
    log.info("\n".join(notes))
    return 0


def load(args: Namespace) -> list[tuple]:
    """Load the networks of --ckp_path LABEL=FILE+..., or build the one that the flags describe: [(label, network)]."""
    from model import fuse, load_with_flags, make_model  # noqa: PLC0415
    from model.slicing import narrow_network  # noqa: PLC0415

    nets = [(label, load_with_flags(path, args)) for label, path in parse_labelled(args.ckp_path).items()]
    if not nets:
        net = make_model(args.model, args)
        nets = [(args.template or args.model, narrow_network(net, args.width_mult) if args.width_mult else net)]
    return [(label, fuse(net)) for label, net in nets]


def within_budget(args: Namespace, device: "torch.device") -> list[tuple[str, ...]]:
    """Return the rows of the presets at --scale that need at most --budget, those with more FLOPs first.

    Presets of the same sizes share a row.
    """
    from tqdm import tqdm  # noqa: PLC0415

    from system.logger import redraw_interval  # noqa: PLC0415

    presets = {}
    for name, sizes in TEMPLATES.items():
        if "model" in sizes:
            flags = option.parse(["--template", name, "--scale", str(args.scale)], training=False)
            if args.scale in (flags.multi_scale or [args.scale]):
                presets.setdefault(tuple(sizes.items()), []).append((name, flags))
    found = []
    for names in tqdm(presets.values(), "measuring presets", leave=False, mininterval=redraw_interval()):
        try:
            (_, net), = load(names[0][1])
        except UserError:  # a network that does not have this scale
            continue
        measurement = measure(net, device, args, args.budget)
        if measurement and measurement.seconds <= args.budget:
            cost = count(net, args.output_size)
            row = describe(", ".join(name for name, _ in names), net, cost) + describe_measurement(measurement)
            found.append((cost.flops, row))
    return [row for _, row in sorted(found, reverse=True)]


def describe(label: str, net: "Network | Slice", cost: Cost) -> tuple[str, ...]:
    """Return the row of the table for a network, without the measured columns."""
    weights = sum(p.nbytes for p in net.parameters())
    return (label, type(net).__name__, f"x{net.scale}", f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,}",
            f"{cost.flops / 1e9:,.1f}", f"{cost.activations / 1e6:,.1f}", receptive_field(net), f"{weights / 1e6:.1f}",
            f"{cost.feature_maps / 1e6:,.0f}")


def describe_measurement(measurement: Measurement | None) -> tuple[str, str]:
    """Return the measured columns of a row."""
    if not measurement:
        return "-", "-"
    return f"{1000 * measurement.seconds:,.1f}", f"{measurement.memory / 1e6:,.0f}"


def receptive_field(net: "Network | Slice") -> str:
    """Describe the receptive field of a network."""
    if net.receptive_field is not None:
        return str(net.receptive_field)
    return f"windows of {net.window}" if "window_size" in net.config else "the image"


def count(net: "Network | Slice", output_size: OutputSize = PAPER_SIZE) -> Cost:
    """Compute the costs of one forward pass from shapes alone."""
    import torch  # noqa: PLC0415
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - the device "meta" has no autocast
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    from model.swinir import shift_mask  # noqa: PLC0415
    from system.memory import LiveMemory  # noqa: PLC0415

    operators, layers, memory = FlopCounterMode(display=False), layer_counter(), LiveMemory()
    shape, device = (1, net.config.get("in_chans", 3), *lr_size(net, output_size)), next(net.parameters()).device
    shift_mask.cache_clear()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), memory, operators, layers:
            net.eval()(torch.empty(shape, device=device))
    finally:
        shift_mask.cache_clear()  # the cached masks are fake tensors, without values
    return Cost(operators.get_total_flops() + layers.attention_flops, layers.activations, memory.peak)


def lr_size(net: "Network | Slice", output_size: OutputSize) -> tuple[int, int]:
    """Return height and width of the LR image for an output of at least that size."""
    return -(-output_size.height // net.scale), -(-output_size.width // net.scale)


def layer_counter() -> "TorchFunctionMode":
    """Return a mode that sums the output elements of convolutions and linear layers in `activations`.

    It also counts attention in `attention_flops` as the fused kernels compute it, without the N x N matrix.
    """
    from torch.nn import functional as F  # noqa: PLC0415
    from torch.overrides import TorchFunctionMode  # noqa: PLC0415

    class LayerCounter(TorchFunctionMode):
        activations = attention_flops = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                query, key, value = args
                self.attention_flops += 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
                return query.new_empty(*query.shape[:-1], value.shape[-1])
            out = function(*args, **(kwargs or {}))
            if function in (F.conv2d, F.conv_transpose2d, F.linear):
                self.activations += out.numel()
            return out

    return LayerCounter()


def measure(net: "Network | Slice", device: "torch.device", args: Namespace, budget: float = math.inf) -> Measurement | None:
    """Measure forward passes as in a test; return None where the memory is too small.

    budget: seconds. None is also returned where the time, extrapolated linearly in the pixels from two smaller images (so
    that what does not depend on them, such as the start of GPU kernels, counts once), exceeds twice the budget.
    """
    import torch  # noqa: PLC0415

    from system.flops import run_time  # noqa: PLC0415
    from system.memory import peak_memory  # noqa: PLC0415
    from system.memory_budget import retain_freed_memory  # noqa: PLC0415

    net.eval().to(device, memory_format=torch.channels_last)
    try:
        with retain_freed_memory(device):
            estimate = previous = 0.0  # seconds
            for divisor in (16, 8) if budget < math.inf else ():
                run = forward_pass(net, device, args, divisor)
                seconds = min(run_time(run, device) for _ in range(2))  # the first pass may be a slow one
                estimate = seconds + (divisor**2 - 1) * 4 / 3 * max(0, seconds - previous) if previous else seconds
                previous = seconds
                if estimate > 2 * budget:
                    return None
            run = forward_pass(net, device, args)
            start = time.perf_counter()
            memory = peak_memory(run, device)[1]  # also the warm-up
            seconds = [time.perf_counter() - start]
            while len(seconds) <= PASSES and sum(seconds) < MAX_SECONDS:
                seconds.append(run_time(run, device))
    except (torch.OutOfMemoryError, UserError):
        return None
    return Measurement(statistics.median(seconds[1:] or seconds), memory)


def forward_pass(net: "Network | Slice", device: "torch.device", args: Namespace, divisor: int = 1) -> Callable:
    """Return a function that upscales a random image to --output_size, each side divided by `divisor`, as in a test.

    Raises UserError where the image needs more memory than is free, or than --chop_mem.
    """
    import torch  # noqa: PLC0415

    import inference  # noqa: PLC0415
    from system.device import autocast  # noqa: PLC0415
    from system.memory_budget import PROBE_SIZE, free_memory, required_memory  # noqa: PLC0415

    height, width = lr_size(net, OutputSize(*(-(-side // divisor) for side in args.output_size)))
    if not args.chop and height * width > PROBE_SIZE**2:  # the memory of a smaller image is no problem
        with autocast(device, args.precision):
            needed, free = required_memory(net, device, height * width), free_memory(device)
        if needed > free:
            raise UserError(f"needs {needed / 1e9:.2g} GB of the {free / 1e9:.2g} GB of free memory; give --chop")
    lr = net.rgb_range * torch.rand(1, 3, height, width, device="cpu" if args.chop else device)

    def run():
        with autocast(device, args.precision):
            return inference.upscale(net, lr, args.chop, args.self_ensemble, args.chop_mem and 1e9 * args.chop_mem)
    return run


if __name__ == "__main__":
    run_script(main)
