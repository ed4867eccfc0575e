"""How long a computation takes, how many operations it is (floating-point, two per multiply-add), how fast it could be."""
import time
from functools import cache
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDES = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product is the ceiling


def counter():
    """Mode whose `get_total_flops()` are those of the products, convolutions and attention in it, forward and backward."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={  # what PyTorch's own leaves out
        aten.addmm_: _product, aten.baddbmm_: _product, aten._scaled_dot_product_flash_attention_for_cpu: _attention})


def _product(_, a, b, **more):
    """Of matrices, or batches of them, of these shapes."""
    return 2 * prod(a) * b[-1]


def _attention(query, key, value, *_, **more):
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def seconds(function, device):
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


@cache
def ceiling(arithmetic, device):
    """FLOP/s of the fastest of ten products of large matrices, in "float32", "TF32" or "bf16"."""
    side, dtype = SIDES[device.type], torch.bfloat16 if arithmetic == "bf16" else torch.float32
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "TF32"
    try:
        fastest = min(seconds(lambda: a @ b, device) for _ in range(10))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False  # as it is in PyTorch
    return 2 * side**3 / fastest
