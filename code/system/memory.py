"""How many bytes of tensors, or of arrays, a computation holds at once."""
import tracemalloc

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Adds up the bytes of the tensors made in it, forward and backward, as long as they live; `peak`, the most at once.

    What was there before (inputs, weights) and views of it do not count, nor does what kernels need inside.
    """
    peak = 0

    def __init__(self):
        super().__init__()
        self.live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not any(result.alias_info for result in function._schema.returns):  # else a view, or written in place
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def peak_memory(function, device):
    """(function(), most bytes at once beyond what was there): by the allocator on a GPU, by LiveMemory elsewhere."""
    if device.type != "cuda":
        with LiveMemory() as memory:
            return function(), memory.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def array_memory(function, device):
    """(function(), most bytes of numpy arrays at once): what Python and numpy ask for, without memory-mapped files."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def memory_from_shapes(function):
    """The most bytes at once of function(), which is not run: its tensors have shapes and no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        function()
    return memory.peak
