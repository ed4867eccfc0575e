"""Comparisons of training: a step of DUKD, cached teacher outputs, reading crops, and bf16."""
import copy
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

import option
from checkpoint import save_model
from data import Crops, degrade
from data.image import write_image
from data.teacher_cache import cache_outputs
from model.edsr import EDSR
from reference.comparison import Comparison, convolution_arithmetic
from reference.dukd import make_step, make_steps
from system.device import autocast
from system.memory import array_memory

SCALE = 4
BATCH_SIZE = {"cuda": 16, "cpu": 2}  # of training steps
CROPS = 16  # batch size where crops are only read
STUDENT = dict(n_resblocks=8, n_feats=32)
TEACHER = dict(n_resblocks=16, n_feats=88)  # 10.5 times the FLOPs of the student
HR_SIZE = 1356, 2040  # pixels, as in DIV2K
EDSR_SIZES = dict(n_resblocks=16, n_feats=64)  # the preset EDSR_baseline, for `precision`
BF16_TOLERANCE = 3e-2  # each of about fifty layers, forward and backward, rounds by up to 1 / 512


def dukd_step(side: int, device: torch.device) -> Comparison:
    """Compare a training step of the preset DUKD with one of its published code, which updates the student twice."""
    count = BATCH_SIZE[device.type]
    lr, hr = (torch.randint(256, (count, 3, size, size), dtype=torch.uint8) for size in (side // SCALE, side))
    ours, reference = make_steps(EDSR(SCALE, **STUDENT), EDSR(SCALE, **TEACHER), lr, hr, device)
    return Comparison(f"{count} crops, x{SCALE}", ours, reference, None, arithmetic=convolution_arithmetic(device),
                      from_shapes=False)


def teacher_cache(side: int, device: torch.device) -> Comparison:
    """Compare training steps with DS and TS, with cached teacher outputs and with the teacher, reading of crops included."""
    folder, count = TemporaryDirectory(), BATCH_SIZE[device.type]
    args = write_dataset(folder.name, (2 * side, 2 * side), side)
    student, teacher = EDSR(SCALE, **STUDENT), EDSR(SCALE, **TEACHER)
    file = Path(folder.name, "teacher.pt")
    save_model(teacher, file)
    cached = Crops(args)
    cache_outputs(cached, [teacher], [file], device, args)

    def training(crops):
        step = make_step(copy.deepcopy(student), copy.deepcopy(teacher), f"--scale {SCALE} --loss 1*DS+1*TS", device)
        return lambda: (step(*first_batch(crops, count)),)

    return Comparison(f"{count} crops, x{SCALE}", training(cached), training(Crops(args)), None,
                      arithmetic=convolution_arithmetic(device), from_shapes=False, close=folder.cleanup)


def data(side: int, device: torch.device) -> Comparison:
    """Compare reading crops from memory-mapped decoded images with decoding the PNG files for every crop."""
    folder = TemporaryDirectory()
    ours, reference = (Crops(write_dataset(folder.name, HR_SIZE, side, ext)) for ext in ("sep", "img"))
    return Comparison("{0} crops of {2} x {1}, x{3}".format(CROPS, *HR_SIZE, SCALE), lambda: first_batch(ours, CROPS),
                      lambda: first_batch(reference, CROPS), 0, from_shapes=False, measure_memory=array_memory,
                      close=folder.cleanup)


def first_batch(crops: Crops, count: int) -> list[torch.Tensor]:
    """Return the first batch of a run, collated as by a DataLoader."""
    return default_collate([crops[number] for number in range(count)])


def write_dataset(folder: str, hr_size: tuple[int, int], side: int, ext: str = "sep", count: int = 4) -> Namespace:
    """Write a dataset of `count` noisy images, unless it exists, and return the flags for training on it.

    hr_size: height and width in pixels. side: --patch_size, in HR pixels. ext: --ext.
    """
    generator = torch.Generator().manual_seed(0)
    root = Path(folder, "photos")
    for name in () if root.exists() else range(count):
        smooth = F.interpolate(255 * torch.rand(1, 3, 12, 18, generator=generator), hr_size, mode="bicubic")
        noisy = smooth + 4 * torch.randn(smooth.shape, generator=generator)  # so that PNG files are as large as photos'
        hr = noisy[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
        write_image(root / "HR" / f"{name}.png", degrade.crop_to_multiple(hr, SCALE))
        write_image(root / "LR_bicubic" / f"X{SCALE}" / f"{name}x{SCALE}.png", degrade.downscale(hr, SCALE))
    return option.parse(["--dir_data", str(folder), "--data_train", "photos", "--scale", str(SCALE),
                         "--patch_size", str(side), "--ext", ext])


def precision(side: int, device: torch.device) -> Comparison:
    """Compare forward and backward passes of EDSR in bf16 autocast with float32."""
    net = EDSR(2, **EDSR_SIZES).to(device, memory_format=torch.channels_last)
    lr = 255 * torch.rand(BATCH_SIZE[device.type], 3, side, side, device=device)
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def forward_backward(precision):
        with autocast(device, precision):
            sr = net(lr)
        # not the gradient of an L1 loss, whose signs of differences near 0 depend on rounding
        return sr.detach(), *torch.autograd.grad(sr, weights, torch.ones_like(sr))

    setting = "EDSR {n_resblocks} x {n_feats}, ".format(**net.config) + f"{len(lr)} images"
    return Comparison(setting, lambda: forward_backward("bf16"), lambda: forward_backward("single"), BF16_TOLERANCE,
                      arithmetic="bf16")
