"""Spatial affinity and its relatives: L1 between N x N matrices of similarities of positions, N = H W.

FAKD: Feature-affinity Based Knowledge Distillation (He et al., ICIP 2020). The published code builds the matrices, 17 GB for
one 256 x 256 map. Here a block of them exists at a time, loss and gradient are formed from it in one pass, and of the
symmetric matrices only the upper triangle is computed.
"""
import functools
import itertools
import logging
import math
import time

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from loss.step import Term

log = logging.getLogger("sr")
EPSILON = 1e-8
# Numbers in a block. 384 x 384 float32 take 0.6 MB: a core's second cache holds a block while it is worked on, and matrix
# products of that size, a multiple of 16, are as fast as large ones, by one thread or two. A GPU wants few and large ones.
BLOCK = 384**2
BLOCK_GPU = 4096**2
TRIAL = 8, 1999  # images and positions of the maps that decide between blocks and kernel


def affinity_l1(student, teacher, polynomial=None):
    """L1, mean over B x N x N, between the cosine similarities of all pairs of positions of two maps.

    student, teacher: B x C x H x W, their C may differ -> scalar. `polynomial` (c0, c1, ...) is applied to each similarity
    before they are compared. Memory beyond the inputs grows with N, not N^2; not differentiable twice.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"maps of {tuple(student.shape)} and {tuple(teacher.shape)} have no common positions")
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (student, teacher))
    return _AffinityL1.apply(student.flatten(2).mT, teacher.flatten(2).mT, polynomial, wanted)


class _AffinityL1(torch.autograd.Function):
    """Of rows, B x N x C. Forward forms the gradients too: a second pass over all pairs would cost as much as the first."""

    @staticmethod
    def forward(ctx, student, teacher, polynomial, wanted):
        units = [rows.clone(memory_format=torch.contiguous_format) for rows in (student, teacher)]
        norms = [rows.norm(dim=2, keepdim=True).add_(EPSILON) for rows in units]
        for rows, norm in zip(units, norms):
            rows.div_(norm)
        pairs = student.shape[0] * student.shape[1] ** 2
        total, gradients = _sum(*units, polynomial, wanted)
        ctx.gradients = [None if gradient is None else _before_division(gradient.mul_(2 / pairs), unit, norm)
                         for gradient, unit, norm in zip(gradients, units, norms)]  # 2: a similarity has two ends
        return (total / pairs).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(None if gradient is None else gradient * grad for gradient in ctx.gradients), None, None


def _before_division(gradient, unit, norm):
    """The gradient by rows, in place of that by unit = rows / norm, where norm is the rows' norm + EPSILON."""
    radial = (gradient * unit).sum(2, keepdim=True) * (norm / (norm - EPSILON).clamp_min(EPSILON**2))
    return gradient.addcmul_(unit, radial, value=-1).div_(norm)


def _sum(student, teacher, polynomial, wanted):
    """sum_in_blocks or, on a GPU where it is better, the same from loss/affinity_triton.py."""
    way = sum_in_blocks
    if student.is_cuda and student.dtype == torch.float32:
        widths = student.shape[2], teacher.shape[2]
        way = _way(student.device, widths, None if polynomial is None else tuple(polynomial), wanted)
    return way(student, teacher, polynomial, wanted)


@functools.cache
def _way(device, widths, polynomial, wanted):
    """The Triton kernel where it can be compiled, agrees with the blocks and is faster; else the blocks."""
    try:
        from loss.affinity_triton import sum_in_kernel  # noqa: PLC0415 - PyTorch without a GPU comes without triton
        faster = _is_faster(sum_in_kernel, device, widths, polynomial, wanted)
    except Exception as error:  # whatever compiler, driver or card object to, the blocks need none of it
        _log_once(f"spatial affinity without its Triton kernel: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return sum_in_blocks
    _log_once(f"spatial affinity by {'its Triton kernel' if faster else 'blocks, faster here than its Triton kernel'}")
    return sum_in_kernel if faster else sum_in_blocks


@functools.cache
def _log_once(line):
    log.info(line)


def _is_faster(kernel, device, widths, polynomial, wanted):
    """Whether `kernel` takes less time than sum_in_blocks for random rows; RuntimeError where it gives something else."""
    generator = torch.Generator(device).manual_seed(0)  # its own: a trial should not change what training draws
    units = [F.normalize(torch.randn(*TRIAL, width, generator=generator, device=device), dim=2) for width in widths]
    units[1] = F.normalize(units[1] * units[1][..., :1].sign() + 1, dim=2)  # not about 0 as well, where signs are chance
    seconds, results = [], []
    for way in (kernel, sum_in_blocks):
        times = []
        for _ in range(4):  # the first compiles
            start = time.perf_counter()
            total, gradients = way(*units, polynomial, wanted)
            value = total.item()  # waits for the GPU
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        ones = units[0].new_ones(*TRIAL, 1)
        results.append([value, *(_before_division(gradient, unit, ones)
                                 for gradient, unit in zip(gradients, units) if gradient is not None)])
    (value, *gradients), (expected, *expected_gradients) = results
    if not (abs(value - expected) <= 1e-5 * abs(expected)
            and all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(gradients, expected_gradients))):
        raise RuntimeError("its value or gradient is not that of the blocks")
    return seconds[0] < seconds[1]


def sum_in_blocks(student, teacher, polynomial, wanted):
    """Sum of |difference| over all pairs of positions, float64, and for each map whose gradient is `wanted` half of it.

    student, teacher: B x N x C, unit vectors -> scalar, [B x N x C or None] * 2
    """
    batch, n = student.shape[:2]
    side = math.isqrt(BLOCK_GPU if student.is_cuda else BLOCK)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    gradients = [torch.zeros_like(unit) if want else None for unit, want in zip((student, teacher), wanted)]
    for image, top in itertools.product(range(batch), range(0, n, side)):
        for left in range(top, n, side):
            rows, columns = (image, slice(top, top + side)), (image, slice(left, left + side))
            values, slopes = zip(*(_similarities(unit[rows], unit[columns], polynomial, want)
                                   for unit, want in zip((student, teacher), wanted)))
            difference = values[0].sub_(values[1])  # two equal maps have equal products: no rounding gets a sign
            # abs and sum, two passes, take a fifth of the time of vector_norm(1)
            total += (1 if left == top else 2) * difference.abs().sum()
            if not any(wanted):
                continue
            sign = difference.sign_()
            for gradient, unit, slope, direction in zip(gradients, (student, teacher), slopes, (1, -1)):
                if gradient is None:
                    continue
                weighted = sign if slope is None else slope.mul_(sign)
                gradient[rows].addmm_(weighted, unit[columns], alpha=direction)
                if left > top:  # the block below the diagonal is this one transposed
                    gradient[columns].addmm_(weighted.T, unit[rows], alpha=direction)
    return total, gradients


def _similarities(rows, columns, polynomial, want_slope):
    """Similarities of all rows with all columns and, under a polynomial, its slope there if wanted (else None)."""
    cosine = rows @ columns.T
    if polynomial is None:
        return cosine, None
    derivative = [p * c for p, c in enumerate(polynomial)][1:] or [0]
    return _horner(polynomial, cosine), _horner(derivative, cosine) if want_slope else None


def _horner(coefficients, x):
    """Sum over p of coefficients[p] x^p."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result.mul_(x).add_(coefficient)
    return result


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
