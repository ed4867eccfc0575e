"""Contrastive loss on VGG-19 features: positives are teacher outputs, negatives are upsampled LR images of the batch.

Source: CSD, Towards Compact Single Image Super-Resolution via Contrastive Self-distillation (Wang et al., IJCAI 2021).
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from loss.frozen import compute_once
from loss.term import Context, LossInputs, Term
from loss.vgg import MIN_SIDE, shared_vgg, without_graph
from system.distributed import all_gather, all_reduce_mean, global_batch_size, local_shard
from system.errors import UserError

WEIGHTS = 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1
EPSILON = 1e-7


def contrast_l1(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], negatives: Sequence[torch.Tensor],
                chosen: torch.Tensor | None = None) -> torch.Tensor:
    """Compute sum_i w_i d(f_i(T), f_i(S)) / (sum_k d(f_i(S), f_i(N_k)) + 1e-7), d the mean absolute difference.

    student, teacher: for each level i, N x C x H x W; negatives: M x C x H x W. chosen: K x N, the index of the k-th
    negative of each of the N anchors; without it all M are negatives of every anchor. Negatives get no gradient.
    """
    total = 0
    for weight, s, t, n in zip(WEIGHTS, student, teacher, negatives, strict=True):
        rows = all_negatives(n, s) if chosen is None else chosen.to(s.device, non_blocking=True)
        apart = NegativeDistance.apply(s, n, rows)
        total = total + weight * all_reduce_mean(F.l1_loss(s, t)) / (all_reduce_mean(apart) + EPSILON)
    return total


def contrast_cos(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], negatives: Sequence[torch.Tensor],
                 chosen: torch.Tensor | None = None) -> torch.Tensor:
    """Compute sum_i w_i (-log(exp(cos(T, S)) / (exp(c) + 1e-7))), with the arguments of `contrast_l1`.

    As published: cos(T, S) is the cosine along the batch axis, mean over the other axes; for c, samples are flattened and
    normalised, their elementwise products with each negative are summed over the negatives and averaged over samples and
    elements.
    """
    total = 0
    for weight, s, t, n in zip(WEIGHTS, student, teacher, negatives, strict=True):
        near = cosine_along_batch(t, s).mean()
        rows = all_negatives(n, s) if chosen is None else chosen.to(s.device, non_blocking=True)
        products = F.normalize(s.flatten(1)) @ F.normalize(n.flatten(1)).T
        apart = all_reduce_mean(products.gather(1, rows.T).sum() / s.numel())
        total = total + weight * (torch.log(apart.exp() + EPSILON) - near)
    return total


def cosine_along_batch(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compute the cosine similarity along the batch axis: N x C x H x W each -> C x H x W."""
    products, *squares = (all_reduce_mean((x * y).sum(0)) for x, y in ((first, second), (first, first), (second, second)))
    return products / (squares[0] * squares[1]).clamp_min(1e-16).sqrt()  # the lower bound of F.cosine_similarity


