"""A teacher asked once (--cache_teacher): its answer to every training image, as 16-bit fixed point in the data's cache.

Answers are kept as int16 H x W x 3, whose unit is 1/128 of a grey level of 255, from -128 to 384: rounded by 1/256 at most.
The folder's name holds what they depend on, the teacher file's content, the scale and the precision, and an entry's name
that of its image (data/cache.py); an entry is there whole or not at all, so a build that was ended goes on where it was.
"""
import hashlib
import logging
from functools import partial

import inference
import torch
from system.device import autocast
from system.errors import UserError
from tqdm import tqdm

log = logging.getLogger("sr")
MIDDLE, UNIT = 128, 1 / 128


def encode(sr):
    """3 x H x W in about [0, 255] -> int16 array H x W x 3."""
    return ((sr - MIDDLE) / UNIT).round().clamp(-2**15, 2**15 - 1).to(torch.int16).permute(1, 2, 0).cpu().numpy()


def decode(answers):
    """int16 tensor -> float32 tensor in about [0, 255]."""
    return answers.float() * UNIT + MIDDLE


def kind_of(path, args):
    """The folder, in the data's cache, of the answers of the teacher in that file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return f"SR_X{args.scale}_{digest.hexdigest()[:16]}_{args.precision}"


def answer(net, images, index, device, args):
    """The network's answer to an LR image, computed in tiles, encoded."""
    x = torch.tensor(images.lr(index)).permute(2, 0, 1)[None].float() * (args.rgb_range / 255)
    with autocast(device, args.precision):
        sr = inference.chop(net, x)
    return encode(sr[0].float() * (255 / args.rgb_range))


def ask_teachers(crops, teachers, paths, device, args):
    """Asks each teacher, from the file of the same place in `paths`, for what is not there yet; `crops` then give it."""
    for net, path in zip(teachers, paths):
        kind = kind_of(path, args)
        net = net.eval().to(device, memory_format=torch.channels_last)
        for images in crops.sets:
            bar = tqdm(range(len(images)), f"asking {path} about {images.name}", unit="image", leave=False, delay=1)
            for index in bar:
                make = partial(answer, net, images, index, device, args)
                images.answer(index, kind, make)
        crops.answers.append(kind)


def who_asks(loss, views):
    """What needs a teacher run in the loop in spite of its answers to the plain view: 'SA (original batch)', 'TS (zoom_in)' ..."""
    more = {"features", "teacher_grad", "teacher_net"}
    found = [f"{name} (original batch)" for name in loss.names if loss.terms[name].needs & more]
    found += [f"{name} ({view.name})" for view in views for name in loss.terms_on(view.name, view.has_hr)
              if loss.terms[name].needs & {"teacher", "teacher_net"}]
    return found


def prepare(crops, loss, setting, paths, device):
    """Makes `crops` give the teachers' answers where that spares a run of them; says what still runs them.

    Raises UserError where no term asks a teacher.
    """
    needs = loss.needs_on("original", True)
    running = ", ".join(who_asks(loss, setting.views))
    if not needs & {"teacher", "teacher_net"}:
        raise UserError(f"--cache_teacher: no term of {setting.args.loss} asks a teacher")
    if "teacher" not in needs or needs & {"features", "teacher_grad"}:
        log.info("--cache_teacher spares nothing here: the teacher runs on every batch for %s", running)
        return
    ask_teachers(crops, setting.teachers, paths, device, setting.args)
    log.info("the teacher's answers to the plain view are kept, %s; %s", ", ".join(crops.answers),
             f"it still runs for {running}" if running else "it does not run any more")
