"""Files of trained networks for other programs, one module per format.

Each module has SUFFIXES, in one of which the file's name ends; `write(net, path, precision, metadata)`, which returns the
files that it wrote; and `runner(path)`, which loads them by the format's own library and returns a function from
N x 3 x H x W to N x 3 x sH x sW, both in [0, net.rgb_range]. Optional packages are imported when they are used.
"""
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch

from exporting import quantisation
from exporting.common import sample_images
from model.common import Network
from system.errors import UserError, writing
from system.files import atomic_write

# largest difference to PyTorch in float32, relative to the largest value: rounding errors are 1e-6, in float16 1e-3
TOLERANCES = {"single": 1e-4, "half": 0.02}
MIN_INT8_PSNR = 25  # dB, of the output in int8 to that in float32; trained networks have 40 to 50


def export(net: Network, path: Path, kind: str, precision: str, metadata: dict[str, str],
           calibration: list[torch.Tensor] | None = None) -> tuple[list[Path], float]:
    """Write a network as a file of a format, and return the files and the difference to PyTorch that `compare` returns.

    kind: one of option.EXPORT_FORMATS. precision: single or half. calibration: images 1 x 3 x H x W, with which an ONNX file
    is quantised to int8. Raises UserError where the format cannot hold the network or a package is missing; nothing is
    written unless the difference is within TOLERANCES, or for int8 the PSNR above MIN_INT8_PSNR.
    """
    module = module_of(kind)
    if path.suffix not in module.SUFFIXES:
        raise UserError(f"--output {path}: the name of a file of --format {kind} ends in {' or '.join(module.SUFFIXES)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, writing(folder):
        part = Path(folder) / path.name
        files = module.write(net, part, precision, metadata)
        if calibration is not None:
            quantisation.quantise(part, net, calibration)
        difference, psnr = compare(net, module.runner(part))
        if psnr < MIN_INT8_PSNR if calibration is not None else difference > TOLERANCES[precision]:
            raise UserError(f"--format {kind} does not compute this network: its output differs by up to {difference:.2g} "
                            "of the maximum from PyTorch's; nothing was written")
        for file in files:
            atomic_write(path.with_name(file.name), file.read_bytes())
    return [path.with_name(file.name) for file in files], difference


def module_of(kind: str) -> ModuleType:
    """Return the module of a format."""
    return importlib.import_module(f"exporting.{kind}_format")


@torch.no_grad()
def compare(net: Network, run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    """Return the largest difference between `run` and the network in float32, and the lowest PSNR in dB.

    They are those of two photos of odd sizes, relative to the largest value, at least net.rgb_range.
    """
    largest = error = 0.0
    for x in sample_images(net.rgb_range):
        expected, found = net(x), run(x)
        if found.shape != expected.shape or not found.isfinite().all():
            return math.inf, -math.inf
        difference = (found - expected) / max(net.rgb_range, expected.abs().max().item())
        largest, error = max(largest, difference.abs().max().item()), max(error, difference.square().mean().item())
    return largest, -10 * math.log10(error) if error else math.inf
