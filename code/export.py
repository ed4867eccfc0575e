"""Write a trained network as a file for other programs. Run from this folder.

python export.py --ckp_path FILE --format onnx -o student.onnx
"""
import logging
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import option
from system.errors import UserError
from system.signals import run_script

if TYPE_CHECKING:
    import torch

    from model.common import Network

log = logging.getLogger("sr")


def main() -> int:
    """Write the file, log how it was checked, and return the exit status; raises UserError."""
    args = option.parse(training=False)
    if not (args.ckp_path and args.format and args.output):
        raise UserError("give --ckp_path FILE, --format " + "|".join(option.EXPORT_FORMATS) + " and -o FILE")
    if args.precision not in ("single", "half") or (args.int8 and args.precision != "single"):
        raise UserError(f"--precision {args.precision}: files are written in single or half" + ", int8 from single" *
                        bool(args.int8))
    import exporting  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for torch
    from exporting.common import describe  # noqa: PLC0415
    from exporting.quantisation import calibration_images  # noqa: PLC0415
    from model import describe as describe_network  # noqa: PLC0415
    from model import fuse, load_with_flags  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    args.rgb_range = args.rgb_range if "rgb_range" in args.given else 1
    path, output = Path(args.ckp_path), Path(args.output)
    net = fuse(load_with_flags(path, args))
    args.scale = net.scale
    if output.exists() and output.samefile(path):
        raise UserError(f"--output {output}: this is --ckp_path, which would be replaced; give another name")
    log.info("%s: %s", path, describe_network(net))
    calibration = calibration_images(args.int8, args.rgb_range) if args.int8 else None
    metadata = describe(net, args.precision, path.name, args.license)
    files, difference = exporting.export(net, output, args.format, args.precision, metadata, calibration)
    log.info("%s: %s bytes, images in [0, %g], largest difference to PyTorch in float32 %.2g of the maximum",
             " and ".join(map(str, files)), f"{sum(file.stat().st_size for file in files):,}", net.rgb_range, difference)
    if calibration:
        compare_with_float32(net, output, calibration, args)
    return 0


def compare_with_float32(net: "Network", output: Path, images: list["torch.Tensor"], args: Namespace) -> None:
    """Log the PSNR and the speed of an int8 file beside those in float32, on --data_test where it is given."""
    import evaluation  # noqa: PLC0415
    from data import make_benchmarks  # noqa: PLC0415
    from exporting import onnx_format  # noqa: PLC0415
    from exporting.quantisation import psnr, seconds  # noqa: PLC0415

    with TemporaryDirectory() as folder:
        single = onnx_format.runner(onnx_format.write(net, Path(folder) / "single.onnx", "single", {})[0])
    int8 = onnx_format.runner(output)
    log.info("int8: %.2f times as fast as float32 by onnxruntime; PSNR of its output to that in float32 %.2f dB",
             seconds(single, images[0]) / seconds(int8, images[0]), psnr(images, int8, single, net.rgb_range))
    for dataset in make_benchmarks(args) if "data_test" in args.given else ():
        scores = [evaluation.score(evaluation.by_function(run, net.rgb_range), dataset) for run in (int8, single)]
        if scores[0].psnr is not None:
            log.info("%s: %.3f dB in int8, %.3f dB in float32", dataset.name, scores[0].psnr, scores[1].psnr)


if __name__ == "__main__":
    run_script(main)
