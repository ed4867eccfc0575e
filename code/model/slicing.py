"""Channel slices of a network, as in CSD (Wang et al., IJCAI 2021): of every parameter the first rows and columns; and
students that start from the slice of a teacher, of fewer blocks as well.

What the slice of each parameter is shows in a narrow twin, the same network built with fewer channels: along each axis the
first as many entries as the twin has. So the networks know nothing of it. An upsampling convolution gives its first
r x n_feats x s^2 rows, a convolution over concatenated maps its first columns of the whole, an image channel stays.
"""
import re

import torch
from system.errors import UserError
from torch import nn
from torch.func import functional_call

from model import rdn

MEANING = "scale", "window_size", "group"  # constructor arguments on which it depends what an entry of a parameter means
UNLIKE = "the student cannot start from the teacher's weights"
WIDTHS = "n_feats", "G0", "RDNconfig", "n_inner"  # constructor arguments that count channels and scale with the width


class Slice(nn.Module):
    """The slice of `whole` as a network of its own that shares its storage: training it trains those parts of `whole`.

    Its parameters and its state_dict are those of the whole network.
    """

    def __init__(self, whole, twin):
        super().__init__()
        self.whole = whole
        object.__setattr__(self, "twin", twin.to("meta"))  # gives the computation; its own parameters are never used
        self.shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
        check(whole, twin)
        self.config, self.scale, self.n_feats = twin.config, twin.scale, twin.n_feats
        self.window, self.receptive_field = twin.window, twin.receptive_field

    @property
    def rgb_range(self):
        return self.whole.rgb_range

    def forward(self, lr, features=False):
        self.twin.rgb_range = self.whole.rgb_range
        parameters = {name: part(parameter, self.shapes[name]) for name, parameter in self.whole.named_parameters()}
        tensors = {**parameters, **dict(self.whole.named_buffers())}
        return functional_call(self.twin, tensors, (lr,), {"features": features})


def slim(net, width):
    """The first `width` (0..1] of the channels of a network, as a student that shares its storage (self-distillation)."""
    return Slice(net, narrow_twin(net, width))


def inherit(student, teacher):
    """Copies the teacher's weights into a student of the same kind with as many or fewer channels and blocks.

    Of channels it gets the first, of a row of blocks, wherever such rows are, evenly spaced ones in their order, the first
    and the last included. Raises UserError where there is nothing to copy.
    """
    kinds = [type(net).__name__ for net in (student, teacher)]
    if type(student) is not type(teacher):
        raise UserError(f"{UNLIKE}: the one is {kinds[0]}, the other {kinds[1]}")
    for name in MEANING:
        values = [net.config.get(name) for net in (student, teacher)]
        if values[0] != values[1]:
            raise UserError(f"{UNLIKE}: its {name} is {values[0]}, the teacher's {values[1]}")
    mine, theirs = (dict(net.named_parameters()) for net in (student, teacher))
    rows = []  # those of which the student has fewer blocks: (its number of them, the teacher's, which of these)
    sources = counterparts(tree(mine), tree(theirs), rows=rows)
    widths = student.n_feats, teacher.n_feats
    with torch.no_grad():
        for name, parameter in mine.items():
            source = columns_of(theirs[sources[name]], parameter.shape, rows, widths)
            wrong = source.dim() != parameter.dim() or source.shape[2:] != parameter.shape[2:] or any(
                small > large for small, large in zip(parameter.shape, source.shape))
            if wrong:
                raise UserError(f"{UNLIKE}: its {name} has {list(parameter.shape)}, the teacher's {list(source.shape)}")
            parameter.copy_(part(source, parameter.shape))
    return student


def tree(names):
    """Names of parameters -> nested dicts by the parts of the names, a number at the end of a part being one of its own."""
    root = {}
    for name in names:
        node = root
        *parts, last = [part for word in name.split(".") for part in split_number(word)]
        for key in parts:
            node = node.setdefault(key, {})
        node[last] = name
    return root


def split_number(word):
    """'IMDB3' -> 'IMDB', 3; '3' -> 3; 'weight' -> 'weight'."""
    start, number = re.fullmatch(r"(.*?)([0-9]*)", word).groups()
    return [part for part in (start, int(number) if number else None) if part not in ("", None)]


