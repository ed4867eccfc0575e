"""Upscaling with a trained network: the whole image, in tiles (--chop), averaged over orientations (--self_ensemble)."""
import logging
from collections import defaultdict
from itertools import product
from operator import itemgetter

import torch
from system import memory_budget
from system.errors import UserError

log = logging.getLogger("sr")
GLOBAL_TILE_PAD = 32  # LR pixels around a tile for networks that look at the whole image; more changes little (README)


@torch.no_grad()
def upscale(net, lr, chop_tiles=False, self_ensemble=False, memory=None):
    """lr: 1 x 3 x H x W -> sr: 1 x 3 x sH x sW, both in [0, net.rgb_range]; memory: bytes for the tiles, see `chop`."""
    forward = (lambda x: chop(net, x, memory=memory)) if chop_tiles else net
    return ensemble(forward, lr) if self_ensemble else forward(lr)


def ensemble(forward, lr):
    """Mean of forward over the 8 flips and transposes of the image, each undone (EDSR's geometric self-ensemble)."""
    total = None
    for transpose in (False, True):
        for flips in ((), (2,), (3,), (2, 3)):
            x = lr.flip(flips)
            x = x.transpose(2, 3) if transpose else x
            sr = forward(x.contiguous(memory_format=torch.channels_last))
            sr = sr.transpose(2, 3) if transpose else sr
            sr = sr.flip(flips)
            total = sr if total is None else total.add_(sr)
    return total.div_(8)


@torch.no_grad()
def chop(net, lr, tile=None, tile_pad=None, memory=None):
    """The forward of a large image in tiles; memory beyond input and output does not grow with the image.

    lr: N x 3 x H x W -> sr: N x 3 x sH x sW on lr's device, which need not be the network's. What is computed at once takes
    at most `memory` bytes: of the cuts into tiles that keep to that, the one that computes the fewest pixels is taken, and
    what fits is not cut. A tile is computed with `tile_pad` LR pixels around it, by default the receptive field, and
    the result is that of the whole image; the default memory is then half of what is free. For networks that look at the
    whole image the result is an approximation that depends on the tiles, so their default memory is the same everywhere,
    1 GB. Tiles start at multiples of the network's window.

    `tile` says the distance of tiles in LR pixels, in place of the memory. Raises UserError where `memory` does not hold the
    smallest tile, as wide as one tile_pad. A GPU that runs out of memory all the same gets smaller tiles.
    """
    device, align = next(net.parameters()).device, net.window
    tile_pad = _up((net.receptive_field or GLOBAL_TILE_PAD) if tile_pad is None else tile_pad, align)
    sr = lr.new_empty(lr.shape[0], 3, lr.shape[2] * net.scale, lr.shape[3] * net.scale)
    if tile:
        return _fill(sr, net, lr, *(_spans(size, _up(tile, align), tile_pad, align) for size in lr.shape[2:]))
    limit = memory_budget.PROBE**2  # of images no larger, finding out would cost as much as the result
    if memory or _up(lr.shape[2], align) * _up(lr.shape[3], align) > limit:
        limit = memory_budget.pixels_at_once(net, device, memory or memory_budget.default_memory(net, device))
    area, rows, columns = _cheapest(*lr.shape[2:], tile_pad, align, limit)
    if memory and area > limit:
        raise UserError(f"--chop_mem {memory / 1e9:g}: the smallest tile of this network takes about "
                        f"{memory_budget.memory_of(net, device, area) / 1e9:.2g} GB; give more")
    while True:
        try:
            with memory_budget.memory_kept(device):
                return _fill(sr, net, lr, rows, columns, max(1, limit // area))
        except torch.OutOfMemoryError:
            limit, before = area // 2, area
            area, rows, columns = _cheapest(*lr.shape[2:], tile_pad, align, limit)
            if area >= before:
                raise
            log.info("out of memory: going on with tiles of %d LR pixels in place of %d", area, before)


def _fill(sr, net, lr, rows, columns, batch=1):
    """Writes the network's result into sr, tile by tile, those of one size in batches; returns sr."""
    device, scale = next(net.parameters()).device, net.scale
    groups = defaultdict(list)
    for place in product(range(lr.shape[0]), rows, columns):
        _, (_, _, top, bottom), (_, _, left, right) = place
        groups[bottom - top, right - left].append(place)
    for places in groups.values():
        for first in range(0, len(places), batch):
            part = places[first:first + batch]
            x = torch.stack([lr[image, :, top:bottom, left:right]
                             for image, (_, _, top, bottom), (_, _, left, right) in part])
            # channels last: convolutions on a CPU need no copies into their own order then
            results = net(x.to(device).contiguous(memory_format=torch.channels_last))
            for (image, (y0, y1, top, _), (x0, x1, left, _)), y in zip(part, results):
                inner = y[:, (y0 - top) * scale:(y1 - top) * scale, (x0 - left) * scale:(x1 - left) * scale]
                sr[image, :, y0 * scale:y1 * scale, x0 * scale:x1 * scale] = inner
    return sr


def _cheapest(height, width, tile_pad, align, limit):
    """The cut that computes the fewest pixels, of those whose tiles have at most `limit` with their halos, else the finest.

    -> (pixels of a tile with its tile_pad, spans of the rows, spans of the columns).
    """
    rows, columns = _cuts(height, tile_pad, align), _cuts(width, tile_pad, align)
    fitting = [cut for cut in product(rows, columns) if cut[0][1] * cut[1][1] <= limit]
    finest = [min(cuts, key=itemgetter(1)) for cuts in (rows, columns)]
    (_, tall, rows), (_, wide, columns) = min(fitting, key=lambda cut: cut[0][0] * cut[1][0], default=finest)
    return tall * wide, rows, columns


def _cuts(size, tile_pad, align):
    """Ways to cut 0..size: [(pixels computed in all, pixels computed at once, spans)]; 1 tile is the first of them."""
    numbers = range(1, max(1, (size - 2 * tile_pad) // max(tile_pad, align)) + 1)
    tiles = dict.fromkeys(max(align, _up(-(-(size - 2 * tile_pad) // number), align)) for number in numbers)
    cuts = [_spans(size, tile, tile_pad, align) for tile in tiles]
    windows = [_up(max(stop - first for _, _, first, stop in spans), align) for spans in cuts]
    return [(len(spans) * window, window, spans) for spans, window in zip(cuts, windows)]


def _spans(size, tile, tile_pad, align):
    """Cuts 0..size into tiles at distances of `tile` -> [(start, stop, padded start, padded stop)].

    All are computed on equally many pixels, padding included: those at the border have padding on one side only, and so
    are larger themselves.
    """
    number = max(1, -(-(size - 2 * tile_pad) // tile))
    window = tile + 2 * tile_pad if number > 1 else size
    spans = []
    for n in range(number):
        start, stop = n and n * tile + tile_pad, size if n == number - 1 else (n + 1) * tile + tile_pad
        first = min(n * tile, _up(max(0, size - window), align))
        spans.append((start, stop, first, min(size, first + window)))
    return spans


def _up(number, multiple):
    return -(-number // multiple) * multiple


def to_image(sr, rgb_range=255):
    """1 x 3 x H x W in [0, rgb_range] -> uint8 H x W x 3 array, clamped and rounded."""
    image = torch.empty(*sr.shape[2:], 3, dtype=torch.uint8, device=sr.device)
    for channel, x in enumerate(sr[0]):  # one at a time: the image may be as large as memory
        x = x.float() if rgb_range == 255 else x.float() * (255 / rgb_range)
        image[..., channel] = x.clamp(0, 255).round_()
    return image.cpu().numpy()
