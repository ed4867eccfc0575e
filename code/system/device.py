"""Which processor the networks run on, in which precision."""
import logging
import os

import torch

from system.errors import UserError, is_distributed

log = logging.getLogger("sr")
DTYPES = {"half": torch.float16, "bf16": torch.bfloat16}


def pick_device(args):
    """The GPU where there is one and --cpu does not forbid it, else the CPU, with a line that says so."""
    if args.cpu:
        return torch.device("cpu")
    if is_distributed() and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}: start "
                            "fewer, or give --cpu")
        torch.cuda.set_device(local)  # where the collective operations take place
        return torch.device("cuda", local)
    if torch.cuda.is_available():
        if args.gpu_id < torch.cuda.device_count():
            return torch.device("cuda", args.gpu_id)
        log.info("GPU %d is not there, this machine has %d: using GPU 0", args.gpu_id, torch.cuda.device_count())
        return torch.device("cuda", 0)
    log.info("no GPU on this machine: using the CPU")
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks compute in `precision` (single, half, bf16); their weights remain float32."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
