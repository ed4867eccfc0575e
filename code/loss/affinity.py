"""Spatial affinity: L1 between N x N matrices of the similarities of all pairs of positions, N = H W.

Source: FAKD, Feature-affinity Based Knowledge Distillation (He et al., ICIP 2020). The published code stores the matrices,
17 GB for one 256 x 256 feature map (table of departures in scripts/README.md). Here one block exists at a time, from which
loss and gradient are computed in one pass, and only the upper triangle of the symmetric matrices is computed.
"""
import functools
import itertools
import logging
import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from loss.term import Context, LossInputs, Term
from system.errors import UserError

log = logging.getLogger("sr")
EPSILON = 1e-8
# Elements of a block. 384 x 384 float32 take 0.6 MB, which fits in a core's L2 cache, and matrix products of that size, a
# multiple of 16, are as fast as large ones, with one thread or two. A GPU needs few and large blocks.
BLOCK = 384**2
BLOCK_GPU = 4096**2
TRIAL = 8, 1999  # images and positions of the feature maps for timing blocks and kernel


def affinity_l1(student: torch.Tensor, teacher: torch.Tensor, polynomial: Sequence[float] | None = None) -> torch.Tensor:
    """Compute the L1, mean over B x N x N, between the spatial affinities (cosine similarities) of two feature maps.

    student, teacher: B x C x H x W, their C may differ. Returns a scalar. The polynomial c0 + c1 s + ... is applied to each
    similarity s before they are compared. Memory beyond the inputs grows with N, not N^2. Differentiable once.
    Raises ValueError where batch size, height or width differ.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"feature maps {tuple(student.shape)} and {tuple(teacher.shape)} differ in batch size, height or "
                         "width")
    needs_grad = tuple(torch.is_grad_enabled() and x.requires_grad for x in (student, teacher))
    return _AffinityL1.apply(student.flatten(2).mT, teacher.flatten(2).mT, polynomial, needs_grad)


class _AffinityL1(torch.autograd.Function):
    """Loss of B x N x C; forward computes the gradients too, since a second pass over all pairs would take as long again."""

    @staticmethod
    def forward(ctx, student, teacher, polynomial, needs_grad):
        units = [rows.clone(memory_format=torch.contiguous_format) for rows in (student, teacher)]
        norms = [rows.norm(dim=2, keepdim=True).add_(EPSILON) for rows in units]
        for rows, norm in zip(units, norms):
            rows.div_(norm)
        pairs = student.shape[0] * student.shape[1] ** 2
        total, gradients = _sum(*units, polynomial, needs_grad)
        ctx.gradients = [None if gradient is None else _before_division(gradient.mul_(2 / pairs), unit, norm)
                         for gradient, unit, norm in zip(gradients, units, norms)]  # 2: by both positions of a pair
        return (total / pairs).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(None if gradient is None else gradient * grad for gradient in ctx.gradients), None, None


def _before_division(gradient, unit, norm):
    """Turn, in place, the gradient with respect to unit = rows / (|rows| + EPSILON) into that with respect to rows."""
    radial = (gradient * unit).sum(2, keepdim=True) * (norm / (norm - EPSILON).clamp_min(EPSILON**2))
    return gradient.addcmul_(unit, radial, value=-1).div_(norm)


def _sum(student, teacher, polynomial, needs_grad):
    """Call sum_in_blocks or, on a GPU where it is faster, the Triton kernel of loss/affinity_triton.py."""
    implementation = sum_in_blocks
    if student.is_cuda and student.dtype == torch.float32:
        widths = student.shape[2], teacher.shape[2]
        implementation = _choose(student.device, widths, None if polynomial is None else tuple(polynomial), needs_grad)
    return implementation(student, teacher, polynomial, needs_grad)


@functools.cache
def _choose(device, widths, polynomial, needs_grad):
    """Return the Triton kernel if it can be compiled, agrees with the blocks and is faster; else sum_in_blocks."""
    try:
        from loss.affinity_triton import sum_in_kernel  # noqa: PLC0415 - PyTorch for CPUs has no triton
        faster = _is_faster(sum_in_kernel, device, widths, polynomial, needs_grad)
    except Exception as error:  # failures of compiler, driver or GPU have no common class; the blocks need none of them
        _log_once(f"spatial affinity without its Triton kernel: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return sum_in_blocks
    chosen = "the Triton kernel" if faster else "blocks, which are faster than the Triton kernel on this GPU"
    _log_once(f"spatial affinity: {chosen}")
    return sum_in_kernel if faster else sum_in_blocks


@functools.cache
def _log_once(line):
    log.info(line)


def _is_faster(kernel, device, widths, polynomial, needs_grad):
    """Return whether `kernel` is faster than sum_in_blocks on random rows; raises RuntimeError where the results differ."""
    generator = torch.Generator(device).manual_seed(0)  # not the global one, whose numbers training uses
    units = [F.normalize(torch.randn(*TRIAL, width, generator=generator, device=device), dim=2) for width in widths]
    units[1] = F.normalize(units[1] * units[1][..., :1].sign() + 1, dim=2)  # similarities not around 0
    seconds, results = [], []
    for implementation in (kernel, sum_in_blocks):
        times = []
        for _ in range(4):  # the first run compiles the kernel
            start = time.perf_counter()
            total, gradients = implementation(*units, polynomial, needs_grad)
            value = total.item()  # waits for the GPU
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        ones = units[0].new_ones(*TRIAL, 1)
        results.append([value, *(_before_division(gradient, unit, ones)
                                 for gradient, unit in zip(gradients, units) if gradient is not None)])
    (value, *gradients), (expected, *expected_gradients) = results
    if not (abs(value - expected) <= 1e-5 * abs(expected)
            and all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(gradients, expected_gradients))):
        raise RuntimeError("its value or gradient differs from that of the blocks")
    return seconds[0] < seconds[1]


def sum_in_blocks(student: torch.Tensor, teacher: torch.Tensor, polynomial: Sequence[float] | None,
                  needs_grad: tuple[bool, bool]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Sum |difference of similarities| over all pairs of positions.

    student, teacher: unit vectors B x N x C. Returns the sum in float64, and a list of half its gradient (B x N x C) with
    respect to each of the two where it is needed, else None.
    """
    batch, n = student.shape[:2]
    side = math.isqrt(BLOCK_GPU if student.is_cuda else BLOCK)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    gradients = [torch.zeros_like(unit) if needed else None for unit, needed in zip((student, teacher), needs_grad)]
    for image, top in itertools.product(range(batch), range(0, n, side)):
        for left in range(top, n, side):
            rows, columns = (image, slice(top, top + side)), (image, slice(left, left + side))
            values, slopes = zip(*(_similarities(unit[rows], unit[columns], polynomial, needed)
                                   for unit, needed in zip((student, teacher), needs_grad)))
            difference = values[0].sub_(values[1])  # exactly 0 for equal inputs: their products are rounded alike
            # abs and sum, two passes, take a fifth of the time of vector_norm(1)
            total += (1 if left == top else 2) * difference.abs().sum()
            if not any(needs_grad):
                continue
            sign = difference.sign_()
            for gradient, unit, slope, direction in zip(gradients, (student, teacher), slopes, (1, -1)):
                if gradient is None:
                    continue
                weighted = sign if slope is None else slope.mul_(sign)
                gradient[rows].addmm_(weighted, unit[columns], alpha=direction)
                if left > top:  # the block below the diagonal is the transpose
                    gradient[columns].addmm_(weighted.T, unit[rows], alpha=direction)
    return total, gradients


