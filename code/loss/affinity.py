"""Spatial affinity and its relatives: L1 between N x N matrices of similarities of positions, N = H W.

FAKD: Feature-affinity Based Knowledge Distillation (He et al., ICIP 2020). The published code builds the matrices, 17 GB for
one 256 x 256 map. Here a strip of rows exists at a time, loss and gradient are formed from it in one pass, and of the
symmetric matrices only the upper triangle is computed.
"""
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from loss.step import Term

EPSILON = 1e-8
STRIP = 1 << 19  # numbers in a strip: 2 MB of float32, which a core's cache holds


def affinity_l1(student, teacher, polynomial=None):
    """L1, mean over B x N x N, between the cosine similarities of all pairs of positions of two maps.

    student, teacher: B x C x H x W, their C may differ -> scalar. `polynomial` (c0, c1, ...) is applied to each similarity
    before they are compared. Memory beyond the inputs grows with N, not N^2; not differentiable twice.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"maps of {tuple(student.shape)} and {tuple(teacher.shape)} have no common positions")
    return _AffinityL1.apply(_unit_rows(student), _unit_rows(teacher), polynomial)


def _unit_rows(x):
    """B x C x H x W -> B x N x C, each position's vector divided by its norm + 1e-8."""
    rows = x.flatten(2).transpose(1, 2).contiguous()
    return rows / (rows.norm(dim=2, keepdim=True) + EPSILON)


class _AffinityL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, polynomial):
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradients = [torch.zeros_like(rows) if needed else None
                     for rows, needed in zip((student, teacher), ctx.needs_input_grad)]
        pairs = student.shape[0] * student.shape[1] ** 2
        for image in range(student.shape[0]):
            of_image = [None if gradient is None else gradient[image] for gradient in gradients]
            total += _accumulate(student[image], teacher[image], polynomial, of_image)
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(2 / pairs)  # each similarity has two ends
        ctx.gradients = gradients
        return (total / pairs).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(None if gradient is None else gradient * grad for gradient in ctx.gradients), None


def _accumulate(student, teacher, polynomial, gradients):
    """Sum over all pairs of one image, N x C each; adds sign(difference) x rows to the gradients that are wanted."""
    n = student.shape[0]
    height = max(1, min(n, STRIP // n))
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for start in range(0, n, height):
        stop = min(start + height, n)
        strips = [_similarities(rows, start, stop, polynomial) for rows in (student, teacher)]
        difference = strips[0][0].sub_(strips[1][0])
        diagonal, beyond = difference[:, :stop - start], difference[:, stop - start:]
        for part, weight in ((diagonal, 1), (beyond, 2)):
            total += weight * torch.linalg.vector_norm(part, 1)
        sign = difference.sign_()
        for gradient, rows, slope, direction in zip(gradients, (student, teacher), (s[1] for s in strips), (1, -1)):
            if gradient is None:
                continue
            weighted = sign if slope is None else sign * slope
            gradient[start:stop].addmm_(weighted, rows[start:], alpha=direction)
            gradient[stop:].addmm_(weighted[:, stop - start:].T, rows[start:stop], alpha=direction)
    return total


def _similarities(rows, start, stop, polynomial):
    """Similarities of rows start..stop with rows start.. and, under a polynomial, its slope there (else None)."""
    cosine = rows[start:stop] @ rows[start:].T
    if polynomial is None:
        return cosine, None
    value, slope = torch.full_like(cosine, polynomial[-1]), torch.zeros_like(cosine)
    for coefficient in polynomial[-2::-1]:  # Horner's scheme for the value and its derivative together
        slope.mul_(cosine).add_(value)
        value.mul_(cosine).add_(coefficient)
    return value, slope


def pool(x, args):
    """--pool_size x --pool_size pooling with the same stride; a partial window at the border counts."""
    pooling = {"max": F.max_pool2d, "avg": F.avg_pool2d}[args.pool_type]
    return pooling(x, args.pool_size, args.pool_size, ceil_mode=True) if args.pool_size > 1 else x


class SpatialAffinity(Term):
    """SA: cosine similarity of all pairs of positions, summed over the maps of --features."""
    needs = frozenset({"teacher", "features"})
    polynomial = None

    def __init__(self, setting):
        super().__init__(setting)
        self.args = setting.args

    def prepare(self, x):
        return x.float()

    def forward(self, step):
        return sum(affinity_l1(self.prepare(step.student.features[index]), self.prepare(step.teacher.features[index]),
                               self.polynomial) for index in self.args.features)


class PooledSpatialAffinity(SpatialAffinity):
    """PSA: SA of the pooled maps."""

    def prepare(self, x):
        return pool(x.float(), self.args)


class RadialBasisFunction(PooledSpatialAffinity):
    """RBF: Gaussian kernel of positions of the pooled maps, exp(-2 gamma (1 - s)) in the cosine s, by its Taylor series

    sum over p = 0..P of exp(-2 gamma) (2 gamma)^p / p! s^p. (Peng et al., ICCV 2019, in FAKD's code.)
    """

    def __init__(self, setting):
        super().__init__(setting)
        gamma = self.args.rbf_gamma
        self.polynomial = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(self.args.P + 1)]
