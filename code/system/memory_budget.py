"""Memory budget of tiled inference: the free memory, and the number of pixels that a network can process within it."""
import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from system.memory import LiveMemory

# Bytes, for networks whose output depends on the tiles: the output must not depend on the memory that happens to be free.
GLOBAL_MEMORY = 1e9
CPU_MEMORY = 1e9  # bytes; with more, EDSR is at most 10 % faster, with less slower: see figure/README.md
FREE_FRACTION = 0.5  # of the free memory is used, since other processes may need some before the image is done
OVERHEAD = 1.5  # resident memory / memory of the tensors, measured up to 1.43: kernel workspaces, allocator fragmentation
MAX_OVERLAP = 160  # LR pixels; RRDB's 349 would leave nothing of a tile, and nearly all of them hardly change the result
PROBE_SIZE = 48  # side of the probe image, in pixels; for larger images the memory per pixel differs by less than 3%
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # the limit of a container
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
RETAIN = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
RELEASE = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25}  # what glibc adapts to by itself
_bytes_per_pixel = WeakKeyDictionary()  # network -> {(device, precision): bytes}
_retaining = []  # the device of the outermost retain_freed_memory, if there is one


def tiles_exactly(net: nn.Module) -> bool:
    """Return whether the tiles of a network overlap by its whole receptive field, and the result does not depend on them."""
    return net.receptive_field is not None and net.receptive_field <= MAX_OVERLAP


def default_memory(net: nn.Module, device: torch.device) -> float:
    """Return the bytes that tiles of the network may take unless --chop_mem is given."""
    if not tiles_exactly(net):
        return GLOBAL_MEMORY
    free = FREE_FRACTION * free_memory(device)
    return min(CPU_MEMORY, free) if device.type == "cpu" else free


def max_pixels(net: nn.Module, device: torch.device, memory: float) -> int:
    """Return the number of LR pixels, over all images of a batch, whose forward pass takes `memory` bytes beyond weights."""
    return int(memory / (OVERHEAD * bytes_per_pixel(net, device)))


def required_memory(net: nn.Module, device: torch.device, pixels: float) -> float:
    """Return the bytes that a forward pass on `pixels` LR pixels takes: the inverse of `max_pixels`."""
    return OVERHEAD * bytes_per_pixel(net, device) * pixels


@torch.no_grad()
def bytes_per_pixel(net: nn.Module, device: torch.device) -> float:
    """Return the peak bytes of tensors per LR pixel in inference, measured once per network on a small image."""
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    measured = _bytes_per_pixel.setdefault(net, {})
    if (device, precision) not in measured:
        lr = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device).contiguous(memory_format=torch.channels_last)
        net(lr[..., :8, :8])  # autocast caches its copies of the weights, which are not to be counted below
        with LiveMemory() as memory:
            net(lr.clone())
        measured[device, precision] = memory.peak / PROBE_SIZE**2
    return measured[device, precision]


def free_memory(device: torch.device) -> int:
    """Return the bytes available on the device; where only the installed memory can be read, half of that."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", MEMINFO.read_text())[1])
    except OSError:  # not Linux
        return installed_memory(device) // 2
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = int(re.search(r"inactive_file (\d+)", (CGROUP / "memory.stat").read_text())[1])
    except (OSError, ValueError):  # no container, or a container without a limit, whose memory.max is "max"
        return free
    return min(free, max(0, limit - used + cached))


def installed_memory(device: torch.device) -> int:
    """Return the bytes of memory that the machine, or the GPU, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def retain_freed_memory(device: torch.device) -> Iterator[None]:
    """Let malloc reuse the memory that a layer frees for the next layer, instead of returning it to the system.

    Only for CPUs. By default glibc unmaps blocks above 32 MiB at once, and every new block causes page faults: up to 40% of
    the run time of EDSR on images above 400 x 400 pixels, and 10% of a training step. Other C libraries are left as they
    are. The memory is released at the end of the outermost context.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and os.name == "posix" else None
    if not hasattr(libc, "mallopt") or _retaining:
        yield
        return
    _retaining.append(device)
    try:
        for option, value in RETAIN.items():
            libc.mallopt(option, value)
        yield
    finally:
        _retaining.clear()
        for option, value in RELEASE.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
