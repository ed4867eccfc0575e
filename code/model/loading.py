"""Reading checkpoint files, whatever they are wrapped in, without ever unpickling code."""
import pickle
from pathlib import Path

import torch

from error import UserError

NESTED = ("params_ema", "params", "state_dict", "model_state_dict")  # the first that is there holds the weights


class CheckpointError(UserError):
    """A checkpoint file that is missing, broken, or of another network than asked for."""


def read_checkpoint(path):
    """-> (header of a file of this project or None, {parameter name: tensor}); raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: not a checkpoint that is safe to read: it is no PyTorch file, or holds code beside "
                              "weights") from None
    except Exception as error:  # whatever a broken file makes the reader raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: broken file ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the weights of a network")
    header = {key: content[key] for key in ("network", "config") if key in content}
    for key in NESTED:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {name.removeprefix("module."): value for name, value in content.items()
             if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no weights (its keys: {', '.join(map(str, list(content)[:4]))})")
    broken = next((name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()), None)
    if broken:
        raise CheckpointError(f"{path}: {broken} holds NaN or infinite numbers")
    return (header if isinstance(header.get("config"), dict) and "network" in header else None), state


def read_safetensors(path):
    try:
        from safetensors.torch import load_file  # noqa: PLC0415 - optional
    except ImportError:
        raise CheckpointError(f"{path}: to read it needs the package safetensors: pip install safetensors") from None
    return load_file(path)
