"""TorchScript files, which run in PyTorch, also from C++, without this project's code."""
import json
from collections.abc import Callable
from pathlib import Path

import torch

from exporting.common import quietly, trace
from model.common import Network

SUFFIXES = ".pt", ".pth", ".ts"


def write(net: Network, path: Path, precision: str, metadata: dict[str, str]) -> list[Path]:
    """Write a TorchScript file, with input and output in float32; the metadata are its extra file metadata.json."""
    with quietly():
        torch.jit.save(trace(net, precision), path, _extra_files={"metadata.json": json.dumps(metadata)})
    return [path]


def runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that computes the file by PyTorch."""
    with quietly():
        return torch.jit.load(path, map_location="cpu")
