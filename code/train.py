"""Distils a student from teachers: data, networks, loss, trainer. Run from this folder: python train.py --help"""
import option
from error import run


def main():
    args = option.parse()
    import torch  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for it

    import loss  # noqa: PLC0415
    from checkpoint import Experiment, start_logging  # noqa: PLC0415
    from data import Crops, make_benchmarks  # noqa: PLC0415
    from device import pick_device  # noqa: PLC0415
    from model import make_student, make_teachers  # noqa: PLC0415
    from trainer import Trainer  # noqa: PLC0415

    start_logging()
    torch.manual_seed(args.seed)
    student = make_student(args)  # first: the same seed gives the same student, whatever teaches it
    teachers = make_teachers(args) if "teacher" in loss.needs_of(args.loss) else []
    criterion = loss.Loss(args.loss, loss.Setting(args, student, teachers))
    crops, benchmarks = Crops(args), make_benchmarks(args)
    device = pick_device(args)
    experiment = Experiment(args)
    return Trainer(args, student, teachers, criterion, crops, benchmarks, experiment, device).fit()


if __name__ == "__main__":
    run(main)
