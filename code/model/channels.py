"""Choosing the channels that a student inherits (--init_from_teacher norm): those with the largest L1 norm of their filters.

Channels that are added to each other, such as those of all residual blocks, are kept or left out together: the filters of
the convolutions before the sum, and the columns of those after it. SRP (Zhang et al., ICLR 2022) also takes the same
indices in all layers on a residual path, and ASSL (Zhang et al., NeurIPS 2021) aligns them by a penalty. The norm of a
filter is the mean of its absolute weights, as in ASSL's code; that of a channel is the sum over its filters. There is no
regularisation before the cut, by which both papers move what the other channels compute into those that remain.

The groups are found by running the network with a label for each channel of each tensor.
"""
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model.common import Network
from model.nafnet import LayerNorm2d
from model.san import NonLocal, SecondOrderAttention
from system.errors import UserError

# functions that move channels to another dimension, after which they are not followed
REARRANGING = {"view", "reshape", "flatten", "permute", "transpose", "movedim", "unflatten", "__get__", "unfold", "roll",
               "linear", "pixel_unshuffle", "channel_shuffle"}

Axes = dict[tuple[str, int], list[int]]  # (parameter name, axis) -> the group of each entry along the axis


class Tracer(TorchFunctionMode):
    """Follow the channels of N x C x H x W tensors through a network.

    `axes` holds, for each axis of a parameter, the label of the channel that each entry belongs to; labels of channels that
    must be kept or left out together are joined: `find` returns the same number for them.
    """

    def __init__(self, net: Network):
        super().__init__()
        self.net, self.names = net, {id(parameter): name for name, parameter in net.named_parameters()}
        self.parents, self.labels, self.axes = [], {}, {}
        self.inside = 0  # depth of modules that RULES treat as a whole

    def find(self, label: int) -> int:
        """Return the representative of the labels that are joined with this one."""
        while self.parents[label] != label:
            label = self.parents[label]
        return label

    def join(self, first: list[int], second: list[int]) -> list[int]:
        """Join two lists of labels one by one."""
        for one, other in zip(first, second, strict=True):
            self.parents[self.find(other)] = self.find(one)
        return first

    def new(self, number: int) -> list[int]:
        """Return new labels."""
        self.parents += range(len(self.parents), len(self.parents) + number)
        return list(range(len(self.parents) - number, len(self.parents)))

    def set(self, tensor: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """Set the labels of a tensor's channels."""
        self.labels[id(tensor)] = tensor, labels  # holds the tensor, since an id may be used again after its deletion
        return tensor

    def get(self, tensor: torch.Tensor) -> list[int] | None:
        """Return the labels of a tensor's channels, or None."""
        return self.labels.get(id(tensor), (None, None))[1]

    def bind(self, parameter: nn.Parameter, axis: int, labels: list[int]) -> None:
        """Record that the entries of a parameter along an axis belong to these channels."""
        name = self.names.get(id(parameter))
        if name is None:
            raise self.refusal("a convolution whose weights are computed")
        self.axes[name, axis] = self.join(self.axes.get((name, axis), labels), labels)

    def refusal(self, what: str) -> UserError:
        """Return the error for a network whose channels cannot be followed."""
        return UserError(f"--init_from_teacher norm: the channels of {type(self.net).__name__} cannot be followed through "
                         f"{what}; give --init_from_teacher first")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name, outputs = function.__name__, result if isinstance(result, (tuple, list)) else [result]
        if self.inside or not all(isinstance(output, torch.Tensor) for output in outputs):
            return result
        tensors = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, (tuple, list)) else [arg])
                   if isinstance(x, torch.Tensor)]
        inputs = [self.get(x) for x in tensors if self.get(x) is not None]
        if name == "conv2d":
            self.convolve(result, *args, **kwargs)
        elif not inputs:
            return result
        elif name == "cat" and self.dim_of(args, kwargs) == 1 and len(inputs) == len(tensors):
            self.set(result, [label for labels in inputs for label in labels])
        elif name in ("split", "chunk") and self.dim_of(args, kwargs) == 1:
            ends = torch.tensor([0, *(x.shape[1] for x in outputs)]).cumsum(0).tolist()
            for x, start, end in zip(outputs, ends, ends[1:]):
                self.set(x, inputs[0][start:end])
        elif name == "pixel_shuffle":
            every = len(inputs[0]) // result.shape[1]
            self.set(result, [self.join([label] * every, inputs[0][start:start + every])[0]
                              for start, label in zip(range(0, len(inputs[0]), every), inputs[0][::every])])
        else:
            self.pass_on(name, tensors, inputs, outputs)
        return result

    @staticmethod
    def dim_of(args, kwargs):
        """Return the dimension argument of torch.cat, split and chunk."""
        return kwargs.get("dim", args[-1] if len(args) > (1 if isinstance(args[0], (tuple, list)) else 2) else 0)

    def convolve(self, result, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """Bind the axes of a convolution."""
        depthwise = groups > 1 and groups == x.shape[1] == weight.shape[0]
        if groups > 1 and not depthwise:
            raise self.refusal("convolutions in groups")
        if self.get(x) is None:
            raise self.refusal("what is before a convolution")
        if not depthwise:
            self.bind(weight, 1, self.get(x))
        filters = self.get(x) if depthwise else self.new(weight.shape[0])
        for parameter in (weight, bias) if bias is not None else (weight,):
            self.bind(parameter, 0, filters)
        self.set(result, filters)

    def pass_on(self, name, tensors, inputs, outputs):
        """Join the channels of the inputs of a function that computes each channel from the same channel of its inputs."""
        same = len({len(labels) for labels in inputs}) == 1
        if name in REARRANGING or not same or any(x.dim() != 4 or x.shape[1] != len(inputs[0]) for x in outputs):
            raise self.refusal(name)
        for labels in inputs[1:]:
            self.join(inputs[0], labels)
        for x in tensors:
            axis = 0 if name == "prelu" else 1
            if id(x) in self.names and x.dim() > axis and x.shape[axis] == len(inputs[0]):
                self.bind(x, axis, inputs[0])
        for x in outputs:
            self.set(x, inputs[0])

    def enter(self, module, inputs):
        """Stop following channels, as a hook before the forward pass of a module of RULES."""
        self.inside += 1

    def leave(self, module, inputs, output):
        """Apply the rule of a module, as a hook after its forward pass."""
        self.inside -= 1
        if not self.inside:
            self.set(output, self.join(self.get(inputs[0]), RULES[type(module)](self, module, inputs[0])))


def second_order_attention(tracer: Tracer, module: SecondOrderAttention, x: torch.Tensor) -> list[int]:
    """Follow the channels through the covariance, which pools each of them, to their factors."""
    return tracer.get(module.conv_du(tracer.set(x.new_zeros(1, x.shape[1], 1, 1), tracer.get(x))))


def non_local(tracer: Tracer, module: NonLocal, x: torch.Tensor) -> list[int]:
    """Join the channels of queries and keys, and follow those of the values."""
    query, key, value = module.theta(x), module.phi(x), module.g(x)
    tracer.join(tracer.get(query), tracer.get(key))
    return tracer.get(module.W(value))


def layer_norm(tracer: Tracer, module: nn.LayerNorm, x: torch.Tensor) -> list[int]:
    """Bind the factors and offsets of a normalisation over channels."""
    for parameter in (module.weight, module.bias):
        tracer.bind(parameter, 0, tracer.get(x))
    return tracer.get(x)


RULES = {SecondOrderAttention: second_order_attention, NonLocal: non_local, LayerNorm2d: layer_norm}


@contextmanager
def training_mode(net: Network) -> Iterator[None]:
    """Set the network to training mode in the body: a re-parameterised network then uses its own parameters."""
    before = net.training
    net.train()
    try:
        yield
    finally:
        net.train(before)


@torch.no_grad()
def trace(net: Network) -> Axes:
    """Return the group of each channel along the axes of the parameters that the network uses.

    Channels of the same group are kept or left out together. Raises UserError where they cannot be followed.
    """
    tracer = Tracer(net)
    device = next(net.parameters()).device
    image = tracer.set(torch.zeros(1, 3, 2 * net.window + 6, 2 * net.window + 6, device=device), tracer.new(3))
    hooks = [hook for module in net.modules() if type(module) in RULES
             for hook in (module.register_forward_pre_hook(tracer.enter), module.register_forward_hook(tracer.leave))]
    try:
        with training_mode(net), tracer:
            net(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {axis: [tracer.find(label) for label in labels] for axis, labels in tracer.axes.items()}


def sets_of(axes: Axes, names: dict[str, str]) -> dict[frozenset, list[int]]:
    """Arrange groups by the places of their channels: {set of (name, axis): groups}.

    names: {own name: name in the keys} of parameters; others are ignored.
    """
    places = defaultdict(set)
    for (name, axis), groups in axes.items():
        for group in groups if name in names else ():
            places[group].add((names[name], axis))
    sets = defaultdict(list)
    for group, found in places.items():
        sets[frozenset(found)].append(group)
    return sets


def positions_of(groups: list[int]) -> dict[int, list[int]]:
    """Return the positions of each group in a list."""
    positions = defaultdict(list)
    for position, group in enumerate(groups):
        positions[group].append(position)
    return positions


def choose_channels(student: Network, teacher: Network, sources: dict[str, str],
                    reduced: list) -> dict[str, dict[int, torch.Tensor]]:
    """Choose the entries of the teacher's parameters that the student inherits.

    sources: {name of a parameter of the student: that of the teacher's}. reduced: (number of blocks of the student, of the
    teacher, indices of those taken) of each shortened sequence of blocks, whose outputs a convolution may take together.
    Returns {name of a parameter of the student: {axis: indices}}. Raises UserError where the channels cannot be followed,
    where the teacher has fewer of them, or where layers without a residual path around them are left out.
    """
    student_axes, teacher_axes = trace(student), trace(teacher)
    parameters, norms = dict(teacher.named_parameters()), Counter()
    for (name, axis), groups in teacher_axes.items():
        if axis == 0 and parameters[name].dim() == 4:
            for group, norm in zip(groups, parameters[name].detach().abs().mean((1, 2, 3)).tolist()):
                norms[group] += norm
    teacher_sets = sets_of(teacher_axes, {source: source for source in sources.values()})
    chosen = {}  # group of the student -> group of the teacher
    for key, groups in sets_of(student_axes, sources).items():
        candidates = teacher_sets.get(key)
        if candidates is None:
            layers = ", ".join(sorted({name for name, _ in key if name.endswith("weight")}))
            raise UserError(f"--init_from_teacher norm: {layers} of the teacher do not share channels as in the student: "
                            "layers between them are left out; give as many blocks as the teacher has, or "
                            "--init_from_teacher first")
        if len(candidates) < len(groups):
            raise UserError(f"--init_from_teacher norm: the student has {len(groups)} channels at {min(key)[0]}, the "
                            f"teacher {len(candidates)} in the same place")
        best = set(sorted(candidates, key=lambda group: -norms[group])[:len(groups)])
        chosen.update(zip(groups, (group for group in candidates if group in best)))
    indices = defaultdict(dict)
    for (name, axis), groups in student_axes.items():
        own, others = positions_of(groups), positions_of(teacher_axes[sources[name], axis])
        index = torch.empty(len(groups), dtype=torch.long)
        for group, places in own.items():
            found = others[chosen[group]]
            blocks = next((blocks for *counts, blocks in reduced if counts == [len(places), len(found)]), range(len(places)))
            if len(blocks) > len(found):
                raise UserError(f"--init_from_teacher norm: the student has more channels at {name} than the teacher")
            index[places] = torch.tensor([found[block] for block in blocks])
        indices[name][axis] = index
    return indices
