"""Cached teacher outputs (--cache_teacher): computed once for every training image, as 16-bit fixed point.

An output is kept in the data's cache as int16 H x W x 3, whose unit is 1/128 of a grey level of 255, from -128 to 384:
rounded by 1/256 at most. The name of its kind holds what it depends on beside the image: the teacher file's content, the
scale and the precision. An interrupted computation goes on where it was (data/cache.py).
"""
import logging
from functools import partial

import torch

import inference
from data.cache import digest_of
from data.dataset import progress
from system.device import autocast
from system.errors import UserError

log = logging.getLogger("sr")
MIDDLE, UNIT = 128, 1 / 128


def encode(sr):
    """Convert 3 x H x W in about [0, 255] to an int16 array H x W x 3."""
    return ((sr - MIDDLE) / UNIT).round().clamp(-2**15, 2**15 - 1).to(torch.int16).permute(1, 2, 0).cpu().numpy()


def decode(outputs):
    """Convert an int16 tensor to float32 in about [0, 255]."""
    return outputs.float() * UNIT + MIDDLE


def kind_of(path, args):
    """Return the kind, in the data's cache, of the outputs of the teacher in that file."""
    return f"SR_X{args.scale}_{digest_of(path)[:16]}_{args.precision}"


def teacher_output(net, images, index, device, args):
    """Return the encoded output of the network for a whole LR image, computed in tiles."""
    x = torch.tensor(images.lr(index)).permute(2, 0, 1)[None].float() * (args.rgb_range / 255)
    with autocast(device, args.precision):
        sr = inference.chop(net, x)
    return encode(sr[0].float() * (255 / args.rgb_range))


def cache_outputs(crops, teachers, paths, device, args):
    """Compute the outputs of each teacher, loaded from `paths`, that are not cached yet; `crops` then contain them."""
    for net, path in zip(teachers, paths):
        kind = kind_of(path, args)
        net = net.eval().to(device, memory_format=torch.channels_last)
        for images in crops.sets:
            with images.cache.building(kind):
                for index in progress(range(len(images)), f"outputs of {path} for {images.name}"):
                    images.teacher_output(index, kind, partial(teacher_output, net, images, index, device, args))
        crops.teacher_kinds.append(kind)


def uncached_uses(loss, views):
    """Return what runs a teacher in every step in spite of its cached outputs: such as 'TS (zoom_in)'"""
    more = {"features", "teacher_grad", "teacher_net"}
    found = [f"{name} (original batch)" for name in loss.names if loss.terms[name].needs & more]
    found += [f"{name} ({view.name})" for view in views for name in loss.terms_on(view.name, view.has_hr)
              if loss.terms[name].needs & {"teacher", "teacher_net"}]
    return found


def prepare(crops, loss, setting, paths, device):
    """Make `crops` contain cached teacher outputs if that spares a run of the teacher, and log what still runs it.

    Raises UserError if no term of the loss uses a teacher.
    """
    needs = loss.needs_on("original", True)
    running = ", ".join(uncached_uses(loss, setting.views))
    if not needs & {"teacher", "teacher_net"}:
        raise UserError(f"--cache_teacher: no term of {setting.args.loss} uses a teacher")
    if "teacher" not in needs or needs & {"features", "teacher_grad"}:
        log.info("--cache_teacher spares nothing here: the teacher runs on every batch for %s", running)
        return
    cache_outputs(crops, setting.teachers, paths, device, setting.args)
    log.info("teacher outputs for the original batch are cached, %s; %s", ", ".join(crops.teacher_kinds),
             f"the teacher still runs for {running}" if running else "the teacher is not run during training")
