"""Two ways to the same end, and what benchmark.py has to know of them."""
from collections.abc import Callable
from typing import NamedTuple

from system.memory import peak_memory


class Pair(NamedTuple):
    """`ours()` and `plain()` -> a tuple of tensors each, the same up to `tolerance` x the largest value of each.

    tolerance: None where they need not be the same. right: the way whose result is ours, where plain's is not quite; remark:
    ((plain's result, its bytes), the same of the right one) -> what to say of them. arithmetic: which products' FLOP/s are
    the ceiling, of "float32", "TF32" or "bf16".
    """
    what: str
    ours: Callable
    plain: Callable
    tolerance: float | None
    right: Callable | None = None
    remark: Callable | None = None
    arithmetic: str = "float32"
    from_shapes: bool = True  # False for what changes more than tensors that it makes: it must not run without numbers
    peak: Callable = peak_memory  # (way, device) -> (its result, bytes)
    close: Callable = lambda: None


def of_convolutions(device):
    """The arithmetic of float32 convolutions: PyTorch lets cuDNN round their inputs to TF32, and no matrix product's."""
    return "TF32" if device.type == "cuda" else "float32"
