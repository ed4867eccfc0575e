"""Speed of a computation: its run time, its floating-point operations (two per multiply-add), and the device's peak."""
import time
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

MATRIX_SIZES = {"cuda": 8192, "cpu": 2048}  # sides of the square matrices whose product measures the device's peak


def flop_counter() -> FlopCounterMode:
    """Return a context that counts the FLOPs of matrix products, convolutions and attention, forward and backward."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={  # operators that PyTorch's own table lacks
        aten.addmm_: _matrix_product, aten.baddbmm_: _matrix_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention})


def _matrix_product(_, a, b, **kwargs):
    """Return the operations of a @ b, given the shapes of two matrices or batches of matrices."""
    return 2 * prod(a) * b[-1]


def _attention(query, key, value, *_, **kwargs):
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def run_time(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that function() takes, kernels on the GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@cache
def peak_flops(arithmetic: str, device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product, the fastest of ten, in "float32", "TF32" or "bf16"."""
    side, dtype = MATRIX_SIZES[device.type], torch.bfloat16 if arithmetic == "bf16" else torch.float32
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "TF32"
    try:
        fastest = min(run_time(lambda: a @ b, device) for _ in range(10))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False  # PyTorch's default
    return 2 * side**3 / fastest
