"""Images from disk: training batches and test sets."""
import signal
import sys
import warnings

import torch
from torch.utils.data import DataLoader

from data.dataset import Batches, Crops, Images
from system import distributed

__all__ = ["Crops", "Images", "make_batches", "make_benchmarks"]
GRACE = 60  # seconds that a worker goes on after SIGTERM, in which the main process finishes its step and saves


def make_batches(args, crops, start, stop, pin_memory=False):
    """Return a loader of batches start..stop-1 of the run, of this process's shard of each.

    A batch consists of uint8 tensors N x 3 x p x p (LR) and N x 3 x sp x sp (HR), and int16 N x 3k x sp x sp with the cached
    outputs of k teachers. One loader serves the whole run: its workers start once and prefetch while the epochs are tested.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # two on one core still prefetch
    batches = Batches(start, stop, args.batch_size, distributed.rank(), distributed.world_size())
    return Loader(crops, batch_sampler=batches, num_workers=args.n_threads, pin_memory=pin_memory,
                  worker_init_fn=_start_worker,
                  generator=torch.Generator().manual_seed(args.seed))  # the global generator is used by the loss


class Loader(DataLoader):
    """A DataLoader that raises the sudden end of a worker in `next`, after 5 seconds at most.

    PyTorch raises it in a signal handler, in the middle of any other computation, where it may be lost or reported twice.
    """

    def __iter__(self):
        iterator = super().__iter__()
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator


def make_benchmarks(args):
    """Return the test sets, an `Images` each, decoded and checked."""
    benchmarks = [Images(name, args, train=False) for name in args.data_test]
    for images in benchmarks:
        images.prepare()
    return benchmarks


def _start_worker(worker):
    """Leave Ctrl-C and a job manager's SIGTERM, which reach every process, to the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # not ignored for good: a process that ends without closing its loader sends SIGTERM to its workers and waits
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: signal.alarm(GRACE) if hasattr(signal, "alarm") else sys.exit(1))
    torch.set_num_threads(1)
