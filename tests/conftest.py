"""Shared parts of the tests: the code on the path, golden parameters, a small data root."""
import gc
import json
import os
import sys
from math import prod, sqrt
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: threads cost more than they bring, in children as well

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


def esrgan_names(state, layout):
    """The parameters of an RRDB under the names of ESRGAN's code, or with numbered layers, of its first code."""
    first = layout == "the first ESRGAN"
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("body."))
    layers = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}", "conv_up1": "model.3", "conv_up2": "model.6",
              "conv_hr": "model.8", "conv_last": "model.10"} if first else {
              "conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    renamed = {}
    for name, value in state.items():
        *path, layer, kind = name.split(".")
        if path:
            _, number, block = path
            name = f"{'model.1.sub' if first else 'RRDB_trunk'}.{number}.{block.upper()}.{layer}{'.0' * first}.{kind}"
        else:
            name = f"{layers.get(layer, layer)}.{kind}"
        renamed[name] = value
    return renamed


def pytest_sessionfinish():
    """Ends the workers of loaders that only a kept traceback still holds; Python would wait for them before it ends."""
    gc.collect()


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data root with `tiny/HR`: four small images of smooth shapes with edges."""
    import imageio.v3 as iio  # noqa: PLC0415
    root = tmp_path_factory.mktemp("data")
    (root / "tiny" / "HR").mkdir(parents=True)
    y, x = np.mgrid[:56, :64]
    for index in range(4):
        waves = [np.sin(x / (3 + index) + k) + np.cos(y / (4 + k)) + (x + y > 50 + 5 * index) for k in range(3)]
        image = np.clip(np.stack(waves, 2) * 50 + 100, 0, 255).astype(np.uint8)
        iio.imwrite(root / "tiny" / "HR" / f"{index}.png", image)
    return root


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main('train', '--flag value ...') -> (exit status, its lines on stdout, on stderr), in this process."""
    import importlib  # noqa: PLC0415

    from system import errors  # noqa: PLC0415

    def run(script, line):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *line.split()])
        module = importlib.import_module(script if script != "test" else "test")
        with pytest.raises(SystemExit) as ended:
            errors.run(module.main)
        out, err = capsys.readouterr()
        return ended.value.code, out.splitlines(), [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    return run
