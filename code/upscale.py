"""Upscale your own images, or raw video through a pipe, with a trained network. Run from this folder.

python upscale.py -i photos -o upscaled
ffmpeg -i in.mp4 -f rawvideo -pix_fmt rgb24 - | python upscale.py --pipe 640x360 |
    ffmpeg -f rawvideo -pix_fmt rgb24 -s 1280x720 -i - out.mp4
"""
import argparse
import os

import option
from option_types import home_path, natural, parse_output_size, positive_number
from system.signals import run_script

FOR_FILES = "input", "output", "ext", "suffix", "alpha", "overwrite"  # flags without an effect for --pipe
FOR_CHECKPOINTS = "ckp_path", "scale", "chop_mem", "precision"  # those for --model
PIXEL_FORMATS = "rgb24", "rgb48le", "rgb48be"  # in ffmpeg's terms: 8 bits per channel, 16 bits in either byte order


def main() -> int:
    """Upscale as the flags state, and return the exit status: 1 if some images failed; raises UserError."""
    args = parse()
    import upscaler  # noqa: PLC0415 - after the flags: --help and a mistyped flag should not wait for torch
    from system.logger import start_logging  # noqa: PLC0415

    if args.pipe:
        stdin, stdout = upscaler.take_streams()
        start_logging()
        upscaler.upscale_frames(stdin, stdout, args.pipe, args.pix_fmt, upscaler.make_upscaler(args))
        return 0
    start_logging()
    jobs = upscaler.plan(args)
    return upscaler.upscale_files(jobs, upscaler.make_upscaler(args)) if jobs else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = option.Parser(description="Upscale images, or with --pipe raw video. Bit depth, gray, transparency and colour "
                                       "profile of an image are kept, other metadata are not; its orientation is applied. "
                                       "Large images are divided into tiles.", allow_abbrev=False,
                           usage="%(prog)s -i IN -o OUT [--FLAG VALUE ...]")
    parser.add_argument("-i", "--input", nargs="+", metavar="IN",
                        help="image files, folders (with their sub-folders) or patterns such as 'photos/*.png'; PNG, JPEG, "
                             "WebP, TIFF, BMP or PPM")
    parser.add_argument("-o", "--output", type=home_path, metavar="OUT",
                        help="folder for the upscaled images, which keep their names and sub-folders; for a single image "
                             "also a file, whose suffix is the format")
    parser.add_argument("--ckp_path", type=home_path, metavar="FILE",
                        help="checkpoint of any network of this project (default: Compact_M in teacher_checkpoint/)")
    parser.add_argument("--model", type=home_path, metavar="FILE.onnx",
                        help="an exported network in place of a checkpoint, run by the package onnxruntime")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4, 8),
                        help="scale of the default network (default: 2, or one that reaches --outscale), or of a checkpoint "
                             "that holds several")
    parser.add_argument("--outscale", type=positive_number, metavar="S",
                        help="resize the output of the network, which is applied once, to S times the size of the input, "
                             "such as 3.5, bicubic and antialiased (default: the network's scale)")
    parser.add_argument("--ext", choices=("auto", "png", "jpg", "webp", "tif"),
                        help="format of the upscaled images: auto, that of the image, or PNG where that cannot be written; "
                             "JPEG has quality 95, the others are lossless; JPEG and WebP have 8 bits (default: auto)")
    parser.add_argument("--suffix", metavar="TEXT", help="text after the names of the upscaled images, such as _x2")
    parser.add_argument("--alpha", choices=("network", "bicubic"),
                        help="upscale the alpha channel with the network, or bicubic (default: network)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs, which otherwise are kept")
    parser.add_argument("--self_ensemble", action="store_true",
                        help="average the outputs for 8 flips and transposes: 8 times slower, a little better")
    parser.add_argument("--chop_mem", type=positive_number, metavar="GB",
                        help="memory limit of the tiles in GB (default: half of the free memory, on a CPU at most 1; 1 for "
                             "networks with global operations)")
    parser.add_argument("--precision", choices=("single", "half", "bf16"),
                        help="floating-point format of the network (default: single)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--gpu_id", type=natural, default=0, help="index of the GPU (default: 0)")
    parser.add_argument("--pipe", type=parse_output_size, metavar="WIDTHxHEIGHT",
                        help="upscale raw video frames of this size from stdin to stdout")
    parser.add_argument("--pix_fmt", choices=PIXEL_FORMATS, default="rgb24",
                        help="pixel format of the frames of --pipe, in ffmpeg's terms (default: rgb24)")
    args = parser.parse_args(argv)
    for mode, names in (("pipe", FOR_FILES), ("model", FOR_CHECKPOINTS)):
        excluded = next((name for name in names if getattr(args, mode) and getattr(args, name)), None)
        if excluded:
            parser.error(f"--{excluded} has no effect with --{mode}: give one of them")
    missing = [flag for flag, value in (("-i IN", args.input), ("-o OUT", args.output)) if not value]
    if missing and not args.pipe:
        parser.error(f"{' and '.join(missing)} missing: give -i IN -o OUT, or --pipe WIDTHxHEIGHT for raw video")
    if os.sep in (args.suffix or ""):
        parser.error(f"--suffix {args.suffix}: not part of a file name")
    args.chop, args.suffix, args.precision = True, args.suffix or "", args.precision or "single"
    return args


if __name__ == "__main__":
    run_script(main)
