"""Cached teacher outputs (--cache_teacher): computed once for every training image, as 16-bit fixed point.

An output is stored in the cache of the images (data/cache.py) as int16 H x W x 3. The unit is 1/128 of a grey level, so that
the range is -128 to 384 and the error at most 1/256. The name of the kind contains what the output depends on: the digest of
the teacher's checkpoint, the scale, the precision, and whether it is a self-ensemble. An interrupted computation continues
from the last image.
"""
import logging
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import inference
from data.cache import digest_of
from data.dataset import Crops, Images, progress
from data.views import PlannedView
from loss import Context, Loss
from system.device import autocast
from system.errors import UserError

log = logging.getLogger("sr")
MIDDLE, UNIT = 128, 1 / 128


def encode(sr: torch.Tensor) -> np.ndarray:
    """Convert 3 x H x W in about [0, 255] to an int16 array H x W x 3."""
    return ((sr - MIDDLE) / UNIT).round().clamp(-2**15, 2**15 - 1).to(torch.int16).permute(1, 2, 0).cpu().numpy()


def decode(outputs: torch.Tensor) -> torch.Tensor:
    """Convert an int16 tensor to float32 in about [0, 255]."""
    return outputs.float() * UNIT + MIDDLE


def kind_of(path: Path | str, args: Namespace) -> str:
    """Return the kind, in the cache, of the outputs of the teacher in that checkpoint."""
    ensemble = "_self_ensemble" * (args.cache_teacher == "self_ensemble")
    return f"SR_X{args.scale}_{digest_of(path)[:16]}_{args.teacher_precision}{ensemble}"


def teacher_output(net: nn.Module, images: Images, index: int, device: torch.device, args: Namespace) -> np.ndarray:
    """Compute the output of the network for a full LR image, in tiles, and return it encoded."""
    x = torch.tensor(images.lr(index)).permute(2, 0, 1)[None].float() * (args.rgb_range / 255)
    with autocast(device, args.teacher_precision):
        sr = inference.upscale(net, x, tiled=True, self_ensemble=args.cache_teacher == "self_ensemble")
    return encode(sr[0].float() * (255 / args.rgb_range))


def cache_outputs(crops: Crops, teachers: Iterable[nn.Module], paths: Iterable[Path | str], device: torch.device,
                  args: Namespace) -> None:
    """Compute the outputs that are not cached yet of each teacher, and add them to what `crops` returns.

    paths: the checkpoint of each teacher.
    """
    for net, path in zip(teachers, paths):
        kind = kind_of(path, args)
        net = net.eval().to(device, memory_format=torch.channels_last)
        for images in crops.sets:
            with images.cache.building(kind):
                for index in progress(range(len(images)), f"outputs of {path} for {images.name}"):
                    images.teacher_output(index, kind, partial(teacher_output, net, images, index, device, args))
        crops.teacher_kinds.append(kind)


def uncached_uses(loss: Loss, views: Iterable[PlannedView], eco: bool = False) -> list[str]:
    """Return the terms, with their views, for which a teacher runs in spite of cached outputs, such as TS (zoom_in).

    eco: whether the cached outputs are those for LR while the student's inputs are the mixtures of --eco.
    """
    more = {"features", "teacher_grad", "teacher_net"} | ({"teacher"} if eco else set())
    found = [f"{name} (original batch)" for name in loss.names if loss.terms[name].needs & more]
    found += [f"{name} ({view.name})" for view in views for name in loss.terms_on(view.name, view.has_hr)
              if loss.terms[name].needs & {"teacher", "teacher_net"}]
    return found


def prepare(crops: Crops, loss: Loss, context: Context, paths: Iterable[Path | str], device: torch.device) -> None:
    """Cache the teacher outputs for the original batch, unless the teacher runs on it in any case, which is logged.

    paths: the checkpoint of each teacher. Raises UserError if no term of the loss uses a teacher, or where the
    self-ensemble of a teacher is requested that runs on the original batch in any case.
    """
    needs = loss.needs_on("original", True)
    eco = context.args.eco
    running = ", ".join(uncached_uses(loss, context.views, eco))
    if not eco and not needs & {"teacher", "teacher_net"}:
        raise UserError(f"--cache_teacher: no term of {context.args.loss} uses a teacher")
    if not eco and ("teacher" not in needs or needs & {"features", "teacher_grad"}):
        if context.args.cache_teacher == "self_ensemble":
            raise UserError(f"--cache_teacher self_ensemble: the teacher runs on every batch, without self-ensemble, for "
                            f"{running}; leave out these terms, or self_ensemble")
        log.info("--cache_teacher has no effect: the teacher runs on every batch for %s", running)
        return
    cache_outputs(crops, context.teachers, paths, device, context.args)
    log.info("teacher outputs for the original batch are cached, %s; %s", ", ".join(crops.teacher_kinds),
             f"the teacher still runs for {running}" if running else "the teacher is not run during training")