def counterparts(student, teacher, rows, path=""):
    """{name of a student's parameter: the teacher's that it starts from}, of two trees; notes in `rows` what is thinned."""
    if isinstance(student, str):
        return {student: teacher}
    same = student.keys() == teacher.keys()
    pairs = [(key, key) for key in student] if same else thin(student, teacher, rows, path)
    found = {}
    for mine, its in pairs:
        if isinstance(student[mine], str) != isinstance(teacher[its], str):
            raise UserError(f"{UNLIKE}: they differ in {path}{mine}")
        found.update(counterparts(student[mine], teacher[its], rows, f"{path}{mine}."))
    return found


def thin(student, teacher, rows, path):
    """Pairs of keys where the student has fewer blocks: runs of children that look alike, thinned one by one."""
    runs, others = (runs_of(node) for node in (student, teacher))
    if [look for look, _ in runs] != [look for look, _ in others]:
        odd = next(iter(map(str, sorted(student.keys() ^ teacher.keys(), key=str))))
        raise UserError(f"{UNLIKE}: they differ in {path}{odd}")
    pairs = []
    for (_, mine), (_, its) in zip(runs, others):
        if len(mine) > len(its):
            raise UserError(f"{UNLIKE}: it has more blocks {path}*, {len(mine)}, than "
                            f"the teacher, {len(its)}")
        chosen = evenly(len(mine), len(its))
        if len(mine) < len(its):
            rows.append((len(mine), len(its), chosen))
        pairs += zip(mine, (its[index] for index in chosen))
    return pairs


def runs_of(node):
    """[(how they look, keys)] of the children of a tree, those in a row that look alike together; words before numbers."""
    runs = []
    for key in sorted(node, key=lambda key: (isinstance(key, int), key)):
        look = key if isinstance(key, str) else look_of(node[key])
        if runs and runs[-1][0] == look:
            runs[-1][1].append(key)
        else:
            runs.append((look, [key]))
    return runs


def look_of(node):
    """What blocks have in common that differ only in how many blocks they hold in turn."""
    if isinstance(node, str):
        return "parameter"
    return tuple(look for look, _ in runs_of(node))


def evenly(count, total):
    """Numbers of `count` of `total` blocks in a row, from the first to the last; of one alone the first."""
    return [round(index * (total - 1) / max(count - 1, 1)) for index in range(count)]


def columns_of(source, shape, rows, widths):
    """The parameter without the columns fed by blocks that the student does not have, where it takes the maps of all blocks

    at once, as its number of columns shows; else as it is. widths: the channels of the student's maps and the teacher's.
    """
    for count, total, chosen in rows:
        if source.dim() > 1 and (shape[1], source.shape[1]) == (count * widths[0], total * widths[1]):
            return source.unflatten(1, (total, -1))[:, chosen, :widths[0]].flatten(1, 2)
    return source


def narrow_twin(net, width):
    """A new network of that kind with `width` of the channels; raises UserError where there is no such network."""
    if not 0 < width <= 1:
        raise UserError(f"--width_mult {width:g} is not above 0 and at most 1")
    config = {name: scaled(name, value, width) if name in WIDTHS and value else value for name, value in net.config.items()}
    try:
        twin = type(net)(**config)
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        raise UserError(f"--width_mult {width:g}: {type(net).__name__} cannot be sliced so ({error})") from None
    return twin.train(net.training)


def scaled(name, value, width):
    """The constructor's argument for `width` of the channels that `value` says."""
    if name == "RDNconfig":
        blocks, convs, growth = rdn.sizes(value)
        return f"{blocks},{convs},{scaled('growth', growth, width)}"
    channels = value * width
    if channels < 1 or channels != int(channels):
        raise UserError(f"--width_mult {width:g} of {name} {value} leaves {channels:g} channels; it must be a whole number")
    return int(channels)


def part(parameter, shape):
    """The first entries of a parameter along each axis: a view of the given shape."""
    for axis, size in enumerate(shape):
        if size < parameter.shape[axis]:
            parameter = parameter.narrow(axis, 0, size)
    return parameter


def check(whole, narrow):
    """Raises UserError unless each parameter of the narrow network is a slice of that of the whole one."""
    wide, narrow_shapes = dict(whole.named_parameters()), {name: p.shape for name, p in narrow.named_parameters()}
    if type(whole) is not type(narrow) or wide.keys() != narrow_shapes.keys():
        odd = next(iter(wide.keys() ^ narrow_shapes.keys()), type(narrow).__name__)
        raise UserError(f"{type(narrow).__name__} is no channel slice of that {type(whole).__name__}: they differ in {odd}")
    for name, shape in narrow_shapes.items():
        if any(small > large for small, large in zip(shape, wide[name].shape)):
            raise UserError(f"no channel slice: {name} has {list(shape)} of {list(wide[name].shape)}")