def _similarities(rows, columns, polynomial, with_slope):
    """Return the similarities of all rows with all columns, and with_slope the slope of the polynomial there, else None."""
    cosine = rows @ columns.T
    if polynomial is None:
        return cosine, None
    derivative = [p * c for p, c in enumerate(polynomial)][1:] or [0]
    return _horner(polynomial, cosine), _horner(derivative, cosine) if with_slope else None


def _horner(coefficients, x):
    """Evaluate the sum over p of coefficients[p] x^p."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result.mul_(x).add_(coefficient)
    return result


def pool(x: torch.Tensor, size: int, kind: str = "max") -> torch.Tensor:
    """Pool with `size` x `size` windows and the same stride; partial windows at the border count. kind: max or avg."""
    pooling = {"max": F.max_pool2d, "avg": F.avg_pool2d}[kind]
    return pooling(x, size, size, ceil_mode=True) if size > 1 else x


class SpatialAffinity(Term):
    """SA: sum over the feature maps `features` of the L1 between the spatial affinities of student and teacher."""

    needs = frozenset({"teacher", "features"})
    polynomial = None

    def __init__(self, features: Sequence[int] = (1, 2, 3)):
        super().__init__()
        self.features = tuple(features)

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Transform a feature map B x C x H x W before its affinity is computed."""
        return x.float()

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the L1 between spatial affinities, summed over the feature maps."""
        return sum(affinity_l1(self.prepare(inputs.student.features[index]), self.prepare(inputs.teacher.features[index]),
                               self.polynomial) for index in self.features)


class PooledSpatialAffinity(SpatialAffinity):
    """PSA: SA of pooled feature maps."""

    def __init__(self, features: Sequence[int] = (1, 2, 3), pool_size: int = 1, pool_type: str = "max"):
        super().__init__(features)
        self.pool_size, self.pool_type = pool_size, pool_type

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Pool a feature map B x C x H x W."""
        return pool(x.float(), self.pool_size, self.pool_type)


class RadialBasisFunction(PooledSpatialAffinity):
    """RBF: Gaussian kernel exp(-2 gamma (1 - s)) of the cosine similarities s of pooled feature maps.

    Computed as its Taylor series, the sum over p = 0..order of exp(-2 gamma) (2 gamma)^p / p! s^p.
    Source: Peng et al., ICCV 2019, in FAKD's code. Raises UserError where all coefficients vanish in float32.
    """

    def __init__(self, features: Sequence[int] = (1, 2, 3), pool_size: int = 1, pool_type: str = "max", order: int = 2,
                 gamma: float = 5):
        super().__init__(features, pool_size, pool_type)
        largest = max(p * math.log(2 * gamma) - math.lgamma(p + 1) for p in range(order + 1)) - 2 * gamma
        if largest < math.log(torch.finfo(torch.float32).tiny):
            raise UserError(f"--rbf_gamma {gamma:g}: with --P {order} every coefficient of the RBF kernel vanishes in "
                            "single precision (it is below 1e-38); give a smaller gamma, or a larger --P")
        self.polynomial = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]


TERMS = {"SA": SpatialAffinity, "PSA": PooledSpatialAffinity, "RBF": RadialBasisFunction}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags."""
    args, settings = context.args, dict(features=context.args.features)
    if name != "SA":
        settings |= dict(pool_size=args.pool_size, pool_type=args.pool_type)
    if name == "RBF":
        settings |= dict(order=args.P, gamma=args.rbf_gamma)
    return TERMS[name](**settings)
