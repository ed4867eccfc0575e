"""Several processes that train one network, each on its part of every batch (torchrun, or --n_GPUs).

They compute what one process would with the whole batch: every image is in one part, random numbers are drawn for the whole
batch from generators that stay equal in all, and what couples the images of a batch goes over all parts (`mean`, `gather`).
The loss is the mean of those of the processes, and so are its gradients. The main process, of rank 0, alone writes and
speaks. Where there is only one process, all of this does nothing.
"""
import logging
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from error import UserError, is_one_of_several

PARENT = os.getppid()
PATIENCE = timedelta(days=1)  # the others wait for the main one while it decodes images or asks a teacher about them


def connect(device_type):
    """Joins the other processes, where there are some."""
    if is_one_of_several():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")


def disconnect():
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def count():
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def main_one_first():
    """The main process goes through it before the others, who find in caches what it made, and do not repeat its errors."""
    if count() == 1:
        yield
        return
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    if rank():
        distributed.barrier(group)
    yield
    if not rank():
        distributed.barrier(group)


def launch(args):
    """Runs this command once more, in --n_GPUs processes on this machine -> their exit status."""
    number, there = args.n_GPUs, torch.cuda.device_count()
    if not args.cpu and there < number:
        raise UserError(f"--n_GPUs {number}: this machine has {there}; with --cpu so many processes share the CPU")
    from torch.distributed.elastic.multiprocessing import SignalException  # noqa: PLC0415 - takes a second
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // number)
                                                 if hasattr(os, "sched_getaffinity") else 1))
    logging.disable()  # what failed says so itself; torchrun's banner around it adds nothing
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=number, run_id="train", max_restarts=0,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1)
    try:
        elastic_launch(config, sys.executable)("-u", *sys.argv)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if max(codes) < 2 and -signal.SIGKILL in codes:  # of a lost connection it is 1; torchrun ends the rest by SIGTERM
            raise UserError("a process of the run was killed, most likely for want of memory: go on with --resume 1, and a "
                            "smaller --batch_size or fewer --n_GPUs") from None
        return max(1, *codes)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def orphaned():
    """Whether what started the processes ended without them."""
    return is_one_of_several() and os.getppid() != PARENT


def require_divisible(args):
    """Raises UserError where the batch cannot be divided among the processes and, there, by --split_batch."""
    if args.batch_size % (count() * args.split_batch):
        raise UserError(f"--batch_size {args.batch_size} images cannot be divided evenly among {count()} processes x "
                        f"--split_batch {args.split_batch}")


# ---- a batch in parts

def whole(images):
    """The size of the batch of which every process has so many images."""
    return images * count()


def mine(x):
    """Of a tensor with an entry for each image of the whole batch, those of this process's part."""
    return x.chunk(count())[rank()] if count() > 1 else x


def mean(x):
    """Mean over the processes, differentiable; the losses that come of it are a mean over them themselves."""
    return _Mean.apply(x) if count() > 1 else x


def gather(x):
    """N x ... of each process -> those of all in the order of their ranks, differentiable."""
    return _Gather.apply(x) if count() > 1 else x


def _mean(x):
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x)
    return x / count()


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _mean(x)

    @staticmethod
    def backward(ctx, grad):
        return _mean(grad)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return mine(count() * _mean(grad))  # each process's loss depends on the images of all


@torch.no_grad()
def average_gradients(parameters):
    """Of parameters that an optimiser of a term's own trains."""
    for parameter in parameters if count() > 1 else ():
        parameter.grad.copy_(_mean(parameter.grad))


def total(numbers):
    """Sums over the processes of some numbers."""
    x = torch.tensor(numbers, dtype=torch.float64)
    if count() > 1:
        distributed.all_reduce(x)
    return x.tolist()


def largest(number):
    """The largest of the processes' whole numbers: what one has been told, all then know."""
    if count() == 1:
        return number
    x = torch.tensor(number)
    distributed.all_reduce(x, distributed.ReduceOp.MAX)
    return x.item()


# ---- gradients

def synchronised(computation):
    """A `Computation` whose gradients are means over the processes once backward() has ended; not so within no_sync()."""
    if count() == 1:
        return computation
    # a network may have parameters that no loss reaches: SAN's, the tails of CARN's other scales
    return DistributedDataParallel(computation, find_unused_parameters=True)


class Computation(nn.Module):
    """A function of tensors, and the parameters that the first of the tensors it returns has gradients for."""

    def __init__(self, function, parameters):
        super().__init__()
        self.function = function
        self.trained = nn.ParameterList(parameters)

    def forward(self, *inputs):
        return self.function(*inputs)

    def no_sync(self):
        return nullcontext()
