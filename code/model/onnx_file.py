"""A super-resolution network in an ONNX file, run by onnxruntime."""
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model.common import Network
from model.loading import CheckpointError
from option_types import pixel_range, size
from system.errors import UserError, reason_of
from system.files import file_size

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxNetwork(Network):
    """The network of an ONNX file with one input and one output, NCHW RGB in float32 or float16.

    Its metadata may give `rgb_range`, the maximum pixel value (default: 1), and `multiple`, of which height and width of the
    input must be a multiple (default: 1). The scale is that of a trial run. Tiles have a fixed size, as the memory that
    onnxruntime takes is not measured. Raises UserError, with the file, where onnxruntime is missing, cannot load or run the
    file, or its output is no upscaled RGB image.
    """

    tile = 256

    def __init__(self, path: Path | str, cpu: bool = False):
        super().__init__()
        try:
            import onnxruntime  # noqa: PLC0415 - optional
        except ImportError:
            raise UserError(f"{path}: an ONNX file needs the package onnxruntime: pip install onnxruntime") from None
        file_size(path)  # raises UserError unless it is a file that can be read
        self.path = path
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # its device is that of the tiles
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        wanted = ("CPUExecutionProvider",) if cpu else ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers)
        except Exception as error:  # onnxruntime has an exception for each kind of failure
            raise CheckpointError(f"{path}: onnxruntime cannot load it ({reason_of(error)[:200]})") from None
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.type = TYPES.get(inputs[0].type) if len(inputs) == len(outputs) == 1 else None
        if self.type is None or len(inputs[0].shape) != 4:
            raise CheckpointError(f"{path}: not a network from one batch of images, N x 3 x H x W of float32 or float16, to "
                                  "another")
        if any(isinstance(side, int) for side in inputs[0].shape[2:]):
            raise CheckpointError(f"{path}: takes images of {inputs[0].shape[2]} x {inputs[0].shape[3]} pixels only; export "
                                  "it with dynamic height and width")
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self.native_range = pixel_range(metadata.get("rgb_range", "1"))
            self.window = size(metadata.get("multiple", "1"))
        except Exception as error:
            raise CheckpointError(f"{path}: invalid rgb_range or multiple in its metadata ({error})") from None
        side = -(-32 // self.window) * self.window
        shape = tuple(self.run(np.zeros((1, 3, side, side + self.window), np.float32)).shape)
        self.scale = shape[-1] // (side + self.window)
        if self.scale < 1 or shape != (1, 3, self.scale * side, self.scale * (side + self.window)):
            raise CheckpointError(f"{path}: its output for an image of 1 x 3 x {side} x {side + self.window} is "
                                  f"{' x '.join(map(str, shape))}, no upscaled RGB image")
        self.config = dict(scale=self.scale)

    def run(self, x: np.ndarray) -> np.ndarray:
        """Run the file on N x 3 x H x W; raises CheckpointError."""
        try:
            return self.session.run(None, {self.session.get_inputs()[0].name: x.astype(self.type, copy=False)})[0]
        except Exception as error:
            raise CheckpointError(f"{self.path}: onnxruntime cannot run it ({reason_of(error)[:200]})") from None

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image, as `Network.super_resolve` describes; there are no feature maps."""
        return torch.from_numpy(self.run(np.ascontiguousarray(x.numpy())).astype(np.float32, copy=False)), []
