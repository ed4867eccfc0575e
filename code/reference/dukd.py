"""A training step of DUKD (Zhang et al., 2023) as in its published code, to compare results, time and memory with.

There the student is updated twice: with the loss on the original batch, then with that on zoom-in and zoom-out, without
clearing the gradients of the first update before the second. The teacher runs with a graph, and the backward pass computes
gradients of its weights; each view has forward passes of its own; zoom-in takes the same tiles from all images, and label
consistency acts on it alone; LR is downscaled on the CPU, image by image. Label consistency is undone in the correct order
here, unlike in the published code: see the table of departures in scripts/README.md.
"""
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import option
from data import degrade
from data.views import plan
from distiller import build_distiller
from loss import Context, build_loss
from schedule import make_optimizer

FLIP_AXES = {1: (2,), 2: (1,)}  # operation: axes of 3 x H x W


def perturb(image: torch.Tensor, operations: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Apply the operations of label consistency to an image 3 x H x W in [0, 255], or undo them.

    operations: four booleans, for colour inversion, horizontal flip, vertical flip and transpose.
    """
    for operation in (3, 2, 1, 0) if inverse else (0, 1, 2, 3):
        if operations[operation]:
            image = (255 - image if operation == 0 else image.transpose(1, 2) if operation == 3
                     else image.flip(FLIP_AXES[operation]))
    return image


def make_views(lr: torch.Tensor, hr: torch.Tensor, scale: int, tiles: list[int],
               ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Make the original batch, zoom-in and zoom-out of a uint8 batch, as float32 pairs of LR and HR (None for zoom-in).

    tiles: the indices of the tiles of HR's s x s grid that zoom-in takes from each image.
    """
    device, (height, width) = lr.device, lr.shape[2:]
    crops = [hr[image, :, row * height:(row + 1) * height, column * width:(column + 1) * width]
             for image in range(len(hr)) for row, column in (divmod(tile, scale) for tile in tiles)]
    small = [degrade.downscale_batch(image[None].cpu(), scale, rounded=False) for image in lr]
    cropped = lr[..., :height // scale * scale, :width // scale * scale]
    return [(lr.float(), hr.float()), (torch.stack(crops).float(), None),
            (torch.cat(small).to(device), cropped.float())]


def view_loss(student: nn.Module, teacher: nn.Module, lr: torch.Tensor, hr: torch.Tensor | None,
              weights: tuple[float, float], operations: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the loss on one view: the L1 to the ground truth, where there is one, and to the teacher's output.

    weights: of the two terms. operations: N x 4, those of label consistency on the student's inputs; None without it.
    """
    if operations is None:
        sr = student(lr)
    else:
        perturbed = torch.stack([perturb(image, chosen) for image, chosen in zip(lr, operations)])
        sr = torch.stack([perturb(image, chosen, inverse=True) for image, chosen in zip(student(perturbed), operations)])
    loss = weights[1] * F.l1_loss(sr, teacher(lr))
    return loss if hr is None else loss + weights[0] * F.l1_loss(sr, hr)


def training_step(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, lr: torch.Tensor,
                  hr: torch.Tensor, tiles: list[int], operations: torch.Tensor,
                  weights: tuple[float, float] = (5, 1)) -> list[torch.Tensor]:
    """Run one iteration as in the published code, and return the loss of each view.

    operations: those of label consistency on zoom-in. The other arguments are those of `make_views` and `view_loss`.
    """
    original, zoom_in, zoom_out = make_views(lr, hr, student.scale, tiles)
    first = view_loss(student, teacher, *original, weights)
    optimizer.zero_grad()
    first.backward()
    optimizer.step()
    second = [view_loss(student, teacher, *zoom_in, weights, operations), view_loss(student, teacher, *zoom_out, weights)]
    sum(second).backward()
    optimizer.step()
    return [first, *second]


def make_step(student: nn.Module, teacher: nn.Module, flags: str, device: torch.device | str = "cpu") -> Callable:
    """Build a function (lr, hr, teacher_outputs=None) that runs a training step of this project.

    It updates the student and returns the weighted values of the terms; its arguments are those of the Distiller.
    """
    args = option.parse(flags.split())
    loss = build_loss(args.loss, Context(args, student, [teacher], device, plan(args)))
    distiller = build_distiller(args, student, [teacher], loss)
    distiller.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args, distiller.trainable_parameters())

    def step(lr, hr, teacher_outputs=None):
        optimizer.zero_grad()
        total, values, _ = distiller(lr, hr, teacher_outputs)
        total.backward()
        optimizer.step()
        return values

    return step


def make_steps(student: nn.Module, teacher: nn.Module, lr: torch.Tensor, hr: torch.Tensor,
               device: torch.device | str = "cpu", flags: str = "") -> tuple[Callable, Callable]:
    """Build two functions that run a step of the preset DUKD on a uint8 batch: this implementation and the reference.

    lr, hr: on the CPU. flags: further flags for this implementation, such as --precision bf16. Each function has its own
    copies of the networks and returns values whose sum is the loss.
    """
    scale, count = student.scale, len(lr)
    flags = (f"--template DUKD --scale {scale} --patch_size {hr.shape[2]} --batch_size {count} --zoom_in_tiles batch "
             f"--label_consistency_views zoom_in {flags}")
    step = make_step(copy.deepcopy(student), copy.deepcopy(teacher), flags, device)

    args = option.parse(flags.split())
    student, teacher = (copy.deepcopy(net).to(device) for net in (student, teacher))
    optimizer = make_optimizer(args, student.parameters())

    def reference():
        tiles = torch.multinomial(torch.ones(scale ** 2), args.n_zoom_in).tolist()
        operations = torch.rand(args.n_zoom_in * count, 4) < args.label_consistency
        return training_step(student, teacher, optimizer, lr.to(device), hr.to(device), tiles, operations)

    return lambda: step(lr, hr), reference
