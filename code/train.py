"""Distil a student from teachers: data, networks, loss, trainer. Run from this folder: `python train.py --help`."""
import logging
import os
from argparse import Namespace
from contextlib import ExitStack

import option
import published
from system.errors import UserError, is_distributed, is_rank_zero
from system.signals import run_script


def main() -> int:
    """Train as the flags state, in this process or in --n_GPUs processes, and return the exit status; raises UserError."""
    args = option.parse()
    published.require_start(args)
    if args.n_GPUs > 1 and not is_distributed():
        from system.distributed import launch  # noqa: PLC0415
        return launch(args)
    if is_distributed():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every process prints PyTorch's warnings
    if not is_rank_zero():
        os.environ["TQDM_DISABLE"] = "1"  # progress bars come from rank 0 alone
    return train(args)


def train(args: Namespace) -> int:
    """Build data, networks, loss and trainer from the flags, train, and return the exit status; raises UserError."""
    import torch  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for it

    import loss  # noqa: PLC0415
    from checkpoint import Experiment  # noqa: PLC0415
    from data import Crops, make_benchmarks, teacher_cache, views  # noqa: PLC0415
    from distiller import build_distiller  # noqa: PLC0415
    from model import describe  # noqa: PLC0415
    from model.roles import make_networks, teacher_files  # noqa: PLC0415
    from perceptual import make_metrics  # noqa: PLC0415
    from system import distributed  # noqa: PLC0415
    from system.device import pick_device  # noqa: PLC0415
    from system.logger import log_failure, start_logging  # noqa: PLC0415
    from tensorboard_log import summary_writer  # noqa: PLC0415
    from trainer import Trainer  # noqa: PLC0415

    start_logging()
    device = pick_device(args)
    distributed.connect(device.type)
    with ExitStack() as stack:
        with distributed.rank_zero_first():
            distributed.check_batch_divisible(args)
            metrics = make_metrics(args.metrics, device)
            if args.tensorboard:
                summary_writer()  # a missing package ends the run here, before images are decoded
            experiment = Experiment(args)
            stack.callback(experiment.end)
            torch.manual_seed(args.seed)
            student, teachers = make_networks(args, loss.needs_of(args.loss))
            context = loss.Context(args, student, teachers, device, views.plan(args))
            criterion = loss.build_loss(args.loss, context)
            distiller = build_distiller(args, student, teachers, criterion)
            crops, benchmarks = Crops(args), make_benchmarks(args)
            trainer = Trainer(args, distiller, crops, benchmarks, experiment, device, metrics)
            if args.cache_teacher:
                teacher_cache.prepare(crops, criterion, context, teacher_files(args), device)
            experiment.begin()
        logging.getLogger("sr").info("student: %s%s\nloss: %s", describe(student), "".join(
            f"\nteacher: {describe(net)}" for net in teachers), args.loss)
        if args.published:
            logging.getLogger("sr").info("published %s: %s", args.published, published.source(args.published))
        try:
            status = trainer.fit()
            distributed.disconnect()
            return status
        except UserError as failure:
            log_failure(failure)
            raise


if __name__ == "__main__":
    run_script(main)
