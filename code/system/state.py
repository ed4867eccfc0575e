"""Checks of a training state from a file; ValueError where something is missing, unknown or of another shape."""
import torch

ADAM = {"step", "exp_avg", "exp_avg_sq"}
REQUIRED = {"Adam": ADAM, "AdamW": ADAM, "Muon": ADAM, "SGD": set(), "RMSprop": {"step", "square_avg"}}
OPTIONAL = {"SGD": {"momentum_buffer"}, "RMSprop": {"momentum_buffer"}}  # with a momentum


def check_like(value: object, like: object, name: str) -> None:
    """Raise ValueError unless `value` has the type of `like`, and its keys, or its shape, dtype and finite numbers.

    The extra states of modules are not checked here, but by the modules when they load them.
    """
    if isinstance(like, dict) and isinstance(value, dict):
        odd = value.keys() ^ like.keys()
        if odd:
            key = min(odd, key=str)
            raise ValueError(f"{name} has {'no' if key in like else 'an unknown'} entry {key}")
        for key in like:
            if not str(key).endswith("_extra_state"):
                check_like(value[key], like[key], f"{name}.{key}")
    elif isinstance(like, torch.Tensor) and isinstance(value, torch.Tensor):
        if value.shape != like.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, not {list(like.shape)}")
        if value.dtype != like.dtype or value.layout != like.layout:
            raise ValueError(f"{name} is a tensor of {value.dtype}, {value.layout}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    elif type(value) is not type(like):
        raise ValueError(f"{name} is of type {type(value).__name__}, not {type(like).__name__}")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load moments and step counts into an optimiser that keeps its own settings (weight decay, betas ...).

    `Optimizer.load_state_dict` alone replaces the settings by those of the state, and checks no shapes: moments of another
    shape end a fused step in a segmentation fault. Raises ValueError where a moment is missing or has another shape.
    """
    own = optimizer.state_dict()["param_groups"]
    lengths = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], own)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"the optimizer has moments of {lengths[0]} parameters, not {lengths[1]}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kind = type(optimizer).__name__
    matrices = [k for group in own if group.get("matrix") for k in group["params"]]  # of Muon
    entries = {}
    for index, values in state["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"the optimizer has an unknown entry {index!r}")
        name = f"optimizer entry {index}"
        values = {key: value for key, value in values.items() if value is not None}
        required = {"step", "exp_avg"} if index in matrices else REQUIRED[kind]
        like = {key: torch.zeros(()) if key == "step" else parameters[index].detach()
                for key in required | (OPTIONAL.get(kind, set()) & values.keys())}
        check_like(values, like, name)
        if kind == "RMSprop":  # it needs the buffer if the resumed run has a momentum for the first time
            values.setdefault("momentum_buffer", torch.zeros_like(parameters[index]))
        entries[index] = values
    optimizer.load_state_dict({"state": entries, "param_groups": own})
