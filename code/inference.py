"""Inference with a trained network: full images, overlapping tiles (--chop), and self-ensemble (--self_ensemble)."""
import logging
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from operator import itemgetter

import numpy as np
import torch
from torch import nn

from system import memory_budget
from system.errors import UserError

log = logging.getLogger("sr")
# Tile overlap in LR pixels for networks with global operations or a very large receptive field; a larger one changes little
# (see the README).
GLOBAL_TILE_PAD = 32


@torch.no_grad()
def upscale(net: nn.Module, lr: torch.Tensor, tiled: bool = False, self_ensemble: bool = False,
            memory: float | None = None) -> torch.Tensor:
    """Upscale an image 1 x 3 x H x W to 1 x 3 x sH x sW, both in [0, net.rgb_range].

    memory: bytes that tiles may take, see `chop`.
    """
    def forward(x):
        return chop(net, x, memory=memory) if tiled else net(x.contiguous(memory_format=torch.channels_last))

    with memory_budget.retain_freed_memory(next(net.parameters()).device):
        return ensemble(forward, lr) if self_ensemble else forward(lr)


def ensemble(forward: Callable[[torch.Tensor], torch.Tensor], lr: torch.Tensor) -> torch.Tensor:
    """Average forward(lr) over the 8 flips and transposes of the input, each inverted on the output.

    This is the geometric self-ensemble of EDSR (Lim et al., CVPRW 2017).
    """
    total = None
    for transpose in (False, True):
        for flips in ((), (2,), (3,), (2, 3)):
            x = lr.flip(flips)
            x = x.transpose(2, 3) if transpose else x
            sr = forward(x)
            sr = sr.transpose(2, 3) if transpose else sr
            sr = sr.flip(flips)
            total = sr if total is None else total.add_(sr)
    return total.div_(8)


