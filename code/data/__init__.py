"""Images from disk: training batches and test sets."""
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from data.dataset import Batches, Crops, Images
from option_types import crop_stages
from system import distributed

__all__ = ["Crops", "Images", "make_batches", "make_benchmarks"]
GRACE = 60  # seconds for which a worker continues after SIGTERM, while the main process finishes its step and saves


def make_batches(args: Namespace, crops: Crops, start: int, stop: int, pin_memory: bool = False) -> DataLoader:
    """Build the loader of batches start..stop-1 of the run; in several processes, of the shard of this process.

    A batch consists of uint8 tensors N x 3 x p x p (LR) and N x 3 x sp x sp (HR), and int16 N x 3k x sp x sp with the cached
    outputs of k teachers; N and p are those of the iteration (--progressive). There is one loader for all epochs: its
    workers start once, and prefetch during tests.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores still prefetch
    batches = Batches(start, stop, crop_stages(args), distributed.rank(), distributed.world_size())
    return Loader(crops, batch_sampler=batches, num_workers=args.n_threads, pin_memory=pin_memory,
                  worker_init_fn=_start_worker,  # and a generator other than the global one, which the loss uses:
                  generator=torch.Generator().manual_seed(args.seed))


class Loader(DataLoader):
    """A DataLoader whose `next` raises an exception, after 5 seconds at most, where a worker was killed.

    PyTorch raises it in a signal handler, during any other computation, so that it may be lost or reported twice.
    """

    def __iter__(self) -> Iterator:
        iterator = super().__iter__()
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator


def make_benchmarks(args: Namespace) -> list[Images]:
    """Build the test sets of --data_test, decoded and checked; raises UserError."""
    benchmarks = [Images(name, args, train=False) for name in args.data_test]
    for images in benchmarks:
        images.prepare()
    return benchmarks


def _start_worker(worker):
    """Leave Ctrl-C and the SIGTERM of a job manager, which reach every process, to the main process: it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # only delayed: a main process that ends without closing its loader sends SIGTERM to its workers and waits for them
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: signal.alarm(GRACE) if hasattr(signal, "alarm") else sys.exit(1))
    torch.set_num_threads(1)
