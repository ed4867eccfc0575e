"""The device that the networks run on, and the precision of their arithmetic."""
import logging
import os
from types import SimpleNamespace

import torch

from system.errors import UserError, check_environment, is_distributed

log = logging.getLogger("sr")
DTYPES = {"half": torch.float16, "bf16": torch.bfloat16}


def pick_device(args: SimpleNamespace) -> torch.device:
    """Return the GPU of this process, or the CPU with --cpu and, which is logged, where there is no GPU.

    Raises UserError where the machine has fewer GPUs than processes, or torchrun's variables do not fit together.
    """
    check_environment()
    if args.cpu:
        return torch.device("cpu")
    if is_distributed() and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}: start "
                            "fewer, or give --cpu")
        torch.cuda.set_device(local)  # the device of the collective operations
        return torch.device("cuda", local)
    if torch.cuda.is_available():
        if args.gpu_id < torch.cuda.device_count():
            return torch.device("cuda", args.gpu_id)
        log.info("there is no GPU %d, this machine has %d: using GPU 0", args.gpu_id, torch.cuda.device_count())
        return torch.device("cuda", 0)
    log.info("no GPU on this machine: using the CPU")
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks compute in `precision` (single, half, bf16); their weights remain float32."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
