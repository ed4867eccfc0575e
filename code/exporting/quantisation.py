"""Static quantisation of ONNX files to int8, and what it costs and gains."""
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.image import list_images, read_image
from exporting.common import centre, require, to_tensor
from model.common import ImageConv, Network
from system.errors import UserError

QUANTISED = ["Conv", "Gemm", "MatMul"]  # types of nodes
MAX_IMAGES, MAX_SIDE = 32, 192  # of the images for calibration, which are cropped at their centre
REPEATS = 5


def calibration_images(folder: str, rgb_range: float) -> list[torch.Tensor]:
    """Return images of a folder, evenly spaced in their order, 1 x 3 x H x W; raises UserError without any."""
    files = list_images(folder)
    if not files:
        raise UserError(f"--int8 {folder}: no images there; give a folder with images such as the network is to upscale")
    files = files[::-(-len(files) // MAX_IMAGES)]
    return [to_tensor(centre(read_image(file)[0], MAX_SIDE, MAX_SIDE), rgb_range) for file in files]


def quantise(path: Path, net: Network, images: list[torch.Tensor]) -> None:
    """Quantise an ONNX file of the network to int8: per channel, with the value ranges on these images.

    Convolutions from and to an image stay in float32.
    """
    onnx, quantization = require("onnx", "onnx"), require("onnxruntime.quantization", "onnx")
    inputs = iter([{"input": image.numpy()} for image in images])
    reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda self: next(inputs, None)})()
    kept = {f"net.{name}.weight" for name, module in net.named_modules() if isinstance(module, ImageConv)}
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    with _without_advice():
        quantization.quantize_static(
            model, path, reader, quant_format=quantization.QuantFormat.QDQ, per_channel=True, op_types_to_quantize=QUANTISED,
            nodes_to_exclude=[node.name for node in model.graph.node if kept & set(node.input)],
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True})
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {**metadata, "precision": "int8"})
    onnx.save(model, path)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the root logger, to which onnxruntime writes advice for other networks."""
    logger = logging.getLogger()
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@torch.no_grad()
def seconds(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Return the median time of REPEATS runs on an image, after one that is not measured."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def psnr(images: list[torch.Tensor], run: Callable, reference: Callable, rgb_range: float) -> float:
    """Return the mean PSNR in dB of the outputs of `run` to those of `reference`, over all channels."""
    errors = [(run(x) - reference(x)).div(rgb_range).square().mean() for x in images]
    return -10 * torch.stack(errors).log10().mean().item()
