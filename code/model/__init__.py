"""Networks by name, and from checkpoints of any layout they were released in."""
import inspect
import logging

from system.errors import UserError

from model import carn, edsr, imdn, rcan, rdn, san, swinir
from model.common import MEAN_SHIFTS
from model.layout import describe_nearest, recognise
from model.loading import CheckpointError, load_strictly, read_checkpoint
from model.slicing import inherit, narrow_network, slim

__all__ = ["NETWORKS", "CheckpointError", "describe", "inherit", "load_as_told", "load_model", "make_model", "require_rgb",
           "save_header", "slim"]

LEFT_OPEN = "res_scale", "img_range"  # sizes that do not show in names and shapes: those asked for win

log = logging.getLogger("sr")

# name on the command line: (class, layouts of its checkpoints)
NETWORKS = {
    "EDSR": (edsr.EDSR, edsr.LAYOUTS),
    "RCAN": (rcan.RCAN, rcan.LAYOUTS),
    "CARN": (carn.CARN, carn.LAYOUTS),
    "CARN_M": (carn.CARN_M, carn.LAYOUTS_M),
    "RDN": (rdn.RDN, rdn.LAYOUTS),
    "IMDN": (imdn.IMDN, imdn.LAYOUTS),
    "SAN": (san.SAN, san.LAYOUTS),
    "SwinIR": (swinir.SwinIR, swinir.LAYOUTS),
}


def make_model(name, args):
    """A new network of that name: sizes from the flags in `args` that its constructor knows, its own for the rest."""
    if name not in NETWORKS:
        raise UserError(f"no network is called {name}: there are {', '.join(NETWORKS)}")
    network = NETWORKS[name][0]
    note_unused(name, getattr(args, "given", set()) & size_flags() - inspect.signature(network).parameters.keys())
    sizes = {key: getattr(args, key, None) for key in inspect.signature(network).parameters}
    try:
        net = network(**{key: value for key, value in sizes.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    net.rgb_range = getattr(args, "rgb_range", 255)
    return net


def load_model(path, **override):
    """The network that a checkpoint file holds, with its weights: name, sizes and scale are read from the file alone.

    override settles what a file leaves open (`res_scale=`, `img_range=`; `scale=` where it holds several); `width_mult=`
    takes the channel slice of that width. Raises CheckpointError, which names the file and the first keys or shapes that do
    not fit. Weights are on the CPU.
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
        raise CheckpointError(f"{path}: holds a network {header['network']} that this version does not know")
    nearest = describe_nearest(state, {name: layouts for name, (_, layouts) in NETWORKS.items()})
    if nearest:
        raise CheckpointError(f"{path}: {nearest}")
    keys = ", ".join(list(state)[:4])
    raise CheckpointError(f"{path}: not a checkpoint of {', '.join(NETWORKS)} in a known layout; it begins with {keys}")


def load_as_told(path, args, without=()):
    """`load_model`, taking the flags that were given explicitly, but those in `without`, for claims about the file.

    A wrong one is an error.
    """
    sizes = (args.given & (size_flags() | {"width_mult"})) - set(without)
    net = require_rgb(load_model(path, **{key: getattr(args, key) for key in sizes}), path)
    name = save_header(net)["network"]
    if "model" in args.given and args.model != name:
        raise CheckpointError(f"{path}: holds a network {name}, not --model {args.model} as asked for")
    note_unused(name, sizes - net.config.keys() - {"width_mult"})
    net.rgb_range = args.rgb_range
    return net


def size_flags():
    """The names of all networks' constructor arguments, which are flags as well."""
    return {key for network, _ in NETWORKS.values() for key in inspect.signature(network).parameters}


def note_unused(name, flags):
    for flag in sorted(flags):
        log.info("--%s has no effect: %s has no such size", flag, name)


def describe(net):
    """Name, sizes and number of parameters of a network, in a line; of a channel slice its own."""
    sizes = ", ".join(f"{name} {value}" for name, value in net.config.items())
    shapes = getattr(net, "shapes", None) or {name: parameter.shape for name, parameter in net.named_parameters()}
    name = type(getattr(net, "full_network", net)).__name__
    return f"{name}, {sizes}, {sum(shape.numel() for shape in shapes.values()):,} parameters"


def require_rgb(net, path):
    """The network; raises CheckpointError for one that takes gray images, which are none of ours."""
    if net.config.get("in_chans", 3) != 3:
        raise CheckpointError(f"{path}: holds a network {type(net).__name__} for gray images, and images here are RGB")
    return net


def _build(path, name, network, config, state, layout, override):
    override = {key: value for key, value in override.items() if value is not None}
    if config.get("multi_scale"):  # the one in use: as asked for, or that of this project's own file
        scale = override.pop("scale", config.get("scale"))
        if scale not in config["multi_scale"]:
            held = ", ".join(f"x{one}" for one in config["multi_scale"])
            raise CheckpointError(f"{path}: holds {name} for {held}: "
                                  + (f"not for x{scale} as asked for" if scale else "say which with --scale"))
        config = {**config, "scale": scale}
    for key, value in override.items():
        if key not in LEFT_OPEN and as_list(config.get(key, value)) != as_list(value):
            raise CheckpointError(f"{path}: holds {name} with {key} {config[key]}, not {value} as asked for")
    config = {**config, **{key: value for key, value in override.items() if key in inspect.signature(network).parameters}}
    try:
        net = network(**config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {name} cannot be built as its header says ({error})") from None
    means = {key: value for key, value in net.state_dict().items() if key.startswith(MEAN_SHIFTS)}
    native = NETWORKS[name][1][0].name
    origin = f" in the layout of {layout}" if layout else ""
    origin += f", renamed as in {native}" if layout not in (None, native) else ""
    return load_strictly(net, {**means, **state}, f"{path}: looks like {name} {config}{origin}, but ").eval()


def as_list(value):
    return list(value) if isinstance(value, tuple) else value


def save_header(net):
    """What a checkpoint of this project says of its network beside the weights: `load_model` builds it from that."""
    name = next(name for name, (network, _) in NETWORKS.items() if type(net) is network)
    return {"network": name, "config": dict(net.config)}
