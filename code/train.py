"""Distils a student from teachers: data, networks, loss, trainer. Run from this folder: python train.py --help"""
import logging

import option
from error import UserError, run


def main():
    args = option.parse()
    import torch  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for it

    import loss  # noqa: PLC0415
    from checkpoint import Experiment, note_failure, start_logging  # noqa: PLC0415
    from data import Crops, make_benchmarks, teacher_cache, views  # noqa: PLC0415
    from device import pick_device  # noqa: PLC0415
    from model import describe  # noqa: PLC0415
    from model.roles import make_networks, teacher_files  # noqa: PLC0415
    from trainer import Trainer  # noqa: PLC0415

    start_logging()
    torch.manual_seed(args.seed)
    student, teachers = make_networks(args, loss.needs_of(args.loss))
    device = pick_device(args)
    setting = loss.Setting(args, student, teachers, device, views.plan(args))
    criterion = loss.Loss(args.loss, setting)
    crops, benchmarks = Crops(args), make_benchmarks(args)
    experiment = Experiment(args)
    trainer = Trainer(args, student, teachers, criterion, crops, benchmarks, experiment, device)
    if args.cache_teacher:
        teacher_cache.prepare(crops, criterion, setting, teacher_files(args), device)
    experiment.begin()
    logging.getLogger("sr").info("student: %s%s\nloss: %s", describe(student), "".join(
        f"\nteacher: {describe(net)}" for net in teachers), args.loss)
    try:
        return trainer.fit()
    except UserError as failure:
        note_failure(failure)
        raise


if __name__ == "__main__":
    run(main)
