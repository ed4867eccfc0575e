"""What a term of the loss sees of one training step."""
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from system.errors import UserError
from torch import nn


@dataclass
class Output:
    """Of one network: sr N x 3 x sH x sW in [0, rgb_range], and its four maps N x C x H x W where a term needs them."""
    sr: torch.Tensor
    features: list = field(default_factory=list)

    def detach(self):
        return Output(self.sr.detach(), [x.detach() for x in self.features])

    def copy(self):
        """Tensors that autograd may keep, of ones made in inference mode."""
        return Output(self.sr.clone(), [x.clone() for x in self.features])

    def split(self, counts):
        """Of a batch that was put together -> an Output for each of its parts, of so many images."""
        maps = [x.split(counts) for x in self.features]
        return [Output(sr, [parts[index] for parts in maps]) for index, sr in enumerate(self.sr.split(counts))]


@dataclass
class Step:
    """One view of a batch; hr is None where there is no truth, teacher (which never has a graph) where no term needs one.

    `weight` is the view's: of what all terms make of it.

    The networks themselves are there for terms that show them something else: `run(net, images)` -> sr computes in the run's
    precision. `average` is the student's moving average where the run keeps one, else the student. `kept` lives as long as
    the step: what several terms compute from the same images is computed once and left there.
    """
    lr: torch.Tensor
    hr: torch.Tensor | None
    student: Output
    teacher: Output | None
    teacher_graph: torch.Tensor | None = None  # the teacher's sr with its graph, for the terms that train the teacher
    view: str = "plain"
    weight: float = 1
    iteration: int = 0
    student_net: nn.Module | None = None
    teacher_net: nn.Module | None = None
    average: nn.Module | None = None
    run: Callable | None = None
    kept: dict = field(default_factory=dict)


def join(steps):
    """The steps of the parts of one batch as one, of images alone: no maps, no graph."""
    def cat(images):
        return None if images[0] is None else torch.cat([x.detach() for x in images])

    return replace(steps[0], **{name: cat([getattr(step, name) for step in steps]) for name in ("lr", "hr")},
                   student=Output(cat([step.student.sr for step in steps])), kept={}, teacher_graph=None,
                   teacher=steps[0].teacher and Output(cat([step.teacher.sr for step in steps])))


@dataclass
class Setting:
    """What a term may look at when it is built; `kept` holds what several terms share, such as a frozen network."""
    args: object
    student: nn.Module
    teachers: list
    device: torch.device | str = "cpu"
    views: list = field(default_factory=list)  # beside the plain one: what data.views.plan says of each
    kept: dict = field(default_factory=dict)


class Term(nn.Module):
    """A term of the loss: `forward(step)` -> scalar. `needs` says what it looks at beyond the student's sr.

    Its parameters are trained with the student's, unless `trained` says otherwise; `update(step)`, after the optimiser's
    step, is for terms with a memory or an optimiser of their own. What must survive an interruption is in its state_dict.
    It is called for each view of the batch that it can work on (`Loss.looks_at`), but updated by the plain one alone.
    """
    # of "hr", "teacher" (its output), "features" (maps of both networks), "teacher_graph" (a teacher that is trained as
    # well), "teacher_net" (to be shown something else)
    needs = frozenset()
    smallest = 1  # side of the images that it can judge, in pixels

    def __init__(self, setting):
        super().__init__()

    def trained(self):
        """The parameters that the student's optimiser trains along."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def update(self, step):
        """Called once per iteration, after the student's update; step is the plain view that the loss was computed from."""


def images_together(args):
    """How many images of the batch a term sees at once, and which flags say so."""
    parts = f" in --split_batch {args.split_batch} parts" if args.split_batch > 1 else ""
    return args.batch_size // args.split_batch, f"--batch_size {args.batch_size}{parts}"


def require_equal_widths(name, setting):
    """Raises UserError where a term compares channel with channel and the networks' maps have different numbers of them."""
    for teacher in setting.teachers:
        if teacher.n_feats != setting.student.n_feats:
            raise UserError(f"{name} compares channel with channel, but the student's maps have {setting.student.n_feats} "
                            f"and the teacher's {teacher.n_feats}: choose one that does not, such as SA, AT or fitnet")
