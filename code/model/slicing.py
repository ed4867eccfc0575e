"""Channel slices of a network, as in CSD (Wang et al., IJCAI 2021), and students that inherit a teacher's weights.

The slice of a network has the first rows and columns of every parameter. Their number is that of the same network built with
fewer channels, so that networks need no code for slicing. With the width r, an upsampling convolution keeps its first
r x n_feats x s^2 rows, a convolution over concatenated feature maps its first columns, and image channels remain.
"""
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

from model import rdn
from model.channels import choose_channels
from model.common import Network
from system.errors import UserError

# must be equal: the meaning of the parameters
FIXED_ARGUMENTS = "scale", "window_size", "group", "carn_variant", "act_type", "reparameterise", "heads"
WIDTH_ARGUMENTS = "n_feats", "G0", "RDNconfig", "n_inner", "num_grow_ch"  # channels, which are multiplied by the width
CANNOT_INHERIT = "the student cannot start from the teacher's weights"

Tree = dict  # component of parameter names -> Tree or the name of a parameter


class Slice(nn.Module):
    """A channel slice of `full_network` that shares its storage: training the slice trains these channels.

    Its parameters and its state_dict are those of the full network. narrow: a network of the slice's size, which determines
    its shapes and its computation; its own parameters are not used.
    """

    def __init__(self, full_network: Network, narrow: Network):
        super().__init__()
        self.full_network = full_network
        object.__setattr__(self, "narrow", narrow.to("meta"))  # not registered as a module: its parameters are not trained
        self.shapes = {name: parameter.shape for name, parameter in narrow.named_parameters()}
        check_slice(full_network, narrow)
        self.config, self.scale, self.n_feats = narrow.config, narrow.scale, narrow.n_feats
        self.window, self.receptive_field = narrow.window, narrow.receptive_field
        self.feature_channels = narrow.feature_channels

    @property
    def rgb_range(self) -> float:
        """The maximum of images, as set for the full network."""
        return self.full_network.rgb_range

    def forward(self, lr: torch.Tensor,
                features: bool = False) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Super-resolve a batch of LR images, as `Network.forward` does."""
        self.narrow.rgb_range = self.full_network.rgb_range
        parameters = {name: leading_slice(parameter, self.shapes[name])
                      for name, parameter in self.full_network.named_parameters()}
        tensors = {**parameters, **dict(self.full_network.named_buffers())}
        return functional_call(self.narrow, tensors, (lr,), {"features": features})


def slim(net: Network, width: float) -> Slice:
    """Build the student of self-distillation: the first `width` (0..1] of a network's channels, with shared storage.

    Raises UserError where the network cannot be sliced to this width.
    """
    return Slice(net, narrow_network(net, width))


def inherit(student: Network, teacher: Network, channels: str = "first") -> Network:
    """Copy the teacher's weights into a student of the same kind with as many or fewer channels and blocks.

    The student gets evenly spaced blocks of each sequence of blocks, including the first and the last. channels: `first`
    copies the first channels, `norm` those with the largest norm of their filters (model/channels.py). Returns the student.
    Raises UserError where the weights do not fit.
    """
    kinds = [type(net).__name__ for net in (student, teacher)]
    if type(student) is not type(teacher):
        raise UserError(f"{CANNOT_INHERIT}: the student is {kinds[0]}, the teacher {kinds[1]}")
    for name in FIXED_ARGUMENTS:
        values = [net.config.get(name) for net in (student, teacher)]
        if values[0] != values[1]:
            raise UserError(f"{CANNOT_INHERIT}: the student's {name} is {values[0]}, the teacher's {values[1]}")
    student_parameters, teacher_parameters = (dict(net.named_parameters()) for net in (student, teacher))
    reduced = []  # (number of the student's blocks, of the teacher's, indices of those taken) of each shortened sequence
    sources = match_parameters(parameter_tree(student), parameter_tree(teacher), reduced)
    n_feats = student.n_feats, teacher.n_feats
    indices = choose_channels(student, teacher, sources, reduced) if channels == "norm" else {}
    with torch.no_grad():
        for name, parameter in student_parameters.items():
            source = teacher_parameters[sources[name]]
            if name in indices:
                for axis, index in indices[name].items():
                    source = source.index_select(axis, index.to(source.device))
            else:
                source = select_columns(source, parameter.shape, reduced, n_feats)
            differs = source.dim() != parameter.dim() or source.shape[2:] != parameter.shape[2:] or any(
                small > large for small, large in zip(parameter.shape, source.shape))
            if differs:
                raise UserError(f"{CANNOT_INHERIT}: the student's {name} has shape {list(parameter.shape)}, "
                                f"the teacher's {list(source.shape)}")
            parameter.copy_(leading_channels(source, parameter.shape, student.parts(name)))
    return student


def parameter_tree(net: Network) -> Tree:
    """Arrange the names of a network's parameters as nested dicts by the components of their block names.

    A number at the end of a component is its own component.
    """
    root = {}
    for name, _ in net.named_parameters():
        node = root
        *components, last = [part for component in net.block_name(name).split(".") for part in split_number(component)]
        for key in components:
            node = node.setdefault(key, {})
        node[last] = name
    return root


def split_number(component: str) -> list[str | int]:
    """Split the number off a component: 'IMDB3' -> ['IMDB', 3]; '3' -> [3]; 'weight' -> ['weight']."""
    start, number = re.fullmatch(r"(.*?)([0-9]*)", component).groups()
    return [part for part in (start, int(number) if number else None) if part not in ("", None)]


def match_parameters(student: Tree | str, teacher: Tree | str, reduced: list, path: str = "") -> dict[str, str]:
    """Match parameters: {name of a parameter of the student: name of the teacher's that is copied into it}.

    Appends (student's number of blocks, teacher's number, indices taken) to `reduced` for each shortened sequence of blocks.
    path: the components that lead to the two trees, for error messages.
    """
    if isinstance(student, str):
        return {student: teacher}
    same = student.keys() == teacher.keys()
    pairs = [(key, key) for key in student] if same else match_blocks(student, teacher, reduced, path)
    found = {}
    for key, source in pairs:
        if isinstance(student[key], str) != isinstance(teacher[source], str):
            raise UserError(f"{CANNOT_INHERIT}: they differ in {path}{key}")
        found.update(match_parameters(student[key], teacher[source], reduced, f"{path}{key}."))
    return found


def match_blocks(student: Tree, teacher: Tree, reduced: list, path: str) -> list[tuple]:
    """Match the children of two trees, of which the student has fewer: (key of the student, key of the teacher) pairs.

    Within each sequence of children of the same structure, evenly spaced ones of the teacher are taken.
    """
    student_groups, teacher_groups = (group_children(node) for node in (student, teacher))
    if [structure for structure, _ in student_groups] != [structure for structure, _ in teacher_groups]:
        different = next(iter(map(str, sorted(student.keys() ^ teacher.keys(), key=str))))
        raise UserError(f"{CANNOT_INHERIT}: they differ in {path}{different}")
    pairs = []
    for (_, keys), (_, sources) in zip(student_groups, teacher_groups):
        if len(keys) > len(sources):
            raise UserError(f"{CANNOT_INHERIT}: the student has more blocks {path}*, {len(keys)}, than "
                            f"the teacher, {len(sources)}")
        chosen = evenly_spaced(len(keys), len(sources))
        if len(keys) < len(sources):
            reduced.append((len(keys), len(sources), chosen))
        pairs += zip(keys, (sources[index] for index in chosen))
    return pairs


def group_children(node: Tree) -> list[tuple]:
    """Group the consecutive children that have the same structure: [(structure, keys)], words before numbers."""
    groups = []
    for key in sorted(node, key=lambda key: (isinstance(key, int), key)):
        structure = key if isinstance(key, str) else structure_of(node[key])
        if groups and groups[-1][0] == structure:
            groups[-1][1].append(key)
        else:
            groups.append((structure, [key]))
    return groups


def structure_of(node: Tree | str) -> str | tuple:
    """Return the structure of a block, which is equal for blocks that differ only in how many blocks they contain."""
    if isinstance(node, str):
        return "parameter"
    return tuple(structure for structure, _ in group_children(node))


def evenly_spaced(count: int, total: int) -> list[int]:
    """Return `count` evenly spaced indices of `total` blocks, from the first to the last; the first if count is 1."""
    return [round(index * (total - 1) / max(count - 1, 1)) for index in range(count)]


def select_columns(source: torch.Tensor, shape: Sequence[int], reduced: list, n_feats: tuple[int, int]) -> torch.Tensor:
    """Select the columns of the blocks that the student has, where a convolution takes the feature maps of all blocks.

    source: the teacher's parameter; shape: that of the student's. n_feats: channels of the student's and of the teacher's
    feature maps. Other parameters, recognised by their number of columns, are returned as they are.
    """
    for count, total, chosen in reduced:
        if source.dim() > 1 and (shape[1], source.shape[1]) == (count * n_feats[0], total * n_feats[1]):
            return source.unflatten(1, (total, -1))[:, chosen, :n_feats[0]].flatten(1, 2)
    return source


def narrow_network(net: Network, width: float) -> Network:
    """Build a new network of the same kind with `width` (0..1] of the channels.

    Raises UserError where there is no such network.
    """
    if not 0 < width <= 1:
        raise UserError(f"--width_mult {width:g} is not above 0 and at most 1")
    if not net.sliceable:
        raise UserError(f"--width_mult: {type(net).__name__} cannot be sliced, since its blocks divide their channels; "
                        "train a narrower one with --n_feats")
    config = {name: scale_argument(name, value, width) if name in WIDTH_ARGUMENTS and value else value
              for name, value in net.config.items()}
    try:
        narrow = type(net)(**config)
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        raise UserError(f"--width_mult {width:g}: {type(net).__name__} cannot be sliced to this width ({error})") from None
    return narrow.train(net.training)


def scale_argument(name: str, value: int | str, width: float) -> int | str:
    """Multiply a number of channels by the width; of an RDNconfig its growth rate.

    Raises UserError where the product is no integer.
    """
    if name == "RDNconfig":
        blocks, convs, growth = rdn.parse_config(value)
        return f"{blocks},{convs},{scale_argument('growth', growth, width)}"
    channels = value * width
    if channels < 1 or channels != int(channels):
        raise UserError(f"--width_mult {width:g} of {name} {value} leaves {channels:g} channels; it must be a whole number")
    return int(channels)


def leading_slice(parameter: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a view of the first entries of a parameter along each axis, of the given shape."""
    for axis, size in enumerate(shape):
        if size < parameter.shape[axis]:
            parameter = parameter.narrow(axis, 0, size)
    return parameter


def leading_channels(parameter: torch.Tensor, shape: Sequence[int], parts: dict[int, int]) -> torch.Tensor:
    """Return the first entries of a parameter along each axis, or of each of the equal `parts` {axis: number} of an axis."""
    for axis, number in parts.items():
        divided = parameter.unflatten(axis, (number, -1)).narrow(axis + 1, 0, shape[axis] // number)
        parameter = divided.flatten(axis, axis + 1)
    return leading_slice(parameter, shape)


def check_slice(full_network: Network, narrow: Network) -> None:
    """Raise UserError unless each parameter of the narrow network has the shape of a slice of the full network's."""
    full_shapes, narrow_shapes = ({name: parameter.shape for name, parameter in net.named_parameters()}
                                  for net in (full_network, narrow))
    if type(full_network) is not type(narrow) or full_shapes.keys() != narrow_shapes.keys():
        different = next(iter(full_shapes.keys() ^ narrow_shapes.keys()), type(narrow).__name__)
        raise UserError(f"{type(narrow).__name__} is no channel slice of that {type(full_network).__name__}: they differ in "
                        f"{different}")
    for name, shape in narrow_shapes.items():
        if any(small > large for small, large in zip(shape, full_shapes[name])):
            raise UserError(f"no channel slice: {name} has shape {list(shape)}, larger than {list(full_shapes[name])}")