def all_negatives(negatives: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return K x N indices: each of the K negatives for every one of the N anchors."""
    return torch.arange(len(negatives), device=anchors.device)[:, None].expand(-1, len(anchors))


class NegativeDistance(torch.autograd.Function):
    """Compute sum_k mean |s - n_k|, with one pass over each difference, which is not kept.

    apply(anchors, negatives, rows): N x C x H x W, M x C x H x W, and K x N indices of negatives. The gradient with respect
    to the anchors is the sum of K signs, an integer; that with respect to the negatives is not computed.
    """

    @staticmethod
    def forward(ctx, anchors: torch.Tensor, negatives: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute the distance, a scalar, and the sum of the signs."""
        signs = torch.zeros_like(anchors, dtype=torch.int8 if len(rows) < 2**7 else torch.int16)
        part, sums = 1 if anchors.device.type == "cpu" else len(anchors), []  # a single image fits into the cache of a CPU
        for images, total, chosen in zip(anchors.split(part), signs.split(part), rows.split(part, 1)):
            for row in chosen:
                difference = images - negatives[row]
                sums.append(difference.abs().sum())
                total += difference.sign_().to(signs.dtype)
        ctx.save_for_backward(signs)
        return torch.stack(sums).sum() / anchors.numel()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Compute the gradient with respect to the anchors."""
        signs, = ctx.saved_tensors
        return signs * (gradient / signs.numel()), None, None


def draw_negatives(images: int, count: int) -> torch.Tensor:
    """Draw `count` different other images for each image: count x N indices, in which each image occurs equally often."""
    shifts = 1 + torch.randperm(images - 1)[:count]
    return (torch.arange(images) + shifts[:, None]) % images


def student_features(vgg: nn.Module, inputs: LossInputs) -> list[torch.Tensor]:
    """Compute the VGG-19 features of the student's output, once for all terms."""
    return compute_once(inputs, "vgg_student", lambda: vgg(inputs.student.sr))


class ContrastiveLoss(Term):
    """CSD: contrast in VGG-19's relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.

    vgg: loss.vgg.VGG19. negatives: number of negatives of each anchor, which are other LR images of the batch, upsampled
    with PyTorch's bicubic kernel (a = -0.75, no antialiasing) as in the published code. distance: L1 or cos. Departs from
    that code, where an image can be its own negative, the inputs of VGG are in [0, 255] without ImageNet's normalisation,
    and an unused graph of teacher and negatives is kept: see the table of departures in scripts/README.md.
    """

    needs = frozenset({"teacher"})
    min_size = MIN_SIDE

    def __init__(self, vgg: nn.Module, negatives: int = 10, distance: str = "L1"):
        super().__init__()
        self.negatives = negatives
        self.contrast = {"L1": contrast_l1, "cos": contrast_cos}[distance]
        object.__setattr__(self, "vgg", vgg)  # not a submodule: it is neither trained nor saved

    def target_features(self, inputs: LossInputs) -> tuple:
        """Compute the features of teacher output and negatives, and the indices of each anchor's negatives."""
        images = global_batch_size(len(inputs.lr))
        if self.negatives > images - 1:
            raise UserError(f"CSD: --neg_num {self.negatives} negatives are other images of the batch, which has {images}")
        chosen = local_shard(draw_negatives(images, self.negatives).T).T
        used, chosen = chosen.unique(return_inverse=True)
        lr = all_gather(inputs.lr)[used.to(inputs.lr.device, non_blocking=True)]
        upsampled = F.interpolate(lr, size=inputs.student.sr.shape[-2:], mode="bicubic")
        return *without_graph(self.vgg, inputs.teacher.sr, upsampled), chosen

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the contrast of positive and negatives, a scalar."""
        return self.contrast(student_features(self.vgg, inputs), *self.target_features(inputs))


class PerceptualLoss(Term):
    """VGG: sum_i w_i L1(f_i(S), f_i(HR)) over the levels and weights of CSD.

    Source: Johnson et al., ECCV 2016, in the form of pix2pixHD (Wang et al., CVPR 2018). EDSR's code takes the squared
    difference of one layer, conv5_4.
    """

    needs = frozenset({"hr"})
    min_size = MIN_SIDE

    def __init__(self, vgg: nn.Module):
        super().__init__()
        object.__setattr__(self, "vgg", vgg)

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the weighted L1 of VGG-19 features, a scalar."""
        (target,) = without_graph(self.vgg, inputs.hr)
        student = student_features(self.vgg, inputs)
        return sum(weight * F.l1_loss(s, t) for weight, s, t in zip(WEIGHTS, student, target, strict=True))


class TeacherDataSupervision(Term):
    """T_DS: L1(T, HR), the supervision of a teacher that is trained too, in the first `iterations` (None: in all)."""

    needs = frozenset({"hr", "teacher", "teacher_grad"})

    def __init__(self, iterations: int | None = None):
        super().__init__()
        self.iterations = iterations

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute L1(T, HR), a scalar; 0 after `iterations`."""
        if self.iterations is not None and inputs.iteration >= self.iterations:
            return inputs.hr.new_zeros(())
        return F.l1_loss(inputs.teacher_sr_with_grad, inputs.hr)


TERMS = {"CSD": ContrastiveLoss, "VGG": PerceptualLoss, "T_DS": TeacherDataSupervision}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags; raises UserError where it does not fit them."""
    args = context.args
    if name == "VGG":
        return PerceptualLoss(shared_vgg(context))
    if name == "T_DS":
        if not args.width_mult:
            raise UserError("T_DS trains the teacher, which is frozen: it requires a student that is a slice of "
                            "the teacher, --width_mult")
        return TeacherDataSupervision(args.t_l_remove * args.test_every)
    images, flags = context.images_per_step()
    if args.neg_num > images - 1:
        remedy = f" or --neg_num {images - 1} at most" if images > 1 else ""
        raise UserError(f"CSD: --neg_num {args.neg_num} negatives are other images of the batch, too many for {flags}: give "
                        f"--batch_size {args.neg_num + 1} or more{remedy}")
    return ContrastiveLoss(shared_vgg(context), args.neg_num, args.d_func)
