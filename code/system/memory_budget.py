"""How many pixels a network may compute at once: the memory that is free, and what it takes per pixel."""
import ctypes
import os
import re
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from system.memory import LiveMemory

GLOBAL_MEMORY = 1e9  # bytes, for networks whose result depends on the tiles: not for the free memory of the moment to say
SHARE = 0.5  # of the free memory: others may want some of it before the image is done
MARGIN = 1.5  # resident memory / that of the tensors, up to 1.43 here: what kernels need inside, gaps of the allocator
PROBE = 48  # side of the image that is tried; memory grows with the number of pixels from there on, by less than 3% off
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # where a container finds its own limit
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # glibc's malloc.h
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
GIVE_BACK = {MMAP_MAX: 65536, TRIM_THRESHOLD: 2**26, MMAP_THRESHOLD: 2**25}  # what glibc itself adapts to under large maps
_measured = WeakKeyDictionary()
_keeping = []  # the device of the outermost memory_kept


def default_memory(net, device):
    """Bytes that tiles of the network may take unless --chop_mem says."""
    return GLOBAL_MEMORY if net.receptive_field is None else SHARE * free_memory(device)


def pixels_at_once(net, device, memory):
    """LR pixels, of all images of a batch together, whose forward takes `memory` bytes beyond the weights."""
    return int(memory / (MARGIN * bytes_per_pixel(net, device)))


def memory_of(net, device, pixels):
    """The inverse of `pixels_at_once`."""
    return MARGIN * bytes_per_pixel(net, device) * pixels


@torch.no_grad()
def bytes_per_pixel(net, device):
    """Bytes of the tensors alive at once in a forward without gradients, per LR pixel: counted once, on a small image."""
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    known = _measured.setdefault(net, {})
    if (device, precision) not in known:
        image = torch.zeros(1, 3, PROBE, PROBE, device=device).contiguous(memory_format=torch.channels_last)
        net(image[..., :8, :8])  # autocast keeps the weights in its precision: they are there from now on, and do not count
        with LiveMemory() as memory:
            net(image.clone())
        known[device, precision] = memory.peak / PROBE**2
    return known[device, precision]


def free_memory(device):
    """Bytes that could be had on the device; where the system says only what is installed, half of that."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", MEMINFO.read_text())[1])
    except OSError:  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = int(re.search(r"inactive_file (\d+)", (CGROUP / "memory.stat").read_text())[1])
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return free
    return min(free, max(0, limit - used + cached))


@contextmanager
def memory_kept(device):
    """On a CPU, memory that a layer frees stays with the process for the next one, until the end of the `with`.

    glibc returns maps above 32 MiB to the system at once and gets them again page by page: up to 40% of the time of EDSR on
    images above 400 x 400, and a tenth of a training step. Other C libraries go on as they do.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and os.name == "posix" else None
    if not hasattr(libc, "mallopt") or _keeping:
        yield
        return
    _keeping.append(device)
    try:
        for option, value in KEEP.items():
            libc.mallopt(option, value)
        yield
    finally:
        _keeping.clear()
        for option, value in GIVE_BACK.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
