"""Shared parts of the tests: the code on the path, golden parameters, a small data root."""
import json
import os
import sys
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))
GOLDEN = Path(__file__).parent / "golden"
CONSTANTS = "sub_mean", "add_mean", "relative_position_index", "attn_mask"  # whatever a network builds itself


def golden_parameters(keys):
    """Parameters by golden/README.md's recipe from {name: [shape, dtype]}; constants are left out."""
    state = {}
    for k, (name, (shape, dtype)) in enumerate(sorted(keys.items())):
        if not dtype.startswith("float") or any(part in name for part in CONSTANTS):
            continue
        scale = 0.7 / sqrt(prod(shape) / shape[0]) if len(shape) > 1 else 0.05
        value = np.random.RandomState(k).standard_normal(shape) * scale
        if len(shape) == 1 and name.endswith("weight"):
            value += 1.0
        state[name] = torch.tensor(value, dtype=torch.float32)
    return state


@pytest.fixture
def golden(tmp_path):
    """golden(name) -> (checkpoint file in the authors' layout, input, arrays of the npz, json)."""
    def load(name):
        about = json.loads((GOLDEN / f"{name}.json").read_text())
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file}
        path = tmp_path / f"{name}.pth"
        torch.save(golden_parameters(about["keys"]), path)
        x = np.random.RandomState(1234).uniform(*about["input_range"], about["input_shape"])
        return path, torch.tensor(x, dtype=torch.float32), arrays, about
    return load


@pytest.fixture(scope="session")
def shared():
    """The folder with real images and weights, from SR_SHARED; tests that need it are skipped without it."""
    if not os.environ.get("SR_SHARED"):
        pytest.skip("SR_SHARED is not set: no real images and weights here")
    return Path(os.environ["SR_SHARED"])
