"""Reading checkpoint files without unpickling code, and building a network only if names and shapes fit it."""
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os.path import isdir
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from system.errors import UserError
from system.files import file_size, load_torch_file

NESTED = ("params_ema", "params", "state_dict", "model_state_dict")  # keys of the weights; the first that exists is used
FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64  # dtypes that are converted to float32
MAX_TENSORS = 10_000  # parameters of a network; the largest published ones have 1,700
MAX_BUFFERS = 1e9  # bytes of SwinIR's tables, which grow with the window's side^4 and are not in the file
MAX_MISSING = 1000  # parameters that a file may lack and still get an error message with their names
MAX_TIED = 4  # parameters that may share the same storage


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged, or of another network than the expected one."""


def read_checkpoint(path: Path | str) -> tuple[dict | None, dict[str, torch.Tensor]]:
    """Return the header of a file of this project, or None, and {parameter name: tensor}.

    Tensors are on the CPU, of real numbers, finite if they are floating-point, and together no larger than the file. Raises
    CheckpointError.
    """
    path = Path(path)
    try:
        size = file_size(path)
        content = read_safetensors(path) if path.suffix == ".safetensors" else load_torch_file(path)
    except UserError as error:
        hint = "; give the file, such as model/model_best.pt of a run" if isdir(path) else ""
        raise CheckpointError(f"{error}{hint}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the weights of a network")
    if {"student", "optimizer", "iteration"} <= content.keys():
        raise CheckpointError(f"{path}: no checkpoint, but a training state (--resume 1); use model/model_best.pt beside it")
    header = {key: content[key] for key in ("network", "config") if key in content}
    for key in NESTED:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {name.removeprefix("module."): value for name, value in content.items()
             if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not state:
        names = ", ".join(name[:40] for name in content if isinstance(name, str))
        raise CheckpointError(f"{path}: holds no weights (its keys: {names[:200]})")
    check_tensors(path, state, size)
    is_header = isinstance(header.get("config"), dict) and isinstance(header.get("network"), str)
    return (header if is_header else None), state


def check_tensors(path: Path, state: dict[str, torch.Tensor], size: int) -> None:
    """Raise CheckpointError unless the tensors of a file of `size` bytes hold finite real numbers that are in the file."""
    if len(state) > MAX_TENSORS:
        raise CheckpointError(f"{path}: holds {len(state):,} tensors, more than {MAX_TENSORS:,}, the maximum")
    stored = 0
    for name, value in state.items():
        fault = fault_of(value)
        if fault:
            raise CheckpointError(f"{path}: {name} {fault}")
        stored += value.nbytes
        if stored > MAX_TIED * size:
            raise CheckpointError(f"{path}: its tensors are larger than the file ({size:,} bytes)")
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite numbers")


def fault_of(tensor: torch.Tensor) -> str | None:
    """Return why a tensor from a file cannot be a weight, or None."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "is a sparse or nested tensor; save dense ones"
    if tensor.is_quantized:
        return "is quantised; save it with .dequantize()"
    if tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__} on {tensor.device.type}, without readable numbers"
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in FLOATS):
        return f"is {name_of(tensor.dtype)}; weights are {', '.join(map(name_of, FLOATS))}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "repeats a smaller tensor (a stride of 0); save it with .contiguous()"
    return None


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def read_safetensors(path: Path) -> dict[str, object]:
    """Return the tensors of a .safetensors file, with `network` and `config` where its metadata are those of export.py.

    The format has no checksums. Raises UserError.
    """
    try:
        from safetensors import safe_open  # noqa: PLC0415 - optional
        from safetensors.torch import load_file  # noqa: PLC0415
    except ImportError:
        raise UserError(f"{path}: a .safetensors file needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        header = {"network": about["network"], "config": json.loads(about["config"])} if {"network", "config"} <= about.keys(
            ) else {}
        return {**header, **load_file(path)}
    except Exception:  # a damaged file can make the reader raise anything
        raise UserError(f"{path}: damaged, or no .safetensors file; fetch or copy it again") from None


@contextmanager
def on_meta_device(most: int = MAX_TENSORS) -> Iterator[None]:
    """Build networks in the body without memory for their weights; raises UserError above `most` parameters.

    Sizes from a file or a flag can describe a network that would take hours or all memory to build.
    """
    number = 0

    def count(module, name, parameter):
        nonlocal number
        number += parameter is not None
        if number > most:
            raise UserError(f"more than {most:,} parameter tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), _WithoutInitialisation():
            yield
    finally:
        hook.remove()


class _WithoutInitialisation(TorchFunctionMode):
    """Skip in-place operations: on the meta device they have no effect, and their first use takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name == "__setitem__" or (name.endswith("_") and not name.startswith("__")):
            return args[0] if args else kwargs["tensor"]  # as in nn.init
        return function(*args, **(kwargs or {}))


def build(make: Callable[[], nn.Module], state: dict[str, torch.Tensor], name: str, opening: str,
          ignored: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> nn.Module:
    """Build the network `make()` with the weights of `state`, after a comparison of all names and shapes.

    The file may hold further parameters whose names begin with one of `ignored`, and lack those whose names begin with one
    of `optional`, which keep their initial values. Raises CheckpointError that begins with `opening`.
    """
    def completed(net):
        return {**{key: value for key, value in net.state_dict().items() if key.startswith(optional)}, **state}

    try:
        with on_meta_device(len(state) + MAX_MISSING):
            outline = make()
    except Exception as error:  # sizes from a file can make a constructor raise anything
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{opening}{name} cannot be built ({reason})") from None
    buffers = sum(buffer.nbytes for buffer in outline.buffers())
    if buffers > MAX_BUFFERS:
        raise CheckpointError(f"{opening}{name} cannot be built (its tables take {buffers / 1e9:.1f} GB)")
    check_fit(outline, completed(outline), opening, ignored)
    net = make()
    return load_strictly(net, completed(net), opening, ignored)


def check_fit(net: nn.Module, state: dict[str, torch.Tensor], opening: str, ignored: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError, `opening` and the first names, shapes and dtypes that do not fit, unless the state fits."""
    expected = net.state_dict()
    wrong = [f"no {key}" for key in expected if key not in state]
    wrong += [f"unknown {key}" for key in state if key not in expected and not key.startswith(tuple(ignored))]
    wrong += [f"{key} is {list(state[key].shape)}, not {list(expected[key].shape)}" for key in expected
              if key in state and state[key].shape != expected[key].shape]
    wrong += [f"{key} is {name_of(state[key].dtype)}, not one of {', '.join(map(name_of, FLOATS))}" for key in expected
              if key in state and state[key].dtype not in FLOATS]
    if wrong:
        raise CheckpointError(opening + "; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))


def load_strictly(net: nn.Module, state: dict[str, torch.Tensor], opening: str, ignored: tuple[str, ...] = ()) -> nn.Module:
    """Load weights, all of them in their shapes, into the network and return it; raises CheckpointError as `check_fit`."""
    check_fit(net, state, opening, ignored)
    net.load_state_dict({key: state[key] for key in net.state_dict()})
    return net
