"""Peak memory of a computation: bytes of tensors or of numpy arrays that are alive at once."""
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Sum the bytes of all tensors that were allocated within the context and are in use, in forward and backward passes.

    `peak` is the largest sum so far. Tensors from before (inputs, weights), views of them, and the workspaces inside kernels
    are not counted.
    """

    peak = 0

    def __init__(self):
        super().__init__()
        self.live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not any(result.alias_info for result in function._schema.returns):  # else a view or an in-place operation
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def peak_memory(function: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Return the result of function() and its peak memory in bytes, beyond what was allocated before.

    On a GPU this is the peak of PyTorch's allocator, elsewhere that of `LiveMemory`.
    """
    if device.type != "cuda":
        with LiveMemory() as memory:
            return function(), memory.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def array_memory(function: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Return the result of function() and the peak bytes allocated by Python and numpy, without memory-mapped files.

    `device` is ignored: the signature is that of `peak_memory`.
    """
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def memory_from_shapes(function: Callable[[], Any]) -> int:
    """Return the peak bytes of function(), which runs on fake tensors, with shapes but without values."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        function()
    return memory.peak
