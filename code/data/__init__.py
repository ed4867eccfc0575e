"""Images from disk: training batches and test sets."""
import signal
import sys
import warnings

import torch
from system import distributed
from torch.utils.data import DataLoader

from data.dataset import Batches, Crops, Images

__all__ = ["Crops", "Images", "make_batches", "make_benchmarks"]
GRACE = 60  # seconds that a worker which was told to end still serves: the loop finishes its step and saves


def make_batches(args, crops, start, stop, pin_memory=False):
    """Loader of batches start..stop-1 of the run, of this process's part of each: uint8 tensors N x 3 x p x p and N x 3 x sp
    x sp, and the int16 N x 3k x sp x sp of k teachers that were asked once.

    One loader serves the whole run: its workers start once and fetch ahead while the epochs are tested.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # two on one core still fetch ahead of the training
    batches = Batches(start, stop, args.batch_size, distributed.rank(), distributed.world_size())
    return DataLoader(crops, batch_sampler=batches, num_workers=args.n_threads, pin_memory=pin_memory,
                      worker_init_fn=_start_worker,
                      generator=torch.Generator().manual_seed(args.seed))  # its own: the global one belongs to the loss


def make_benchmarks(args):
    """The test sets, an `Images` each, decoded and checked."""
    benchmarks = [Images(name, args, train=False) for name in args.data_test]
    for images in benchmarks:
        images.prepare()
    return benchmarks


def _start_worker(worker):
    """Ctrl-C or a job manager's SIGTERM reaches every process: only the main one answers, and then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # not ignored for good: a process that ends without closing its loader waits for workers that it told to end
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: signal.alarm(GRACE) if hasattr(signal, "alarm") else sys.exit(1))
    torch.set_num_threads(1)
