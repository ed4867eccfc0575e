"""A pair of implementations to compare, and the settings of the comparison."""
from collections.abc import Callable
from typing import NamedTuple

import torch

from system.memory import peak_memory


class Comparison(NamedTuple):
    """This implementation and the reference implementation: two functions that return tuples of tensors.

    setting: the sizes, for the table.
    tolerance: largest difference of the results, relative to the largest value of each tensor; None where they are random.
    exact: computes the result that is compared with `ours` where the reference is an approximation.
    remark: given (result, bytes) of the reference and of `exact`, returns a note on them.
    arithmetic: "float32", "TF32" or "bf16", for the peak FLOP/s of the device.
    from_shapes: whether the memory may be computed on fake tensors; False for functions with side effects.
    measure_memory: function(implementation, device) that returns the result and the peak bytes.
    close: removes temporary files.
    """

    setting: str
    ours: Callable
    reference: Callable
    tolerance: float | None
    exact: Callable | None = None
    remark: Callable | None = None
    arithmetic: str = "float32"
    from_shapes: bool = True
    measure_memory: Callable = peak_memory
    close: Callable = lambda: None


def convolution_arithmetic(device: torch.device) -> str:
    """Return the arithmetic of float32 convolutions: by default PyTorch lets cuDNN use TF32, but not matrix products."""
    return "TF32" if device.type == "cuda" else "float32"
