"""safetensors files, which `model.load_model` reads like a checkpoint."""
from collections.abc import Callable
from pathlib import Path

import torch

from exporting.common import DTYPES, require
from model import load_model
from model.common import Network

SUFFIXES = (".safetensors",)


def write(net: Network, path: Path, precision: str, metadata: dict[str, str]) -> list[Path]:
    """Write the weights, with the network, its sizes, scale and range as metadata."""
    save(net.state_dict(), path, precision, metadata)
    return [path]


def save(state: dict[str, torch.Tensor], path: Path, precision: str, metadata: dict[str, str]) -> None:
    """Write tensors, converted as `in_precision` does."""
    require("safetensors.torch", "safetensors").save_file(in_precision(state, precision), path, metadata)


def in_precision(state: dict[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
    """Convert the floating-point tensors of a state to float32 (single) or float16 (half)."""
    return {name: (tensor.to(DTYPES[precision]) if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in state.items()}


def runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the network of the file, in float32."""
    net = load_model(path)
    net.rgb_range = read_range(path)
    return net


def read_range(path: Path) -> float:
    """Return the maximum pixel value in the metadata of a file."""
    with require("safetensors", "safetensors").safe_open(path, "pt") as file:
        return float(file.metadata()["rgb_range"])
