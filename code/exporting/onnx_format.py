"""ONNX files, for onnxruntime, TensorRT, DirectML and others."""
from collections.abc import Callable
from pathlib import Path

import torch

from exporting.common import DTYPES, Exportable, example, quietly, require
from model.common import Network
from model.onnx_file import OnnxNetwork

SUFFIXES = (".onnx",)
OPSET = 17  # the first with LayerNormalization


def write(net: Network, path: Path, precision: str, metadata: dict[str, str]) -> list[Path]:
    """Write an ONNX file from `input` to `output`, N x 3 x H x W in float32 of any N, H and W.

    PyTorch's older exporter is used, by way of TorchScript: the newer one gives equal results, but proves sizes
    symbolically, which takes minutes for SwinIR and SAN.
    """
    onnx = require("onnx", "onnx")
    require("onnxruntime", "onnx")  # for the check: before the slow part
    axes = {name: {0: "batch", 2: f"{name}_height", 3: f"{name}_width"} for name in ("input", "output")}
    with quietly():
        torch.onnx.export(Exportable(net, DTYPES[precision]), (example(net),), str(path), dynamo=False, opset_version=OPSET,
                          input_names=["input"], output_names=["output"], dynamic_axes=axes)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return [path]


def runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that computes the file by onnxruntime, on as many threads as PyTorch uses."""
    net = OnnxNetwork(path, cpu=True)
    return lambda x: torch.from_numpy(net.run(x.contiguous().numpy()))
