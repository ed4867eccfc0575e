"""DUKD's step the plain way, as its published code has it: what the trainer's step is compared with, in value and in cost.

The teacher runs with a graph, and the backward pass computes gradients of its weights; each view has forwards of its own;
LR is downscaled on the CPU, image by image; the student is updated twice, and the second update's gradients are added to
those of the first. The inverse of label consistency is in the right order, unlike there.
"""
import copy
from types import SimpleNamespace

import loss
import option
import torch
import torch.nn.functional as F
from data import degrade
from data.views import plan
from trainer import Trainer, make_optimizer

FLIP = {1: (2,), 2: (1,)}  # operation: axes of 3 x H x W


def perturb(image, operations, inverse=False):
    """3 x H x W in [0, 255], four booleans."""
    for operation in (3, 2, 1, 0) if inverse else (0, 1, 2, 3):
        if operations[operation]:
            image = (255 - image if operation == 0 else image.transpose(1, 2) if operation == 3
                     else image.flip(FLIP[operation]))
    return image


def plain_views(lr, hr, scale, tiles):
    """uint8 batches, and the numbers of each image's tiles -> [(name, LR, HR or None)] of float32; on LR's device."""
    device, (height, width) = lr.device, lr.shape[2:]
    crops = [hr[image, :, row * height:(row + 1) * height, column * width:(column + 1) * width]
             for image, of_image in enumerate(tiles.tolist()) for row, column in (divmod(tile, scale) for tile in of_image)]
    small = [torch.from_numpy(degrade.downscale(image.cpu().permute(1, 2, 0).numpy(), scale).transpose(2, 0, 1))
             for image in lr]
    truth = lr[..., :height // scale * scale, :width // scale * scale]
    return [("plain", lr.float(), hr.float()), ("zoom_in", torch.stack(crops).float(), None),
            ("zoom_out", torch.stack(small).to(device).float(), truth.float())]


def plain_loss(student, teacher, lr, hr, operations, weights):
    """weights: of DS and TS; operations: what each image that the student sees undergoes."""
    seen = torch.stack([perturb(image, chosen) for image, chosen in zip(lr, operations)])
    sr = torch.stack([perturb(image, chosen, inverse=True) for image, chosen in zip(student(seen), operations)])
    loss = weights[1] * F.l1_loss(sr, teacher(lr))
    return loss if hr is None else loss + weights[0] * F.l1_loss(sr, hr)


def plain_step(student, teacher, optimizer, lr, hr, tiles, operations, weights=(5, 1)):
    """One iteration; operations: for each view its images' four booleans."""
    views = plain_views(lr, hr, student.scale, tiles)
    losses = [plain_loss(student, teacher, x, y, chosen, weights) for (_, x, y), chosen in zip(views[:1], operations)]
    optimizer.zero_grad()
    losses[0].backward()
    optimizer.step()
    for (_, x, y), chosen in zip(views[1:], operations[1:]):
        losses.append(plain_loss(student, teacher, x, y, chosen, weights))
    sum(losses[1:]).backward()
    optimizer.step()
    return losses


def make_trainer(student, teacher, line, device="cpu"):
    """A Trainer that has no data and no folder: for its `step` alone."""
    args = option.parse(["--epochs", "1", "--test_every", "1", *line.split()])
    criterion = loss.Loss(args.loss, loss.Setting(args, student, [teacher], device, plan(args))).to(device)
    return Trainer(args, student, [teacher], criterion, None, [], SimpleNamespace(state=None), torch.device(device))


def two_ways(student, teacher, lr, hr, device="cpu", more=""):
    """-> (ours, plain): functions that each do one step of the template DUKD on a batch of uint8 on the CPU.

    Each has copies of the networks of its own; `more`: further flags for ours, such as --precision bf16.
    """
    scale, count = student.scale, len(lr)
    loop = make_trainer(copy.deepcopy(student), copy.deepcopy(teacher),
                        f"--template DUKD --scale {scale} --patch_size {hr.shape[2]} --batch_size {count} {more}", device)
    pupil, master = (copy.deepcopy(net).to(device) for net in (student, teacher))
    optimizer = make_optimizer(loop.args, pupil.parameters())
    tiles = loop.args.n_zoom_in

    def plain():
        drawn = torch.multinomial(torch.ones(count, scale ** 2), tiles)
        operations = [torch.rand(many, 4) < loop.args.label_consistency for many in (count, tiles * count, count)]
        return plain_step(pupil, master, optimizer, lr.to(device), hr.to(device), drawn, operations)
    return lambda: loop.step(lr, hr), plain
