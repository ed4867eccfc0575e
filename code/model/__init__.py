"""Building networks by name, and loading them from checkpoints in every layout in which they were released."""
import inspect
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from model import carn, compact, edsr, imdn, nafnet, rcan, rdn, restormer, rrdb, san, span, swinir
from model.common import MEAN_SHIFTS
from model.layout import describe_nearest, recognise
from model.loading import CheckpointError, build, on_meta_device, read_checkpoint
from model.reparameterisation import fuse
from model.slicing import inherit, narrow_network, slim
from system.errors import UserError
from system.memory_budget import free_memory

__all__ = ["NETWORKS", "CheckpointError", "describe", "fuse", "inherit", "load_model", "load_with_flags", "make_model",
           "require_rgb", "save_header", "slim"]

UNDETERMINED = "res_scale", "img_range", "act_type", "tlc_size"  # not in names and shapes: a flag replaces the value
FLOATS = "res_scale", "mlp_ratio", "img_range", "ffn_expansion_factor"
LISTS = "depths", "num_heads", "multi_scale", "enc_blk_nums", "dec_blk_nums", "num_blocks", "heads"
STRINGS = "LayerNorm_type", "act_type", "carn_variant", "reparameterise", "upsampler", "resi_connection", "RDNconfig"
SCALES = 1, 2, 3, 4, 8

log = logging.getLogger("sr")

# name on the command line: (class, layouts of its checkpoints)
NETWORKS = {
    "EDSR": (edsr.EDSR, edsr.LAYOUTS),
    "RCAN": (rcan.RCAN, rcan.LAYOUTS),
    "CARN": (carn.CARN, carn.LAYOUTS),
    "CARN_M": (carn.CARN_M, carn.LAYOUTS_M),
    "RDN": (rdn.RDN, rdn.LAYOUTS),
    "IMDN": (imdn.IMDN, imdn.LAYOUTS),
    "Compact": (compact.Compact, compact.LAYOUTS),
    "SPAN": (span.SPAN, span.LAYOUTS),
    "SAN": (san.SAN, san.LAYOUTS),
    "SwinIR": (swinir.SwinIR, swinir.LAYOUTS),
    "NAFNet": (nafnet.NAFNet, nafnet.LAYOUTS),
    "Restormer": (restormer.Restormer, restormer.LAYOUTS),
    "RRDB": (rrdb.RRDB, rrdb.LAYOUTS),
}


def make_model(name: str, args: SimpleNamespace) -> nn.Module:
    """Build a new network: sizes from `args` where it has them, else the defaults of the constructor.

    Raises UserError for an unknown name, and for sizes that do not fit together or need more memory than is free.
    """
    if name not in NETWORKS:
        raise UserError(f"there is no network {name}; the networks are {', '.join(NETWORKS)}")
    network = NETWORKS[name][0]
    note_unused(name, getattr(args, "given", set()) & size_flags() - inspect.signature(network).parameters.keys())
    sizes = {key: getattr(args, key, None) for key in inspect.signature(network).parameters}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    try:
        with on_meta_device():
            outline = network(**sizes)
    except (UserError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:200]}") from None
    needed, free = (sum(x.nbytes for x in (*outline.parameters(), *outline.buffers())), free_memory(torch.device("cpu")))
    if needed > free:
        raise UserError(f"{name}: its weights take {needed / 1e9:,.1f} GB of the {free / 1e9:.1f} GB of free memory; give "
                        "smaller sizes")
    net = network(**sizes)
    net.rgb_range = getattr(args, "rgb_range", 255)
    return net


def load_model(path: Path | str, **override) -> nn.Module:
    """Load the network in a checkpoint file, from which its name, sizes and scale are read.

    `override` gives sizes that a file does not determine (`res_scale=`, `img_range=`; `scale=` if it holds several), and
    `width_mult=` the width of a channel slice to return. Weights are on the CPU. Raises CheckpointError, with the file and
    the first keys or shapes that do not fit.
    """
    width = override.pop("width_mult", None)
    if width:
        net = load_model(path, **override)
        return inherit(narrow_network(net, width), net)
    header, state = read_checkpoint(path)
    for name, (network, layouts) in NETWORKS.items():
        if header and header["network"] != name:
            continue
        found = (header["config"], state, None) if header else recognise(state, layouts)
        if found:
            return _build(path, name, network, *found, override)
    if header:
        raise CheckpointError(f"{path}: holds a network {header['network'][:40]}, which this version does not have")
    nearest = describe_nearest(state, {name: layouts for name, (_, layouts) in NETWORKS.items()})
    if nearest:
        raise CheckpointError(f"{path}: {nearest}")
    keys = ", ".join(list(state)[:4])[:200]
    raise CheckpointError(f"{path}: not a checkpoint of {', '.join(NETWORKS)} in a known layout; it begins with {keys}")


