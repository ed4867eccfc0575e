"""Layouts of checkpoints: the parameter names that a code base gives to a network, and their conversion to those here.

A network's file ends with its layouts, the one of its own parameter names first. A further layout is one more entry: the
parameters that identify it and the rules that rename them.
"""
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

State = dict[str, torch.Tensor]
Rules = Iterable[tuple[str, str | None]]


@dataclass(frozen=True)
class Layout:
    """The parameter names that one code base gives to one network.

    name: the code base. required: parameters that every checkpoint of this layout holds and that no other layout has
    together. read_config(state) -> the arguments of the network's constructor that names and shapes determine, of a renamed
    state; raises ValueError where the shapes fit none. rules(state) -> see `rename`.
    """

    name: str
    required: Sequence[str]
    read_config: Callable[[State], dict]
    rules: Callable[[State], Rules] = lambda state: ()

    def missing(self, state: State) -> list[str]:
        """Return the required parameters that a state lacks."""
        return [name for name in self.required if name not in state]


def recognise(state: State, layouts: Iterable[Layout]) -> tuple[dict, State, str] | None:
    """Return (config, renamed state, name of the layout) for the layout that a state has; None where it has none of them."""
    for layout in layouts:
        if not layout.missing(state):
            try:
                renamed = rename(state, layout.rules(state))
                return layout.read_config(renamed), renamed, layout.name
            except (ArithmeticError, LookupError, TypeError, ValueError):  # the names of this layout, but other shapes
                continue
    return None


def describe_nearest(state: State, networks: Mapping[str, Iterable[Layout]]) -> str | None:
    """Describe the layout that an unrecognised state has in two thirds or more of the required parameters.

    networks: the layouts of each network by its name. Returns None where the state resembles none of them.
    """
    share, name, layout = min(((len(layout.missing(state)) / len(layout.required), name, layout)
                               for name, layouts in networks.items() for layout in layouts), key=lambda entry: entry[0])
    if share > 1 / 3:
        return None
    missing = layout.missing(state)
    problem = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return (f"nearly {name} in the layout of {layout.name}, but "
            + (problem if missing else "the shapes of its parameters fit no network of this kind"))


def rename(state: State, rules: Rules) -> State:
    """Rename the parameters of a state by their leading components.

    A rule is a pair of the old and the new components, where each * stands for a number, or of the old ones and None, which
    drops the parameter. The first rule that fits a name applies.
    """
    rules = [(_compile(old), new) for old, new in rules]
    renamed = {}
    for name, tensor in state.items():
        match, new = next(((match, new) for old, new in rules if (match := old.match(name))), (None, name))
        if match and new is not None:
            new = new.replace("*", "{}").format(*match.groups()) + name[match.end():]
        if new is not None:
            renamed[new] = tensor
    return renamed


def count(state: State, pattern: str) -> int:
    """Return 1 + the largest number in place of the * of a pattern with which names of the state begin; 0 without any.

    Raises ValueError for a number above the number of parameters.
    """
    old = _compile(pattern)
    found = max((int(match[1]) for name in state if (match := old.match(name))), default=-1) + 1
    if found > len(state) + 1:
        raise ValueError(f"{pattern} goes up to {found - 1}, among {len(state)} parameters")
    return found


def upsampler_scale(state: State, prefix: str, n_feats: int) -> int:
    """Return the scale of an Upsampler whose convolutions are `prefix`.N.weight.

    Raises ValueError where the shapes are those of no Upsampler.
    """
    pattern = _compile(f"{prefix}.*.weight")
    ratios = [tensor.shape[0] / n_feats for name, tensor in state.items() if pattern.match(name)]
    if ratios == [9]:
        return 3
    if not ratios or set(ratios) != {4}:
        raise ValueError(f"{prefix} is no upsampler")
    return 2 ** len(ratios)


def _compile(pattern: str) -> re.Pattern:
    """Compile leading components of a name, in which * stands for a number."""
    return re.compile(re.escape(pattern).replace(r"\*", "([0-9]+)") + r"(?=\.|$)")
