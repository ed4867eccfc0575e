"""Networks by name, and from checkpoints of any layout they were released in."""
import inspect
import os

from error import UserError
from model import carn, edsr, imdn, rcan, rdn, san, swinir
from model.loading import CheckpointError, read_checkpoint
from model.teachers import find_teacher

__all__ = ["NETWORKS", "CheckpointError", "load_as_told", "load_model", "make_model", "save_header"]

# name on the command line: (class, how to recognise its checkpoints)
NETWORKS = {
    "EDSR": (edsr.EDSR, edsr.recognise),
    "RCAN": (rcan.RCAN, rcan.recognise),
    "CARN": (carn.CARN, carn.recognise),
    "CARN_M": (carn.CARN_M, carn.recognise_m),
    "RDN": (rdn.RDN, rdn.recognise),
    "IMDN": (imdn.IMDN, imdn.recognise),
    "SAN": (san.SAN, san.recognise),
    "SwinIR": (swinir.SwinIR, swinir.recognise),
}


def make_model(name, args):
    """A new network of that name: sizes from the flags in `args` that its constructor knows, its own for the rest."""
    if name not in NETWORKS:
        raise UserError(f"no network is called {name}: there are {', '.join(NETWORKS)}")
    network = NETWORKS[name][0]
    sizes = {key: getattr(args, key, None) for key in inspect.signature(network).parameters}
    try:
        net = network(**{key: value for key, value in sizes.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    net.rgb_range = getattr(args, "rgb_range", 255)
    return net


def load_model(path, **override):
    """The network that a checkpoint file holds, with its weights: name, sizes and scale are read from the file alone.

    override settles what a file leaves open (`res_scale=`; `scale=` where it holds several). Raises CheckpointError, which
    names the file and the first keys or shapes that do not fit. Weights are on the CPU.
    """
    header, state = read_checkpoint(path)
    for name, (network, recognise) in NETWORKS.items():
        if header and header["network"] != name:
            continue
        found = (header["config"], state) if header else recognise(state)
        if found:
            return _build(path, name, network, *found, override)
    if header:
        raise CheckpointError(f"{path}: holds a network {header['network']} that this version does not know")
    keys = ", ".join(list(state)[:4])
    raise CheckpointError(f"{path}: not a checkpoint of {', '.join(NETWORKS)} in a known layout; it begins with {keys}")


def load_as_told(path, args, any_scale=False):
    """`load_model`, taking the flags that were given explicitly for claims about the file: a wrong one is an error."""
    sizes = {key for network, _ in NETWORKS.values() for key in inspect.signature(network).parameters}
    sizes -= {"scale"} if any_scale else set()
    net = load_model(path, **{key: getattr(args, key) for key in args.given & sizes})
    name = save_header(net)["network"]
    if "model" in args.given and args.model != name:
        raise CheckpointError(f"{path}: holds a network {name}, not --model {args.model} as asked for")
    net.rgb_range = args.rgb_range
    return net


def make_student(args):
    """The student that the flags ask for: new, or with the weights of --pre_train.

    From a file of another scale all but the upsampling is taken, as EDSR's authors did: its x4 started from x2.
    """
    if not args.pre_train:
        return make_model(args.model, args)
    start = load_as_told(args.pre_train, args, any_scale=True)
    if start.scale == args.scale:
        return start
    student = type(start)(**{**start.config, "scale": args.scale})
    student.rgb_range = args.rgb_range
    state, wanted = start.state_dict(), student.state_dict()
    student.load_state_dict({name: state[name] if name in state and state[name].shape == value.shape else value
                             for name, value in wanted.items()})
    return student


def make_teachers(args):
    """The teachers of --teacher: checkpoint files, or names of networks whose checkpoint is in teacher_checkpoint/."""
    teachers = []
    for name in args.teacher:
        is_file = os.path.exists(name) or os.sep in name or "." in name
        net = load_model(name if is_file else find_teacher(name, args.scale), scale=args.scale)
        net.rgb_range = args.rgb_range
        teachers.append(net)
    return teachers


def _build(path, name, network, config, state, override):
    override = {key: value for key, value in override.items() if value is not None}
    if config.get("multi_scale"):  # the one in use: as asked for, or that of this project's own file
        scale = override.pop("scale", config.get("scale"))
        if scale not in config["multi_scale"]:
            held = ", ".join(f"x{one}" for one in config["multi_scale"])
            raise CheckpointError(f"{path}: holds {name} for {held}: "
                                  + (f"not for x{scale} as asked for" if scale else "say which with --scale"))
        config = {**config, "scale": scale}
    for key, value in override.items():
        if key != "res_scale" and config.get(key, value) != value:
            raise CheckpointError(f"{path}: holds {name} with {key} {config[key]}, not {value} as asked for")
    config = {**config, **{key: value for key, value in override.items() if key in inspect.signature(network).parameters}}
    try:
        net = network(**config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {name} cannot be built as its header says ({error})") from None
    wanted = net.state_dict()
    wrong = [f"no {key}" for key in wanted if key not in state]
    wrong += [f"{key} too many" for key in state if key not in wanted]
    wrong += [f"{key} is {list(state[key].shape)}, not {list(wanted[key].shape)}" for key in wanted
              if key in state and state[key].shape != wanted[key].shape]
    if wrong:
        raise CheckpointError(f"{path}: looks like {name} {config}, but {'; '.join(wrong[:4])}"
                              + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    net.load_state_dict(state)
    return net.eval()


def save_header(net):
    """What a checkpoint of this project says of its network beside the weights: `load_model` builds it from that."""
    name = next(name for name, (network, _) in NETWORKS.items() if type(net) is network)
    return {"network": name, "config": dict(net.config)}
