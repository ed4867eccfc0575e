"""Steps of training and what feeds them: DUKD's step, a teacher asked once, decoded images, bfloat16."""
import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import option
import torch
from checkpoint import save_model
from data import Crops, degrade
from data.image import write_image
from data.teacher_cache import cache_outputs
from model.edsr import EDSR
from system.device import autocast
from system.memory import array_memory
from torch.nn import functional as F
from torch.utils.data import default_collate

from reference.dukd import make_trainer, two_ways
from reference.pair import Pair, of_convolutions

SCALE = 4
BATCH = {"cuda": 16, "cpu": 2}  # of the networks' steps
CROPS = 16  # of the batch that is only read
STUDENT = dict(n_resblocks=8, n_feats=32)
TEACHER = dict(n_resblocks=16, n_feats=88)  # 10.5 times the student's FLOPs
PHOTO = 1356, 2040  # of DIV2K, HR pixels
EDSR_SIZES = dict(n_resblocks=16, n_feats=64)  # of the template EDSR_baseline; for precision
TOLERANCE = 3e-2  # of bfloat16: it rounds by up to 1 / 512, in each of some fifty layers forward and backward


def dukd_step(side, device):
    """The template DUKD: the trainer's step against that of the published code, which updates the student twice."""
    count = BATCH[device.type]
    lr, hr = (torch.randint(256, (count, 3, size, size), dtype=torch.uint8) for size in (side // SCALE, side))
    ours, plain = two_ways(EDSR(SCALE, **STUDENT), EDSR(SCALE, **TEACHER), lr, hr, device)
    return Pair(f"{count} crops, x{SCALE}", ours, plain, None, arithmetic=of_convolutions(device), from_shapes=False)


def teacher_cache(side, device):
    """A step of DS and TS with its reading of crops: the teacher's answers read as well, or the teacher run."""
    folder, count = TemporaryDirectory(), BATCH[device.type]
    args = photos(folder.name, (2 * side, 2 * side), side)
    student, teacher = EDSR(SCALE, **STUDENT), EDSR(SCALE, **TEACHER)
    file = Path(folder.name, "teacher.pt")
    save_model(teacher, file)
    with_answers = Crops(args)
    cache_outputs(with_answers, [teacher], [file], device, args)

    def training(crops):
        loop = make_trainer(copy.deepcopy(student), copy.deepcopy(teacher), f"--scale {SCALE} --loss 1*DS+1*TS", device)
        return lambda: (loop.step(*read(crops, count)),)

    return Pair(f"{count} crops, x{SCALE}", training(with_answers), training(Crops(args)), None,
                arithmetic=of_convolutions(device), from_shapes=False, close=folder.cleanup)


def data(side, device):
    """A batch of crops from decoded images that are memory-mapped, against decoding the PNG files for each crop."""
    folder = TemporaryDirectory()
    ours, plain = (Crops(photos(folder.name, PHOTO, side, ext)) for ext in ("sep", "img"))
    return Pair("{0} crops of {2} x {1}, x{3}".format(CROPS, *PHOTO, SCALE), lambda: read(ours, CROPS),
                lambda: read(plain, CROPS), 0, from_shapes=False, peak=array_memory, close=folder.cleanup)


def read(crops, count):
    """The first batch of a run, as a loader puts it together."""
    return default_collate([crops[number] for number in range(count)])


def photos(folder, shape, side, ext="sep", count=4):
    """Fills a data root where it is empty; the flags that train on it in crops of that side."""
    generator = torch.Generator().manual_seed(0)
    root = Path(folder, "photos")
    for name in () if root.exists() else range(count):
        smooth = F.interpolate(255 * torch.rand(1, 3, 12, 18, generator=generator), shape, mode="bicubic")
        noisy = smooth + 4 * torch.randn(smooth.shape, generator=generator)  # without, PNG files would be small
        hr = noisy[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
        write_image(root / "HR" / f"{name}.png", degrade.crop_to_multiple(hr, SCALE))
        write_image(root / "LR_bicubic" / f"X{SCALE}" / f"{name}x{SCALE}.png", degrade.downscale(hr, SCALE))
    return option.parse(["--dir_data", str(folder), "--data_train", "photos", "--scale", str(SCALE),
                         "--patch_size", str(side), "--ext", ext])


def precision(side, device):
    """A network's forward and the gradients of its weights in bf16 autocast, against float32."""
    net = EDSR(2, **EDSR_SIZES).to(device, memory_format=torch.channels_last)
    lr = 255 * torch.rand(BATCH[device.type], 3, side, side, device=device)
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def in_precision(name):
        with autocast(device, SimpleNamespace(precision=name)):
            sr = net(lr)
        towards = torch.ones_like(sr)  # not an L1's signs: those of differences near 0 are chance
        return sr.detach(), *torch.autograd.grad(sr, weights, towards)

    what = "EDSR {n_resblocks} x {n_feats}, ".format(**net.config) + f"{len(lr)} images"
    return Pair(what, lambda: in_precision("bf16"), lambda: in_precision("single"), TOLERANCE, arithmetic="bf16")
