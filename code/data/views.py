"""Views of a batch: the original pairs, and upcycled ones made from them, as in DUKD (Zhang et al., 2023).

zoom_in    --n_zoom_in different tiles of HR's s x s grid, of the size of LR, as inputs without ground truth
zoom_out   LR downscaled by s with the bicubic kernel that LR was made with, as input; LR is its ground truth

Each view is a batch of its own. Its terms are means over its images, multiplied by the view's weight in --upcycle.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from data import degrade
from loss.term import Output
from system.distributed import global_batch_size, local_shard
from system.errors import UserError


@dataclass
class View:
    """A batch of pairs N x 3 x h x w and N x 3 x sh x sw; hr is None without ground truth."""

    name: str
    lr: torch.Tensor
    hr: torch.Tensor | None
    weight: float = 1


@dataclass(frozen=True)
class PlannedView:
    """What is known of a view before there is a batch; side: of its outputs, in pixels."""

    name: str
    has_hr: bool
    side: int


def zoom_in(hr: torch.Tensor, scale: int, tiles: int) -> torch.Tensor:
    """Draw `tiles` different tiles of each image's s x s grid: N x 3 x sh x sw -> (N tiles) x 3 x h x w, image by image."""
    height, width = (size // scale for size in hr.shape[2:])
    grid = hr.unflatten(2, (scale, height)).unflatten(4, (scale, width)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    chosen = local_shard(torch.multinomial(torch.ones(global_batch_size(len(hr)), scale ** 2), tiles))
    chosen = chosen.to(hr.device, non_blocking=True)
    return grid[torch.arange(len(hr), device=hr.device)[:, None], chosen].flatten(0, 1)


def make_views(lr: torch.Tensor, hr: torch.Tensor, scale: int, upcycle: Sequence[tuple[float, str]] = (),
               n_zoom_in: int = 1) -> list[View]:
    """Make the views of a batch of uint8 pairs: the original batch, then those of `upcycle`, pairs of weight and name."""
    views = [View("original", lr, hr)]
    for weight, name in upcycle:
        if name == "zoom_in":
            views.append(View(name, zoom_in(hr, scale, n_zoom_in), None, weight))
        else:
            height, width = (size // scale * scale for size in lr.shape[2:])
            views.append(View(name, degrade.downscale_batch(lr, scale), lr[..., :height, :width], weight))
    return views


def plan(args) -> list[PlannedView]:
    """Plan the views of --upcycle; raises UserError where one cannot be made."""
    side = args.patch_size // args.scale // args.scale
    names = [name for _, name in args.upcycle]
    if "zoom_in" in names and args.n_zoom_in > args.scale ** 2:
        raise UserError(f"--n_zoom_in {args.n_zoom_in}: at --scale {args.scale} HR has {args.scale ** 2} tiles of LR's size")
    if "zoom_out" in names and side < 1:
        raise UserError(f"--patch_size {args.patch_size}: LR crops of {args.patch_size // args.scale} pixels cannot be "
                        f"downscaled by {args.scale} for zoom_out; {args.scale ** 2} or more")
    return [PlannedView(name, name != "zoom_in", args.patch_size if name == "zoom_in" else side * args.scale)
            for name in names]


def forward_by_size(forward: Callable[[torch.Tensor, bool], Output], inputs: list[torch.Tensor],
                    features: list[bool]) -> list[Output]:
    """Run forward(lr, features) on each batch of LR images, batches of equal image size concatenated.

    features: for each batch, whether its feature maps are needed.
    """
    groups = {}
    for index, lr in enumerate(inputs):
        groups.setdefault(lr.shape[2:], []).append(index)
    outputs = {}
    for group in groups.values():
        if len(group) == 1:
            outputs[group[0]] = forward(inputs[group[0]], features[group[0]])
            continue
        joined = forward(torch.cat([inputs[index] for index in group]), any(features[index] for index in group))
        outputs.update(zip(group, joined.split([len(inputs[index]) for index in group])))
    return [outputs[index] for index in range(len(inputs))]
