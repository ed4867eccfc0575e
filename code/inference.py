"""Upscaling with a trained network: the whole image, in tiles (--chop), averaged over orientations (--self_ensemble)."""
from collections import defaultdict

import torch

WINDOW = 256  # LR pixels a side that are computed at once: what bounds the memory, whatever the image
GLOBAL_HALO = 32  # LR pixels around a tile for networks that look at the whole image; more changes little (README)


@torch.no_grad()
def upscale(net, lr, chop_tiles=False, self_ensemble=False):
    """lr: 1 x 3 x H x W -> sr: 1 x 3 x sH x sW, both in [0, net.rgb_range]."""
    forward = (lambda x: chop(net, x)) if chop_tiles else net
    return ensemble(forward, lr) if self_ensemble else forward(lr)


def ensemble(forward, lr):
    """Mean of forward over the 8 flips and transposes of the image, each undone (EDSR's geometric self-ensemble)."""
    total = 0
    for transpose in (False, True):
        for flips in ((), (2,), (3,), (2, 3)):
            x = lr.flip(flips)
            x = x.transpose(2, 3) if transpose else x
            sr = forward(x.contiguous())
            sr = sr.transpose(2, 3) if transpose else sr
            total = total + sr.flip(flips)
    return total / 8


@torch.no_grad()
def chop(net, lr, tile=None, halo=None, batch=None):
    """The forward of a large image in tiles, batched; memory beyond input and output does not grow with the image.

    lr: N x 3 x H x W -> sr: N x 3 x sH x sW on lr's device, which need not be the network's. Each tile of `tile` LR pixels a
    side is computed with `halo` pixels around it, `batch` of them at a time. The default halo is the network's receptive
    field, which makes the result that of the whole image; for networks that look at the whole image it is an approximation.
    Tiles start at multiples of the network's window.
    """
    align = net.window
    halo = -(-(halo if halo is not None else net.receptive_field or GLOBAL_HALO) // align) * align
    tile = -(-(tile or max(WINDOW - 2 * halo, 2 * halo)) // align) * align
    batch = batch or max(1, WINDOW**2 // (tile + 2 * halo) ** 2)
    device, scale = next(net.parameters()).device, net.scale
    groups = defaultdict(list)  # windows of one size can be computed together
    for rows in _spans(lr.shape[2], tile, halo, align):
        for columns in _spans(lr.shape[3], tile, halo, align):
            for image in range(lr.shape[0]):
                groups[rows[3] - rows[2], columns[3] - columns[2]].append((image, rows, columns))
    sr = lr.new_empty(lr.shape[0], 3, lr.shape[2] * scale, lr.shape[3] * scale)
    for windows in groups.values():
        for first in range(0, len(windows), batch):
            part = windows[first:first + batch]
            x = torch.stack([lr[image, :, rows[2]:rows[3], columns[2]:columns[3]] for image, rows, columns in part])
            for (image, (y0, y1, top, _), (x0, x1, left, _)), y in zip(part, net(x.to(device))):
                inner = y[:, (y0 - top) * scale:(y1 - top) * scale, (x0 - left) * scale:(x1 - left) * scale]
                sr[image, :, y0 * scale:y1 * scale, x0 * scale:x1 * scale] = inner
    return sr


def _spans(size, tile, halo, align):
    """Cuts 0..size into tiles of about equal size -> [(start, stop, start of the window, its stop)].

    A window at the border keeps its size by reaching further in, so that all can be batched.
    """
    number = -(-size // tile)
    tile = -(-size // (number * align)) * align
    length = tile + 2 * halo
    spans = []
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        first = max(0, min(start - halo, size - length)) // align * align
        spans.append((start, stop, first, min(size, max(first + length, stop + halo))))
    return spans


def to_image(sr, rgb_range=255):
    """1 x 3 x H x W in [0, rgb_range] -> uint8 H x W x 3 array, clamped and rounded."""
    sr = sr[0].float() if rgb_range == 255 else sr[0].float() * (255 / rgb_range)
    return sr.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()
