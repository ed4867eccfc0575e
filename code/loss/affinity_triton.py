"""Spatial affinity as one Triton kernel for GPUs, which stores no part of the N x N matrices in global memory.

A program handles some rows of one image and loops over all columns. It computes a tile of both matrices, sums |difference|,
and multiplies its sign with the columns' vectors into the gradient of its rows. Every pair is computed twice, in
the blocks of affinity.py once (6 products instead of 4). In return no two programs write to the same address, so that there
are no atomic operations and the result is deterministic.

Imported only where there is a GPU: `triton` is installed with PyTorch for CUDA, not with PyTorch for CPUs.
"""
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Rows of a program, columns and channels of a step. With 64 columns registers spill (compute capability 8.0, 64 channels),
# with 32 they do not, and a step takes 16 KB of shared memory.
ROWS, COLUMNS, CHANNELS = 64, 32, 32
MAX_CHANNELS = 128  # of the gradient, which is kept in registers beside a tile


@triton.jit
def _similarities(unit, rows, columns, n, channels: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Compute a tile of products of rows and columns of an N x C matrix; 0 beyond N."""
    tile = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, channels, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        left = tl.load(unit + rows[:, None] * channels + channel[None, :],
                       mask=(rows < n)[:, None] & (channel < channels)[None, :], other=0.0)
        right = tl.load(unit + columns[None, :] * channels + channel[:, None],
                        mask=(columns < n)[None, :] & (channel < channels)[:, None], other=0.0)
        tile += tl.dot(left, right, input_precision=PRECISION)
    return tile


@triton.jit
def _polynomial(cosine, coefficients, DEGREE: tl.constexpr):
    """Evaluate the polynomial without its constant, which cancels, and its slope by Horner's scheme."""
    quotient = tl.zeros_like(cosine)  # (value - constant) / cosine
    slope = tl.zeros_like(cosine)
    for k in tl.static_range(DEGREE):
        slope = slope * cosine + quotient
        quotient = quotient * cosine + tl.load(coefficients + DEGREE - k)
    return quotient * cosine, slope * cosine + quotient


@triton.jit(do_not_specialize=["n"])
def _kernel(student, teacher, coefficients, sums, gradient, n,
            STUDENT: tl.constexpr, TEACHER: tl.constexpr, DEGREE: tl.constexpr, WITH_GRADIENT: tl.constexpr,
            WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)  # 64 bits: B N C may pass 2^31
    student += image * n * STUDENT
    teacher += image * n * TEACHER
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    row_sums = tl.zeros((ROWS,), tl.float32)
    row_gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS).to(tl.int64)
        cosine = _similarities(student, rows, columns, n, STUDENT, CHUNK, PRECISION)
        other = _similarities(teacher, rows, columns, n, TEACHER, CHUNK, PRECISION)
        slope = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
        if DEGREE >= 0:
            cosine, slope = _polynomial(cosine, coefficients, DEGREE)
            other, _ = _polynomial(other, coefficients, DEGREE)
        difference = cosine - other
        row_sums += tl.sum(tl.abs(difference), 1)
        if WITH_GRADIENT:
            weighted = tl.where(difference > 0, slope, tl.where(difference < 0, -slope, 0.0))
            vectors = tl.load(student + columns[:, None] * STUDENT + channel[None, :],
                              mask=(columns < n)[:, None] & (channel < STUDENT)[None, :], other=0.0)
            row_gradient += tl.dot(weighted, vectors, input_precision=PRECISION)
    tl.store(sums + image * n + rows, row_sums, mask=rows < n)
    if WITH_GRADIENT:
        tl.store(gradient + image * n * STUDENT + rows[:, None] * STUDENT + channel[None, :], row_gradient,
                 mask=(rows < n)[:, None] & (channel < STUDENT)[None, :])


def sum_in_kernel(student: torch.Tensor, teacher: torch.Tensor, polynomial: Sequence[float] | None,
                  needs_grad: tuple[bool, bool]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Compute affinity.sum_in_blocks for float32; raises ValueError for gradients of more than MAX_CHANNELS channels."""
    total, gradients = None, [None, None]
    for index, (one, other) in enumerate(((student, teacher), (teacher, student))):
        if needs_grad[index] or (index == 0 and not any(needs_grad)):  # 1: teacher and student exchanged
            total, gradients[index] = _launch(one, other, polynomial, needs_grad[index])
    return total, gradients


def _launch(student, teacher, polynomial, needs_grad):
    """Return the sum over all pairs and half of its gradient with respect to `student`, or None."""
    batch, n, channels = student.shape
    if needs_grad and channels > MAX_CHANNELS:
        raise ValueError(f"no kernel for gradients of more than {MAX_CHANNELS} channels")
    degree, coefficients = -1, student  # not read
    if polynomial is not None:
        degree, coefficients = len(polynomial) - 1, torch.tensor(polynomial, dtype=torch.float32, device=student.device)
    sums = student.new_empty(batch, n)
    gradient = torch.empty_like(student) if needs_grad else None
    width = max(16, triton.next_power_of_2(channels)) if needs_grad else 16  # tl.dot needs at least 16
    with torch.cuda.device_of(student):  # Triton launches on the current GPU
        _kernel[(triton.cdiv(n, ROWS), batch)](
            student, teacher, coefficients, sums, gradient if needs_grad else sums, n, channels, teacher.shape[2], degree,
            needs_grad, width, CHANNELS, ROWS, COLUMNS, _precision(student.device), num_warps=4, num_stages=1)
    return sums.sum(dtype=torch.float64), gradient


def _precision(device):
    """Return the precision of tl.dot: on tensor cores three TF32 products, whose relative error is about 2^-22."""
    has_tf32 = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32x3" if has_tf32 else "ieee"
