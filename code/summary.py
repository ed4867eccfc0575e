"""Tabulate the parameters, FLOPs, receptive field and memory of networks, without running them. Run from this folder.

python summary.py --ckp_path student=A.pt+teacher=B.pt     python summary.py --template RCAN_student --scale 4
"""
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING

import option
from option_types import parse_labelled
from system.signals import run_script

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode

    from model.common import Network
    from model.slicing import Slice

log = logging.getLogger("sr")
WIDTH, HEIGHT = 1280, 720  # of the output, as in the papers
COLUMNS = "network", "", "scale", "parameters", "GFLOPs", "receptive field", "weights MB", "feature maps MB"
NOTES = f"""\
For an output of {WIDTH} x {HEIGHT}: LR images of {WIDTH} / scale x {HEIGHT} / scale pixels, rounded up.
parameters: the trained ones; re-parameterised convolutions are fused. GFLOPs: of convolutions, matrix products and
attention, two per multiply-add (papers mostly count one). receptive field: LR pixels to each side. MB (10^6 bytes): of the
weights, and the peak of the feature maps in a forward pass in float32 without --chop or gradients; computed from shapes,
without the workspaces of the kernels."""


def main() -> int:
    """Print the table, and return the exit status; raises UserError."""
    args = option.parse(training=False)
    from system.logger import start_logging  # noqa: PLC0415 - after the flags: --help should not wait for torch

    start_logging()
    rows = [COLUMNS, *(describe(label, net) for label, net in load(args))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        log.info("  ".join(f"{cell:<{width}}" if k < 2 else f"{cell:>{width}}"
                           for k, (cell, width) in enumerate(zip(row, widths))))
    log.info(NOTES)
    return 0


def load(args: SimpleNamespace) -> list[tuple]:
    """Load the networks of --ckp_path LABEL=FILE+..., or build the one that the flags describe: [(label, network)]."""
    from model import fuse, load_with_flags, make_model  # noqa: PLC0415
    from model.slicing import narrow_network  # noqa: PLC0415

    nets = [(label, load_with_flags(path, args)) for label, path in parse_labelled(args.ckp_path).items()]
    if not nets:
        net = make_model(args.model, args)
        nets = [(args.template or args.model, narrow_network(net, args.width_mult) if args.width_mult else net)]
    return [(label, fuse(net)) for label, net in nets]


def describe(label: str, net: "Network | Slice") -> tuple[str, ...]:
    """Return the row of the table for a network."""
    flops, feature_maps = count(net)
    weights = sum(p.nbytes for p in net.parameters())
    return (label, type(net).__name__, f"x{net.scale}", f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,}",
            f"{flops / 1e9:,.1f}", receptive_field(net), f"{weights / 1e6:.1f}", f"{feature_maps / 1e6:,.0f}")


def receptive_field(net: "Network | Slice") -> str:
    """Describe the receptive field of a network."""
    if net.receptive_field is not None:
        return str(net.receptive_field)
    return "the image" if net.window == 1 else f"windows of {net.window}"


def count(net: "Network | Slice") -> tuple[int, int]:
    """Return (FLOPs, peak bytes of the tensors) of one forward pass, computed from shapes alone."""
    import torch  # noqa: PLC0415
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - the device "meta" has no autocast
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    from model.swinir import shift_mask  # noqa: PLC0415
    from system.memory import LiveMemory  # noqa: PLC0415

    convolutions, attention, memory = FlopCounterMode(display=False), fused_attention(), LiveMemory()
    shift_mask.cache_clear()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), memory, convolutions, attention:
            net.eval()(torch.empty(1, net.config.get("in_chans", 3), -(-HEIGHT // net.scale), -(-WIDTH // net.scale)))
    finally:
        shift_mask.cache_clear()  # the cached masks are fake tensors, without values
    return convolutions.get_total_flops() + attention.flops, memory.peak


def fused_attention() -> "TorchFunctionMode":
    """Return a mode that counts attention in `flops` as the fused kernels compute it, without the N x N matrix."""
    from torch.nn import functional as F  # noqa: PLC0415
    from torch.overrides import TorchFunctionMode  # noqa: PLC0415

    class FusedAttention(TorchFunctionMode):
        flops = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is not F.scaled_dot_product_attention:
                return function(*args, **(kwargs or {}))
            query, key, value = args
            self.flops += 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
            return query.new_empty(*query.shape[:-1], value.shape[-1])

    return FusedAttention()


if __name__ == "__main__":
    run_script(main)
