"""Score a checkpoint on test sets, or upscale your own images (--data_test Demo). Run from this folder."""
import logging
from contextlib import nullcontext
from pathlib import Path

import option
import published
from system.errors import UserError, writing
from system.signals import run_script

log = logging.getLogger("sr")


def main() -> int:
    """Score or upscale as the flags state, and return the exit status; raises UserError."""
    args = option.parse(training=False)
    import evaluation  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for torch
    from checkpoint import write_table  # noqa: PLC0415
    from data import make_benchmarks  # noqa: PLC0415
    from model import describe, fuse, load_with_flags  # noqa: PLC0415
    from model.teachers import teacher_path  # noqa: PLC0415
    from perceptual import make_metrics  # noqa: PLC0415
    from system.device import pick_device  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    if not args.ckp_path and args.TS == "S":
        raise UserError("give the checkpoint to score with --ckp_path FILE, or --TS T for the teacher found for --teacher")
    if not args.ckp_path and len(args.teacher) > 1:
        raise UserError(f"--teacher [{','.join(args.teacher)}]: give one teacher; compare.py scores several")
    path = Path(args.ckp_path or teacher_path(args.teacher[0], args.scale))
    net = fuse(load_with_flags(path, args))
    args.scale = net.scale
    benchmarks = make_benchmarks(args)
    device = pick_device(args)
    log.info("%s: %s", path, describe(net))

    folder = option.ROOT / "experiment" / args.ckp_dir if "ckp_dir" in args.given else results_folder(path)
    upscale, metrics = evaluation.by_network(net, device, args), make_metrics(args.metrics, device)
    unscored = not all(images.has_hr for images in benchmarks)
    with evaluation.Writer(folder, args.save_gt) if args.save_results or unscored else nullcontext() as writer:
        scores = [evaluation.score(upscale, images, writer if args.save_results or not images.has_hr else None,
                                   space=args.metric_space, perceptual=metrics)
                  for images in benchmarks]
    log.info(evaluation.table(scores))
    name = args.published or published.name_of_run(path.resolve().parent.parent)
    compared = published.comparison(name, {score.dataset: score.psnr for score in scores}, args)
    if compared and args.TS == "S":
        log.info(compared)
    for score in scores:
        rows = evaluation.image_rows(path.name, None, args.scale, {score.dataset: score.per_image},
                                     {score.dataset: score.perceptual_per_image})
        if rows:
            table = folder / f"results-{score.dataset}" / "images.csv"
            with writing(table):
                table.parent.mkdir(parents=True, exist_ok=True)
            write_table(table, rows)
    if writer:
        log.info("images are in %s", folder)
    return 0


def results_folder(path: Path) -> Path:
    """Return the folder for the results of a checkpoint: that of its run if there is one, else experiment/<file name>."""
    run_folder = path.resolve().parent.parent
    is_of_a_run = (path.match("model_*.pt") and path.resolve().parent.name == "model"
                   and (run_folder / "config.txt").is_file())
    return run_folder if is_of_a_run else option.ROOT / "experiment" / path.stem


if __name__ == "__main__":
    run_script(main)