def load_with_flags(path: Path | str, args: SimpleNamespace, without: set | tuple = ()) -> nn.Module:
    """Load a checkpoint with the sizes that are given as flags, except those in `without`.

    Raises CheckpointError where a flag contradicts the file, or the network takes gray images.
    """
    sizes = (args.given & (size_flags() | {"width_mult"})) - set(without)
    net = require_rgb(load_model(path, **{key: getattr(args, key) for key in sizes}), path)
    name = save_header(net)["network"]
    if "model" in args.given and args.model != name:
        raise CheckpointError(f"{path}: holds a network {name}, not --model {args.model}")
    note_unused(name, sizes - net.config.keys() - {"width_mult"})
    net.rgb_range = args.rgb_range
    return net


def size_flags() -> set[str]:
    """Return the names of all networks' constructor arguments, which are flags as well."""
    return {key for network, _ in NETWORKS.values() for key in inspect.signature(network).parameters}


def note_unused(name: str, flags: set[str]) -> None:
    """Log the given flags that are no constructor arguments of the network."""
    for flag in sorted(flags):
        log.info("--%s has no effect: %s has no such size", flag, name)


def describe(net: nn.Module) -> str:
    """Return the name, sizes and number of parameters of a network or channel slice in one line."""
    sizes = ", ".join(f"{name} {value}" for name, value in net.config.items())
    shapes = getattr(net, "shapes", None) or {name: parameter.shape for name, parameter in net.named_parameters()}
    name = type(getattr(net, "full_network", net)).__name__
    return f"{name}, {sizes}, {sum(shape.numel() for shape in shapes.values()):,} parameters"


def require_rgb(net: nn.Module, path: Path | str) -> nn.Module:
    """Return the network; raises CheckpointError if it takes gray images."""
    if net.config.get("in_chans", 3) != 3:
        raise CheckpointError(f"{path}: holds a network {type(net).__name__} for gray images; only RGB is supported")
    return net


def _build(path, name, network, config, state, layout, override):
    override = {key: value for key, value in override.items() if value is not None}
    wrong = next((key for key, value in config.items() if not is_size(key, value)), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: {name} cannot be built: {str(wrong)[:40]} in its header is not a valid size")
    if config.get("multi_scale"):  # the scale to use: that of `override`, or of the header of this project's files
        scale = override.pop("scale", config.get("scale"))
        if scale not in config["multi_scale"]:
            held = ", ".join(f"x{number}" for number in config["multi_scale"])
            raise CheckpointError(f"{path}: holds {name} for {held}: "
                                  + (f"not for x{scale}" if scale else "choose one with --scale"))
        config = {**config, "scale": scale}
    for key, value in override.items():
        if key not in UNDETERMINED and as_list(config.get(key, value)) != as_list(value):
            raise CheckpointError(f"{path}: holds {name} with {key} {config[key]}, not {value}")
    config = {**config, **{key: value for key, value in override.items() if key in inspect.signature(network).parameters}}
    native = NETWORKS[name][1][0].name
    origin = f" in the layout of {layout}" if layout else ""
    origin += f", renamed as in {native}" if layout not in (None, native) else ""
    return build(lambda: network(**config), state, name, f"{path}: looks like {name} {config}{origin}, but ",
                 optional=MEAN_SHIFTS).eval()


def is_size(key: str, value: object) -> bool:
    """Return whether a value from a file's header can be the constructor argument `key` of a network."""
    if key in STRINGS:
        return isinstance(value, str) and len(value) < 100
    if key in LISTS:
        return value is False or (isinstance(value, (list, tuple)) and all(is_size("", number) for number in value))
    if key in FLOATS:
        return type(value) in (int, float) and math.isfinite(value) and (value > 0 or (value == 0 and key == "res_scale"))
    if key == "tlc_size" and value == 0:
        return type(value) is int
    return type(value) is int and 0 < value <= 65536 and (key != "scale" or value in SCALES)


def as_list(value: object) -> object:
    """Return a tuple as a list, and anything else as it is."""
    return list(value) if isinstance(value, tuple) else value


def save_header(net: nn.Module) -> dict:
    """Return the header of a checkpoint, name and constructor arguments, from which `load_model` builds the network."""
    name = next(name for name, (network, _) in NETWORKS.items() if type(net) is network)
    return {"network": name, "config": dict(net.config)}
