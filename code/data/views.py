"""Views of a batch: the pair itself, and further inputs that are made from it, as in DUKD (Zhang et al., 2023).

zoom_in    --n_zoom_in different tiles of HR's s x s grid, each of LR's size, as inputs; they have no truth
zoom_out   LR downscaled by s with the bicubic kernel that LR was made with, as input; its truth is LR

Each is a batch of its own, whose terms are means over its images, times the view's weight in --upcycle. Only what is made
here differs between the views: the trainer and the terms of the loss treat all alike.
"""
from dataclasses import dataclass

import torch
from system.distributed import global_batch_size, local_shard
from system.errors import UserError

from data import degrade


@dataclass
class View:
    """hr is None where there is no truth. Tensors of uint8, N x 3 x h x w and N x 3 x sh x sw, or of what they become."""
    name: str
    lr: torch.Tensor
    hr: torch.Tensor | None
    weight: float = 1


@dataclass(frozen=True)
class Planned:
    """What is known of a view before there is a batch; side: of the outputs, in pixels."""
    name: str
    has_truth: bool
    side: int


def zoom_in(lr, hr, args):
    """The tiles of an image follow each other; which they are comes from torch's generator on the CPU."""
    scale, (height, width) = args.scale, lr.shape[2:]
    grid = hr.unflatten(2, (scale, height)).unflatten(4, (scale, width)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    chosen = local_shard(torch.multinomial(torch.ones(global_batch_size(len(lr)), scale ** 2), args.n_zoom_in))
    chosen = chosen.to(hr.device, non_blocking=True)
    return grid[torch.arange(len(lr), device=hr.device)[:, None], chosen].flatten(0, 1), None


def zoom_out(lr, hr, args):
    height, width = (size // args.scale * args.scale for size in lr.shape[2:])
    return degrade.downscale_batch(lr, args.scale), lr[..., :height, :width]


MAKERS = {"zoom_in": zoom_in, "zoom_out": zoom_out}  # (LR, HR, args) of a batch, uint8 -> (LR, HR or None) of the view


def make_views(lr, hr, args):
    """The plain view of a batch of uint8 pairs, then those of --upcycle; on the batch's device."""
    return [View("plain", lr, hr), *(View(name, *MAKERS[name](lr, hr, args), weight) for weight, name in args.upcycle)]


def plan(args):
    """A Planned for each view of --upcycle; raises UserError where one cannot be made."""
    side = args.patch_size // args.scale // args.scale
    names = [name for _, name in args.upcycle]
    if "zoom_in" in names and args.n_zoom_in > args.scale ** 2:
        raise UserError(f"--n_zoom_in {args.n_zoom_in}: at --scale {args.scale} HR has {args.scale ** 2} tiles of LR's size")
    if "zoom_out" in names and side < 1:
        raise UserError(f"--patch_size {args.patch_size}: LR crops of {args.patch_size // args.scale} pixels cannot be "
                        f"downscaled by {args.scale} for zoom_out; {args.scale ** 2} or more")
    return [Planned(name, name != "zoom_in", args.patch_size if name == "zoom_in" else side * args.scale) for name in names]


def together(run, inputs, features):
    """[run(lr, features) of each batch of LR images], an Output each; those of one size go through as one batch.

    features: for each, whether its maps are wanted.
    """
    groups = {}
    for index, lr in enumerate(inputs):
        groups.setdefault(lr.shape[2:], []).append(index)
    outputs = {}
    for group in groups.values():
        if len(group) == 1:
            outputs[group[0]] = run(inputs[group[0]], features[group[0]])
            continue
        joined = run(torch.cat([inputs[index] for index in group]), any(features[index] for index in group))
        outputs.update(zip(group, joined.split([len(inputs[index]) for index in group])))
    return [outputs[index] for index in range(len(inputs))]
