"""Reading checkpoint files, whatever they are wrapped in, without ever unpickling code."""
import pickle
import warnings
from pathlib import Path

import torch
from system.errors import UserError

NESTED = ("params_ema", "params", "state_dict", "model_state_dict")  # the first that is there holds the weights


class CheckpointError(UserError):
    """A checkpoint file that is missing, broken, or of another network than asked for."""


def read_checkpoint(path):
    """-> (header of a file of this project or None, {parameter name: tensor}); raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        hint = "; it is a folder, name the file: model/model_best.pt of a run" if path.is_dir() else ""
        raise CheckpointError(f"{path}: no such checkpoint file{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one line that follows says it
            content = read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: not a checkpoint that is safe to read: it is no PyTorch file, or holds code beside "
                              "weights") from None
    except PermissionError:
        raise CheckpointError(f"{path}: its permissions forbid to read it") from None
    except Exception:  # whatever a broken file makes the reader raise, which says little
        raise CheckpointError(f"{path}: broken file, or no checkpoint at all ({path.stat().st_size:,} bytes); fetch or copy "
                              "it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the weights of a network")
    if {"student", "optimizer", "iteration"} <= content.keys():
        raise CheckpointError(f"{path}: no checkpoint but what --resume 1 goes on from; take model/model_best.pt beside it")
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


def load_strictly(net, state, opening, ignored=()):
    """Loads weights: all are there in their shapes, and nothing else but names that begin with one of `ignored`.

    Raises CheckpointError, `opening` and then the first keys and shapes that do not fit.
    """
    wanted = net.state_dict()
    wrong = [f"no {key}" for key in wanted if key not in state]
    wrong += [f"{key} too many" for key in state if key not in wanted and not key.startswith(tuple(ignored))]
    wrong += [f"{key} is {list(state[key].shape)}, not {list(wanted[key].shape)}" for key in wanted
              if key in state and state[key].shape != wanted[key].shape]
    if wrong:
        raise CheckpointError(opening + "; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    net.load_state_dict({key: state[key] for key in wanted})
    return net
