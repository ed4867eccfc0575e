"""Views of a batch: the original pairs, and upcycled ones made from them, as in DUKD (Zhang et al., 2023).

zoom_in    --n_zoom_in different tiles of HR's s x s grid, of the size of LR, as inputs without ground truth; drawn for each
           image, or once for all images as in DUKD's code (--zoom_in_tiles)
zoom_out   LR downscaled by s with the bicubic kernel of LR, not rounded, as input; LR is its ground truth

Each view is a batch of its own. Its terms are means over its images, multiplied by the view's weight in --upcycle.
"""
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Tiles(NamedTuple):
    """The tiles of zoom_in: `count` for each image; `shared` are the same for all images of a batch."""

    count: int = 1
    shared: bool = False


@dataclass(frozen=True)
class PlannedView:
    """The properties of a view that depend on the flags alone; side: that of its SR images, in pixels."""

    name: str
    has_hr: bool
    side: int


def zoom_in(lr: torch.Tensor, hr: torch.Tensor, scale: int, tiles: Tiles) -> tuple[torch.Tensor, None]:
    """Draw different tiles of the s x s grid of each HR image, image after image; they have no ground truth."""
    if tiles.count > scale ** 2:
        raise ValueError(f"--n_zoom_in {tiles.count}: HR has {scale ** 2} tiles of LR's size at --scale {scale}")
    height, width = lr.shape[2:]
    grid = hr.unflatten(2, (scale, height)).unflatten(4, (scale, width)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    draws = 1 if tiles.shared else global_batch_size(len(lr))
    chosen = torch.multinomial(torch.ones(draws, scale ** 2), tiles.count)
    chosen = chosen.expand(len(lr), -1) if tiles.shared else local_shard(chosen)
    chosen = chosen.to(hr.device, non_blocking=True)
    return grid[torch.arange(len(lr), device=hr.device)[:, None], chosen].flatten(0, 1), None


def zoom_out(lr: torch.Tensor, hr: torch.Tensor, scale: int, tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Downscale LR without rounding; the ground truth of the result is LR, cropped to a multiple of the scale."""
    height, width = (size // scale * scale for size in lr.shape[2:])
    return degrade.downscale_batch(lr, scale, rounded=False), lr[..., :height, :width]


MAKERS = {"zoom_in": zoom_in, "zoom_out": zoom_out}  # (LR, HR, scale, Tiles), uint8 -> LR and HR or None


def make_views(lr: torch.Tensor, hr: torch.Tensor, scale: int, upcycle: Sequence[tuple[float, str]] = (),
               n_zoom_in: int = 1, zoom_in_tiles: str = "image") -> list[View]:
    """Make the views of a batch of uint8 pairs: the original batch, then those of `upcycle`, pairs of weight and name.

    n_zoom_in: tiles of zoom_in per image. zoom_in_tiles: `image` draws them for each image, `batch` once for all.
    """
    tiles = Tiles(n_zoom_in, zoom_in_tiles == "batch")
    return [View("original", lr, hr),
            *(View(name, *MAKERS[name](lr, hr, scale, tiles), weight) for weight, name in upcycle)]


def plan(args: Namespace) -> list[PlannedView]:
    """Return the properties of the views of --upcycle, found on a blank image; raises UserError where one is impossible."""
    hr = torch.zeros(1, 3, args.patch_size, args.patch_size, dtype=torch.uint8)
    lr = hr[..., ::args.scale, ::args.scale]
    try:
        with torch.random.fork_rng(devices=[]):
            _, *views = make_views(lr, hr, args.scale, args.upcycle, args.n_zoom_in, args.zoom_in_tiles)
    except ValueError as error:
        raise UserError(f"--upcycle, --patch_size {args.patch_size}: {error}") from None
    return [PlannedView(view.name, view.hr is not None, view.lr.shape[-1] * args.scale) for view in views]


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
