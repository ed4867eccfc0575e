"""Channel slices of a network, as in CSD (Wang et al., IJCAI 2021): of every parameter the first rows and columns.

What the slice of each parameter is shows in a narrow twin, the same network built with fewer channels: along each axis the
first as many entries as the twin has. So the networks know nothing of it. An upsampling convolution gives its first
r x n_feats x s^2 rows, a convolution over concatenated maps its first columns of the whole, an image channel stays.
"""
import torch
from torch import nn
from torch.func import functional_call

from error import UserError
from model import rdn

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
    """Copies the slice of the teacher that has the student's shapes into the student; both are of one kind and depth."""
    check(teacher, student)
    weights = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(part(weights[name], parameter.shape))
    return student


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
