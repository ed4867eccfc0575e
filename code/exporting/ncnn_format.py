"""ncnn files: FILE.param and FILE.bin, converted from TorchScript by pnnx."""
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from exporting.common import RECORDED_SIZE, SIZES, quietly, require, trace
from model.common import Network
from system.errors import UserError

SUFFIXES = (".param",)
SECONDS = 600  # after which the conversion has failed


def write(net: Network, path: Path, precision: str, metadata: dict[str, str]) -> list[Path]:
    """Write FILE.param and FILE.bin, with the blobs `data` and `output`; weights are stored in the precision.

    Raises UserError for a network with a layer that ncnn does not have.
    """
    require("ncnn", "ncnn")
    program = require("pnnx", "ncnn").EXEC_PATH
    folder, shapes = path.parent, [f"[1,3,{height},{width}]" for height, width in (RECORDED_SIZE, SIZES[0])]
    with quietly():
        torch.jit.save(trace(net, "single"), folder / "traced.pt")
    try:
        ran = subprocess.run([program, "traced.pt", f"inputshape={shapes[0]}", f"inputshape2={shapes[1]}",
                              f"fp16={int(precision == 'half')}"],
                             cwd=folder, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--format ncnn: pnnx does not run ({error})") from None
    converted = folder / "traced.ncnn.param"
    lines = [line.split() for line in converted.read_text().splitlines()] if converted.is_file() else []
    unknown = sorted({line[0] for line in lines if "." in line[0]})  # operations of PyTorch that pnnx left as they are
    if unknown or not lines or ran.returncode:
        reason = f"ncnn has no {', '.join(unknown)}" if unknown else f"pnnx ended with status {ran.returncode}"
        raise UserError(f"--format ncnn: {metadata['network']} cannot be converted ({reason}); give --format onnx")
    names = {"in0": "data", "out0": "output"}
    lines = [" ".join(names.get(word, word) for word in line) for line in lines]
    about = [f"# {key}: {value}" for key, value in metadata.items()]
    path.write_text("\n".join([*lines, *about]) + "\n")
    return [path, converted.with_suffix(".bin").rename(path.with_suffix(".bin"))]


def runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that computes the files by ncnn, on as many threads as PyTorch uses, without half precision."""
    ncnn = require("ncnn", "ncnn")
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise UserError("--format ncnn: ncnn cannot load the converted network; give --format onnx")

    def run(x):
        outputs = []
        for image in x.contiguous().numpy():
            extractor = net.create_extractor()
            extractor.input("data", ncnn.Mat(image).clone())
            outputs.append(torch.from_numpy(np.array(extractor.extract("output")[1])))
        return torch.stack(outputs)
    return run