@torch.no_grad()
def chop(net: nn.Module, lr: torch.Tensor, tile: int | None = None, tile_pad: int | None = None,
         memory: float | None = None) -> torch.Tensor:
    """Upscale large images in overlapping tiles, whose peak memory does not grow with the image.

    lr: N x 3 x H x W. Returns N x 3 x sH x sW on the device of lr, which may differ from the network's.
    tile_pad: LR pixels of overlap that are computed around each tile and cropped; by default the receptive field, with which
    the result equals that of the whole image. For networks with global operations, or a receptive field above
    memory_budget.MAX_OVERLAP, the result is an approximation that depends on the tiles.
    memory: bytes that a forward pass may take. Among the tilings that fit, the one with the fewest computed pixels is
    chosen; an image that fits is not divided. The default is half of the free memory, on a CPU at most 1 GB; or 1 GB where
    the result depends on the tiles, so that their results do not depend on the machine.
    tile: size of the tiles in LR pixels, in place of `memory`. The default is net.tile, where the network has one.

    Tiles start at multiples of net.window. If a GPU runs out of memory, smaller tiles are tried. Raises UserError where
    `memory` is too small for the smallest tiles, which are as large as their overlap.
    """
    device, align = next(net.parameters()).device, net.window
    if tile_pad is None:
        tile_pad = net.receptive_field if memory_budget.tiles_exactly(net) else GLOBAL_TILE_PAD
    tile_pad = _round_up(tile_pad, align)
    tile = tile or getattr(net, "tile", None)
    sr = lr.new_empty(lr.shape[0], 3, lr.shape[2] * net.scale, lr.shape[3] * net.scale)
    if tile:
        return _run_tiles(sr, net, lr, *(_divide(size, _round_up(tile, align), tile_pad, align) for size in lr.shape[2:]))
    limit = memory_budget.PROBE_SIZE**2  # pixels; measuring the memory would take as long as upscaling so small an image
    if memory or _round_up(lr.shape[2], align) * _round_up(lr.shape[3], align) > limit:
        limit = memory_budget.max_pixels(net, device, memory or memory_budget.default_memory(net, device))
    area, rows, columns = _choose_tiles(*lr.shape[2:], tile_pad, align, limit)
    if memory and area > limit:
        raise UserError(f"--chop_mem {memory / 1e9:g}: the smallest tiles of this network take about "
                        f"{memory_budget.required_memory(net, device, area) / 1e9:.2g} GB; give a larger --chop_mem")
    while True:
        try:
            with memory_budget.retain_freed_memory(device):
                return _run_tiles(sr, net, lr, rows, columns, max(1, limit // area))
        except torch.OutOfMemoryError:
            limit, previous = area // 2, area
            area, rows, columns = _choose_tiles(*lr.shape[2:], tile_pad, align, limit)
            if area >= previous:
                raise
            log.info("out of memory: continuing with tiles of %d LR pixels instead of %d", area, previous)


def _run_tiles(sr, net, lr, rows, columns, batch_size=1):
    """Run the network on tiles, those of equal size in batches, write the results into `sr`, and return it."""
    device, scale = next(net.parameters()).device, net.scale
    groups = defaultdict(list)
    for tile in product(range(lr.shape[0]), rows, columns):
        _, (_, _, top, bottom), (_, _, left, right) = tile
        groups[bottom - top, right - left].append(tile)
    for tiles in groups.values():
        for first in range(0, len(tiles), batch_size):
            batch = tiles[first:first + batch_size]
            x = torch.stack([lr[image, :, top:bottom, left:right]
                             for image, (_, _, top, bottom), (_, _, left, right) in batch])
            # in channels_last, convolutions on a CPU do not have to reorder their inputs
            outputs = net(x.to(device).contiguous(memory_format=torch.channels_last))
            for (image, (y0, y1, top, _), (x0, x1, left, _)), output in zip(batch, outputs):
                inner = output[:, (y0 - top) * scale:(y1 - top) * scale, (x0 - left) * scale:(x1 - left) * scale]
                sr[image, :, y0 * scale:y1 * scale, x0 * scale:x1 * scale] = inner
    return sr


def _choose_tiles(height, width, tile_pad, align, limit):
    """Choose the tiling with the fewest computed pixels among those with at most `limit` pixels in a padded tile.

    Where none fits, the one with the smallest tiles. Returns the pixels of a padded tile and the tiles' rows and columns,
    as `_divide` returns them.
    """
    rows, columns = _divisions(height, tile_pad, align), _divisions(width, tile_pad, align)
    fitting = [pair for pair in product(rows, columns) if pair[0][1] * pair[1][1] <= limit]
    finest = [min(divisions, key=itemgetter(1)) for divisions in (rows, columns)]
    (_, tile_height, rows), (_, tile_width, columns) = min(fitting, key=lambda pair: pair[0][0] * pair[1][0], default=finest)
    return tile_height * tile_width, rows, columns


def _divisions(size, tile_pad, align):
    """List the divisions of an axis into tiles, from a single tile to the smallest ones.

    Each is (computed pixels in total, pixels of a padded tile, tiles as `_divide` returns them).
    """
    counts = range(1, max(1, (size - 2 * tile_pad) // max(tile_pad, align)) + 1)
    sizes = dict.fromkeys(max(align, _round_up(-(-(size - 2 * tile_pad) // count), align)) for count in counts)
    divisions = [_divide(size, tile, tile_pad, align) for tile in sizes]
    padded = [_round_up(max(stop - start for _, _, start, stop in tiles), align) for tiles in divisions]
    return [(len(tiles) * pixels, pixels, tiles) for tiles, pixels in zip(divisions, padded)]


def _divide(size, tile, tile_pad, align):
    """Divide an axis into tiles of `tile` pixels and return [(start, stop, padded start, padded stop)].

    All padded tiles have the same size, but for the last one, which may be smaller by less than `align`. Those at the border
    are padded on one side only, so that the tiles themselves are larger there.
    """
    count = max(1, -(-(size - 2 * tile_pad) // tile))
    padded = tile + 2 * tile_pad if count > 1 else size
    tiles = []
    for index in range(count):
        start = index * tile + tile_pad if index else 0
        stop = size if index == count - 1 else (index + 1) * tile + tile_pad
        padded_start = min(index * tile, _round_up(max(0, size - padded), align))
        tiles.append((start, stop, padded_start, min(size, padded_start + padded)))
    return tiles


def _round_up(number, multiple):
    return -(-number // multiple) * multiple


def to_image(sr: torch.Tensor, rgb_range: float = 255, dtype: torch.dtype = torch.uint8) -> np.ndarray:
    """Convert 1 x C x H x W in [0, rgb_range] to H x W x C of the dtype, uint8 or uint16, clamped and rounded."""
    peak = torch.iinfo(dtype).max
    image = torch.empty(*sr.shape[2:], sr.shape[1], dtype=dtype, device=sr.device)
    for channel, x in enumerate(sr[0]):  # one by one, since a float copy of a large image may not fit in memory
        x = x.float() if rgb_range == peak else x.float() * (peak / rgb_range)
        image[..., channel] = x.clamp(0, peak).round_()
    return image.cpu().numpy()
