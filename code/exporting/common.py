"""What the formats share: packages, metadata, photos to check a file on, and the recording of a network."""
import copy
import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import nn

from data import source
from data.image import read_photo
from model import save_header
from model.common import Network
from system.errors import UserError, reason_of

DTYPES = {"single": torch.float32, "half": torch.float16}
SIZES = (37, 53), (64, 48)  # of the photos
RECORDED_SIZE = 24, 20  # of the image with which a network is recorded


class Exportable(nn.Module):
    """A network to be recorded, whose weights and computation have another dtype, but whose input and output are float32.

    Raises UserError for a network that computes something else for large images, since only one path is recorded.
    """

    def __init__(self, net: Network, dtype: torch.dtype):
        super().__init__()
        if net.config.get("tlc_size"):
            raise UserError(f"--tlc_size {net.config['tlc_size']} applies to images above that size, which a recorded "
                            "network does not distinguish; give --tlc_size 0, or --format safetensors")
        self.net, self.dtype = copy.deepcopy(net).to(dtype).requires_grad_(False).eval(), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the network on N x 3 x H x W."""
        return self.net(x.to(self.dtype)).float()


def require(name: str, kind: str) -> ModuleType:
    """Import an optional package; raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--format {kind} needs the package {name.partition('.')[0]} ({reason_of(error)}): pip install "
                        "-r requirements-export.txt") from None


def describe(net: Network, precision: str, origin: str, license: str) -> dict[str, str]:
    """Return the metadata of a file: all that a program needs to run it, and where the weights come from.

    `multiple`: of which height and width of the input must be a multiple, always 1, since networks pad their inputs
    themselves. `window` and `receptive_field`: where tiles must begin, and their overlap, in LR pixels (`image`: all of it).
    """
    header = save_header(net)
    return {"network": header["network"], "config": json.dumps(header["config"]), "scale": str(net.scale),
            "rgb_range": f"{net.rgb_range:g}", "multiple": "1", "window": str(net.window),
            "receptive_field": str(net.receptive_field or "image"), "precision": precision, "source": origin,
            "license": license or "not stated"}


def sample_images(rgb_range: float) -> list[torch.Tensor]:
    """Return crops of photos of scikit-image, 1 x 3 x H x W in [0, rgb_range], of the sizes SIZES."""
    return [to_tensor(photo, rgb_range) for photo in _photos()]


@cache
def _photos():
    pairs = source.sample(train=False).pairs
    return [centre(read_photo(pair.hr), *size) for pair, size in zip(pairs, SIZES)]


def centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop H x W x 3 at its centre to at most height x width."""
    top, left = (max(0, side - size) // 2 for side, size in zip(image.shape, (height, width)))
    return image[top:top + height, left:left + width]


def to_tensor(image: np.ndarray, rgb_range: float) -> torch.Tensor:
    """Convert uint8 H x W x 3 to 1 x 3 x H x W in [0, rgb_range]."""
    return torch.tensor(image).permute(2, 0, 1)[None].float().contiguous() * (rgb_range / 255)


@contextmanager
def quietly() -> Iterator[None]:
    """Ignore warnings in the body: that the recorder is deprecated, and that it does not follow an `if` on a size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trace(net: Network, precision: str) -> torch.jit.ScriptModule:
    """Record the network in TorchScript, for images of any size."""
    with quietly():
        return torch.jit.trace(Exportable(net, DTYPES[precision]), example(net), check_trace=False)


def example(net: Network) -> torch.Tensor:
    """Return the image 1 x 3 x H x W with which a network is recorded."""
    return torch.rand(1, 3, *RECORDED_SIZE) * net.rgb_range
