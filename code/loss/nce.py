"""NCE: multi-scale InfoNCE between student and teacher images (MCADKD: Ko et al., ICCVW 2025).

-(pos - logsumexp(negatives)) of the cosine similarities of learned embeddings, divided by a learned temperature, one for
images and one for patches. The positive of a student image is the teacher image of the same input, its negatives are the
other teacher images of the batch. The term is 0.3 x that of whole images + 0.7 x that of random patches, where the other
patches of the same image are negatives too.

Departs from the published code, see the table of departures in scripts/README.md: student and teacher patches are cropped at
the same places, different ones in each image; embeddings and temperatures are trained, by the student's optimiser; `hard`
keeps the most similar half of the negatives, not all. With the negatives alone in the denominator, the loss has no lower
bound as a temperature goes to 0; each is therefore kept at 0.01 or above, as in CLIP (Radford et al., ICML 2021).
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from loss.term import Context, LossInputs, Term
from system.distributed import all_gather, global_batch_size, local_shard, rank
from system.errors import UserError

SHARES = {"hybrid": {"image": 0.3, "patch": 0.7}, "image": {"image": 1}, "patch": {"patch": 1}}
WIDTHS = {"image": (3, 128), "patch": (3, 64, 128)}
TEMPERATURE, MIN_TEMPERATURE = 0.07, 0.01


def info_nce(student: torch.Tensor, teacher: torch.Tensor, temperature: torch.Tensor | float, mining: str = "hard",
             denominator: str = "negatives", first: int = 0) -> torch.Tensor:
    """Compute InfoNCE of L2-normalised embeddings M x D and N x D, mean over the M student embeddings.

    Row i of `student` and row first + i of `teacher` are a positive pair. mining: `hard` keeps the most similar half,
    rounded up, of the N - 1 negatives of each, `all` keeps all. denominator: `negatives`, a sum over the negatives as
    published, or `standard`, over the positive too. Raises ValueError where there are no negatives.
    """
    count = len(teacher)
    if count < 2:
        raise ValueError("a single embedding has no negatives")
    similarities = student @ teacher.T / temperature
    positive = similarities.diagonal(first)
    rows, columns = (torch.arange(size, device=student.device) for size in (len(student), count))
    is_positive = columns == first + rows[:, None]
    candidates = similarities.masked_fill(is_positive, -math.inf).topk(count // 2 if mining == "hard" else count - 1).values
    if denominator == "standard":
        candidates = torch.cat([positive[:, None], candidates], 1)
    return (candidates.logsumexp(1) - positive).mean()


def draw_places(images: torch.Tensor, size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the corners of `count` different patches in each image: their rows and columns, B x count each."""
    rows, columns = (side - size + 1 for side in images.shape[2:])
    places = torch.multinomial(torch.ones(global_batch_size(len(images)), rows * columns), min(count, rows * columns))
    places = local_shard(places).to(images.device, non_blocking=True)
    return places // columns, places % columns


def crop(images: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], size: int) -> torch.Tensor:
    """Crop patches at the corners of `draw_places`: B x C x H x W -> (B count) x C x size x size, image after image."""
    across = torch.arange(size, device=images.device)
    rows, columns = (corners[:, :, None] + across for corners in places)  # B x count x size
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    patches = images.permute(0, 2, 3, 1)[image, rows[:, :, :, None], columns[:, :, None, :]]
    return patches.flatten(0, 1).permute(0, 3, 1, 2)


def make_embedding(widths: tuple[int, ...]) -> nn.Sequential:
    """Build 3x3 convolutions of these widths, each with ReLU, global average pooling, and a linear layer to 256."""
    layers = [(nn.Conv2d(*pair, 3, padding=1), nn.ReLU(inplace=True)) for pair in pairwise(widths)]
    return nn.Sequential(*sum(layers, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 256))


class InfoNCE(Term):
    """NCE: InfoNCE of whole images, of patches, or of both (kind image, patch, hybrid).

    patches, patch_size: crops per image and their side in HR pixels. Images are in [0, rgb_range], and are scaled to
    [0, 1]. Student and teacher share one embedding network, which is trained on both, as in SimCLR (Chen et al., ICML 2020).
    It does not collapse: where all embeddings are equal, the loss is the logarithm of the number of negatives.
    """

    needs = frozenset({"teacher"})

    def __init__(self, kind: str = "hybrid", mining: str = "hard", denominator: str = "negatives", patches: int = 8,
                 patch_size: int = 48, rgb_range: float = 255):
        super().__init__()
        self.shares = SHARES[kind]
        self.settings = dict(mining=mining, denominator=denominator)
        self.n_patches, self.patch_size, self.rgb_range = patches, patch_size, rgb_range
        self.embeddings = nn.ModuleDict({kind: make_embedding(WIDTHS[kind]) for kind in self.shares})
        self.log_temperatures = nn.ParameterDict({kind: torch.tensor(math.log(TEMPERATURE)) for kind in self.shares})

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the sum of InfoNCE over images and patches, each times its share."""
        scale = 1 / self.rgb_range
        dtype = next(self.embeddings.parameters()).dtype
        images = [x.to(dtype) * scale for x in (inputs.student.sr, inputs.teacher.sr)]
        return sum(share * self.contrast(kind, *(self.patches(*images) if kind == "patch" else images))
                   for kind, share in self.shares.items())

    def patches(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop random patches of both at the same positions; fewer and smaller ones where the images are small."""
        size = min(self.patch_size, *student.shape[2:])
        places = draw_places(student, size, self.n_patches)
        return crop(student, places, size), crop(teacher, places, size)

    def contrast(self, kind: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compute InfoNCE of images or patches, with those of the teacher in all processes as negatives."""
        student, teacher = F.normalize(self.embeddings[kind](torch.cat([student, teacher])), dim=1).chunk(2)
        return info_nce(student, all_gather(teacher), self.log_temperatures[kind].exp(), first=rank() * len(teacher),
                        **self.settings)

    @torch.no_grad()
    def update(self, inputs: LossInputs) -> None:
        """Keep the temperatures at MIN_TEMPERATURE or above."""
        for temperature in self.log_temperatures.values():
            temperature.clamp_(min=math.log(MIN_TEMPERATURE))


TERMS = {"NCE": InfoNCE}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags; raises UserError where batch or patches give no negatives."""
    args = context.args
    images, flags = context.images_per_step()
    kinds = SHARES[args.nce_type]
    if "image" in kinds and images < 2:
        raise UserError(f"NCE: --nce_type {args.nce_type} takes its negatives from the batch, {flags} has none: give "
                        "2 or more, or --nce_type patch")
    if "patch" in kinds:
        if args.nce_patch_size > args.patch_size:
            raise UserError(f"NCE: patches of --nce_patch_size {args.nce_patch_size} are larger than the training crops, "
                            f"--patch_size {args.patch_size}")
        places = (args.patch_size - args.nce_patch_size + 1) ** 2
        if args.nce_patches > places:
            raise UserError(f"NCE: --nce_patches {args.nce_patches} different patches, but --patch_size {args.patch_size} "
                            f"has {places} of --nce_patch_size {args.nce_patch_size}")
        if images * args.nce_patches < 2:
            raise UserError("NCE: one patch of one image has no negatives: give --nce_patches or --batch_size 2 or more")
    return InfoNCE(args.nce_type, args.nce_mining, args.nce_denominator, args.nce_patches, args.nce_patch_size,
                   args.rgb_range)
