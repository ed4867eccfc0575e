"""NCE: multi-scale contrast of student and teacher images (MCADKD: Ko et al., ICCVW 2025).

-(pos - logsumexp(negatives)), of cosine similarities of learned embeddings over a learned temperature. The positive of a
student's image is the teacher's of the same input, its negatives are the teacher's others. The term is 0.3 x that
of whole images + 0.7 x that of random patches, where the other patches of the same image are negatives as well.

Departs from the published code: student and teacher patches come from the same places, different ones in each image;
embeddings and temperature are learned, by the student's optimiser; `hard` keeps the more similar half of the negatives, not
all; the loss's weight is applied once. Over the negatives only, the loss falls without bound as the temperature goes to 0,
which is therefore kept at 0.01 or above, as in CLIP (Radford et al., ICML 2021).
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from system.distributed import all_gather, global_batch_size, local_shard, rank
from system.errors import UserError
from torch import nn

from loss.step import Term, images_together

SHARES = {"hybrid": {"image": 0.3, "patch": 0.7}, "image": {"image": 1}, "patch": {"patch": 1}}
WIDTHS = {"image": (3, 128), "patch": (3, 64, 128)}
TEMPERATURE, LEAST_TEMPERATURE = 0.07, 0.01


def info_nce(student, teacher, temperature, mining="hard", denominator="negatives", first=0):
    """L2-normalised embeddings, M x D and N x D, row i of the one belongs to row first + i of the other -> scalar, the mean

    over the students.

    `hard` keeps of the N - 1 negatives of each the half that is most similar, rounded up; `all` keeps all. The denominator
    is a sum over the negatives, as published, or, `standard`, over the positive as well.
    """
    count = len(teacher)
    if count < 2:
        raise ValueError("one embedding alone has no negatives")
    similarities = student @ teacher.T / temperature
    positive = similarities.diagonal(first)
    itself = torch.arange(count, device=student.device) == first + torch.arange(len(student), device=student.device)[:, None]
    candidates = similarities.masked_fill(itself, -math.inf).topk(count // 2 if mining == "hard" else count - 1).values
    if denominator == "standard":
        candidates = torch.cat([positive[:, None], candidates], 1)
    return (candidates.logsumexp(1) - positive).mean()


def draw_places(images, size, count):
    """Corners of `count` different patches in each image, from torch's generator -> their rows and columns, B x count."""
    rows, columns = (side - size + 1 for side in images.shape[2:])
    places = torch.multinomial(torch.ones(global_batch_size(len(images)), rows * columns), min(count, rows * columns))
    places = local_shard(places).to(images.device, non_blocking=True)
    return places // columns, places % columns


def crop(images, places, size):
    """B x C x H x W, corners as of `draw_places` -> the patches, (B count) x C x size x size, those of an image in a row."""
    across = torch.arange(size, device=images.device)
    rows, columns = (corners[:, :, None] + across for corners in places)  # B x count x size
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    patches = images.permute(0, 2, 3, 1)[image, rows[:, :, :, None], columns[:, :, None, :]]
    return patches.flatten(0, 1).permute(0, 3, 1, 2)


def make_embedding(widths):
    """3x3 convolutions through these widths, each with ReLU, mean over the positions, a linear layer to 256."""
    layers = [(nn.Conv2d(*pair, 3, padding=1), nn.ReLU(inplace=True)) for pair in pairwise(widths)]
    return nn.Sequential(*sum(layers, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 256))


class InfoNCE(Term):
    """NCE. Images reach the embeddings in [0, 1].

    One embedding serves student and teacher and learns from both sides, as in SimCLR (Chen et al., ICML 2020). Nothing is
    gained by mapping all to one point: with the negatives as near as the positive, the loss is the log of their number.
    """
    needs = frozenset({"teacher"})

    def __init__(self, setting):
        super().__init__(setting)
        args = self.args = setting.args
        self.shares = SHARES[args.nce_type]
        images, said = images_together(args)
        if "image" in self.shares and images < 2:
            raise UserError(f"NCE: --nce_type {args.nce_type} takes its negatives from the batch, {said} has none: 2 or "
                            "more, or --nce_type patch")
        if "patch" in self.shares:
            self.require_patches(args, images)
        self.embeddings = nn.ModuleDict({kind: make_embedding(WIDTHS[kind]) for kind in self.shares})
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))

    @staticmethod
    def require_patches(args, images):
        """Raises UserError where --nce_patches different patches are not to be had."""
        if args.nce_patch_size > args.patch_size:
            raise UserError(f"NCE: patches of --nce_patch_size {args.nce_patch_size} are larger than the training crops, "
                            f"--patch_size {args.patch_size}")
        places = (args.patch_size - args.nce_patch_size + 1) ** 2
        if args.nce_patches > places:
            raise UserError(f"NCE: --nce_patches {args.nce_patches} different patches, but --patch_size {args.patch_size} "
                            f"has {places} of --nce_patch_size {args.nce_patch_size}")
        if images * args.nce_patches < 2:
            raise UserError("NCE: one patch of one image has no negatives: give --nce_patches or --batch_size 2 or more")

    def forward(self, step):
        scale = 1 / self.args.rgb_range
        images = [x.to(self.log_temperature.dtype) * scale for x in (step.student.sr, step.teacher.sr)]
        return sum(share * self.contrast(self.embeddings[kind], *(self.patches(*images) if kind == "patch" else images))
                   for kind, share in self.shares.items())

    def patches(self, student, teacher):
        """Random patches of both, of the same places; in images smaller than the training crops as many as there are."""
        size = min(self.args.nce_patch_size, *student.shape[2:])
        places = draw_places(student, size, self.args.nce_patches)
        return crop(student, places, size), crop(teacher, places, size)

    def contrast(self, embedding, student, teacher):
        student, teacher = F.normalize(embedding(torch.cat([student, teacher])), dim=1).chunk(2)
        return info_nce(student, all_gather(teacher), self.log_temperature.exp(), self.args.nce_mining,
                        self.args.nce_denominator, rank() * len(teacher))

    @torch.no_grad()
    def update(self, step):
        self.log_temperature.clamp_(min=math.log(LEAST_TEMPERATURE))
