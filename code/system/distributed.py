"""Data-parallel training in several processes (torchrun or --n_GPUs).

All processes together compute what one process computes on the global batch. Each process holds one shard of every batch.
Random numbers are drawn for the global batch, from generators that are equal in all processes, and each process takes its
shard. Terms that couple the images of a batch use `all_gather` and `all_reduce_mean`. The loss is the mean over the
processes, and so are its gradients. Rank 0 writes files and logs. In a single process every function here is the identity.
"""
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from option_types import crop_stages
from system.errors import UserError, is_distributed

PARENT = os.getppid()
RANK_ZERO_TIMEOUT = timedelta(days=1)  # the other ranks wait while rank 0 decodes images or computes teacher outputs


def connect(device_type: str) -> None:
    """Initialise the process group if this process is one of several."""
    if is_distributed():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")


def disconnect() -> None:
    """Destroy the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the body on rank 0 before the other ranks, so that they use its caches and do not repeat its errors."""
    if world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=RANK_ZERO_TIMEOUT)
    if rank():
        dist.barrier(group)
    yield
    if not rank():
        dist.barrier(group)


def launch(args: Namespace) -> int:
    """Run the current command again in --n_GPUs processes on this machine and return their exit status.

    Raises UserError if there are fewer GPUs, or if a process is killed.
    """
    number, available = args.n_GPUs, torch.cuda.device_count()
    if not args.cpu and available < number:
        raise UserError(f"--n_GPUs {number}: this machine has {available} GPUs; with --cpu the processes share the CPU")
    from torch.distributed.elastic.multiprocessing import SignalException  # noqa: PLC0415 - takes a second
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // number)
                                                 if hasattr(os, "sched_getaffinity") else 1))
    logging.disable()  # of torchrun's messages: the failed process reports its own error
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=number, run_id="train", max_restarts=0,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1)
    try:
        elastic_launch(config, sys.executable)("-u", *sys.argv)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if max(codes) < 2 and -signal.SIGKILL in codes:  # 1 is a lost connection; torchrun ends the others by SIGTERM
            raise UserError("a process of the run was killed, most likely for lack of memory: continue with --resume 1 and "
                            "a smaller --batch_size or fewer --n_GPUs") from None
        return max(1, *codes)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def launcher_died() -> bool:
    """Return whether the process that launched this one has ended."""
    return is_distributed() and os.getppid() != PARENT


def check_batch_divisible(args: Namespace) -> None:
    """Raise UserError if the batch cannot be divided evenly among the processes and by --split_batch."""
    for batch in (stage.batch for stage in crop_stages(args)):
        if batch % (world_size() * args.split_batch):
            raise UserError(f"--{'progressive: batches of' if args.progressive else 'batch_size'} {batch} images cannot be "
                            f"divided evenly among {world_size()} processes x --split_batch {args.split_batch}")


# ---- shards of a batch

def global_batch_size(images: int) -> int:
    """Return the size of the global batch, given the number of images in each process's shard."""
    return images * world_size()


def local_shard(x: torch.Tensor) -> torch.Tensor:
    """Return the entries of this process, given a tensor with one entry for each image of the global batch."""
    return x.chunk(world_size())[rank()] if world_size() > 1 else x


def all_reduce_mean(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over the processes, differentiable; a loss computed from it is averaged over the processes too."""
    return _AllReduceMean.apply(x) if world_size() > 1 else x


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate the N x ... tensors of all processes in the order of their ranks, differentiable."""
    return _AllGather.apply(x) if world_size() > 1 else x


def _mean(x):
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x / world_size()


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _mean(x)

    @staticmethod
    def backward(ctx, grad):
        return _mean(grad)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return local_shard(world_size() * _mean(grad))  # the loss of each process depends on the images of all


@torch.no_grad()
def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that have an optimiser of their own, such as a discriminator's."""
    for parameter in parameters if world_size() > 1 else ():
        parameter.grad.copy_(_mean(parameter.grad))


def all_reduce_sum(numbers: list[float]) -> list[float]:
    """Sum each of some numbers over the processes, in float64."""
    x = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(x)
    return x.tolist()


def all_reduce_max(number: int) -> int:
    """Return the largest of the processes' integers, such as the number of a signal that reached one of them."""
    if world_size() == 1:
        return number
    x = torch.tensor(number)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


# ---- gradients

def wrap(module: nn.Module) -> nn.Module:
    """Wrap a module with `trainable_parameters()` in DistributedDataParallel, in several processes.

    Buffers and other parameters (frozen networks, a discriminator with an optimiser of its own) are not synchronised.
    """
    if world_size() == 1:
        return module
    trained = {id(parameter) for parameter in module.trainable_parameters()}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, [*(name for name, parameter in module.named_parameters() if id(parameter) not in trained),
                 *(name for name, _ in module.named_buffers())])
    # some parameters reach no loss: SAN's unused ones, the tails of CARN's other scales
    return DistributedDataParallel(module, find_unused_parameters=True)
