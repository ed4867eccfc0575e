"""Tabulate the formats of export.py: difference to PyTorch, file size, time on one core, PSNR. Run from this folder.

python compare_formats.py --ckp_path A.pt+B=C.pt --int8 LR_IMAGES --data_test Set5 --dir_data DATA_ROOT -o formats.csv
"""
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import option
from option_types import parse_labelled
from system.errors import UserError
from system.signals import run_script

if TYPE_CHECKING:
    from data import Images
    from model.common import Network

log = logging.getLogger("sr")
SIDE = 256  # of the SR image whose time is measured, in pixels
NOTES = f"""\
difference: largest difference to PyTorch in float32, relative to the maximum pixel value. bytes: of the files, or of the
parameters in PyTorch. ms: to compute an SR image of {SIDE} x {SIDE}, on one core, the median after a warm-up."""


def main() -> int:
    """Print and write the table, and return the exit status; raises UserError."""
    args = option.parse(training=False)
    files = parse_labelled(args.ckp_path)
    if not (files and args.int8 and args.output):
        raise UserError("give --ckp_path A+B, --int8 with a folder of images for the calibration, and -o FILE.csv")
    import torch  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for torch

    from checkpoint import write_table  # noqa: PLC0415
    from data import make_benchmarks  # noqa: PLC0415
    from model import fuse, load_with_flags  # noqa: PLC0415
    from system.logger import start_logging  # noqa: PLC0415

    start_logging()
    torch.set_num_threads(1)
    args.rgb_range = 1
    rows = []
    for label, file in files.items():
        net = fuse(load_with_flags(file, args))
        benchmarks = make_benchmarks(Namespace(**{**vars(args), "scale": net.scale}))
        for row in rows_of(net, benchmarks, args.int8):
            rows.append(dict(network=label, **row))
            log.info("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    write_table(Path(args.output), rows)
    log.info(NOTES)
    return 0


def rows_of(net: "Network", benchmarks: "list[Images]", calibration: str) -> Iterator[dict]:
    """Yield rows for PyTorch in float32 and bfloat16, ONNX in float32, float16 and int8, and ncnn if it has the network."""
    import torch  # noqa: PLC0415

    import evaluation  # noqa: PLC0415
    from exporting import compare, export, module_of  # noqa: PLC0415
    from exporting.common import describe  # noqa: PLC0415
    from exporting.quantisation import calibration_images, seconds  # noqa: PLC0415

    net = net.to(memory_format=torch.channels_last)  # in which PyTorch is faster
    lr = torch.rand(1, 3, SIDE // net.scale, SIDE // net.scale)

    def row(name, run, difference, size):
        scores = [evaluation.score(evaluation.by_function(run, net.rgb_range), images) for images in benchmarks]
        return dict(format=name, difference=f"{difference:.2g}", bytes=size, ms=f"{1000 * seconds(run, lr):.1f}",
                    **{score.dataset: "" if score.psnr is None else f"{score.psnr:.3f}" for score in scores})

    for name, dtype in (("PyTorch float32", torch.float32), ("PyTorch bf16", torch.bfloat16)):
        @torch.no_grad()
        def run(x, dtype=dtype):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return net(x.contiguous(memory_format=torch.channels_last))
        yield row(name, run, compare(net, run)[0], sum(parameter.nbytes for parameter in net.parameters()))

    for name, kind, precision in (("onnxruntime float32", "onnx", "single"), ("onnxruntime float16", "onnx", "half"),
                                  ("onnxruntime int8", "onnx", "single"), ("ncnn", "ncnn", "single")):
        images = calibration_images(calibration, net.rgb_range) if name.endswith("int8") else None
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"net{module_of(kind).SUFFIXES[0]}"
            try:
                files, difference = export(net, path, kind, precision, describe(net, precision, "", ""), images)
            except UserError as error:
                log.info(error)
                continue
            yield row(name, module_of(kind).runner(path), difference, sum(file.stat().st_size for file in files))


if __name__ == "__main__":
    run_script(main)
