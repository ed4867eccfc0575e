"""What a term of the loss sees of one training step."""
from dataclasses import dataclass, field

import torch
from torch import nn

from error import UserError


@dataclass
class Output:
    """Of one network: sr N x 3 x sH x sW in [0, rgb_range], and its four maps N x C x H x W where a term needs them."""
    sr: torch.Tensor
    features: list = field(default_factory=list)


@dataclass
class Step:
    """One view of a batch; hr is None where there is no truth, teacher where no term needs one."""
    lr: torch.Tensor
    hr: torch.Tensor | None
    student: Output
    teacher: Output | None
    view: str = "plain"
    iteration: int = 0


@dataclass
class Setting:
    """What a term may look at when it is built."""
    args: object
    student: nn.Module
    teachers: list


class Term(nn.Module):
    """A term of the loss: `forward(step)` -> scalar. `needs` says what it looks at beyond the student's sr.

    Its parameters are trained with the student's; `update(step)`, after the optimiser's step, is for terms with a memory.
    """
    needs = frozenset()

    def __init__(self, setting):
        super().__init__()

    def update(self, step):
        pass


def require_equal_widths(name, setting):
    """Raises UserError where a term compares channel with channel and the networks' maps have different numbers of them."""
    for teacher in setting.teachers:
        if teacher.n_feats != setting.student.n_feats:
            raise UserError(f"{name} compares channel with channel, but the student's maps have {setting.student.n_feats} "
                            f"and the teacher's {teacher.n_feats}: choose one that does not, such as SA, AT or fitnet")
