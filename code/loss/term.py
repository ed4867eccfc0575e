"""The interface of loss terms: the inputs of a term, and the base class with the properties that it declares."""
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass
class Output:
    """The output of a network: sr N x 3 x sH x sW in [0, rgb_range], and its feature maps N x C x H x W where needed."""

    sr: torch.Tensor
    features: list[torch.Tensor] = field(default_factory=list)

    def detach(self) -> "Output":
        """Return the same tensors without their graph."""
        return Output(self.sr.detach(), [x.detach() for x in self.features])

    def clone(self) -> "Output":
        """Return copies; of tensors from inference mode autograd cannot save others for the backward pass."""
        return Output(self.sr.clone(), [x.clone() for x in self.features])

    def alias(self) -> "Output":
        """Return the same tensors as new nodes of the graph, whose gradients exclude paths through the network."""
        return Output(self.sr[...], [x[...] for x in self.features])

    def split(self, sizes: list[int]) -> list["Output"]:
        """Split the output of a concatenated batch into one Output for each of the batches of these sizes."""
        features = [x.split(sizes) for x in self.features]
        return [Output(sr, [parts[index] for parts in features]) for index, sr in enumerate(self.sr.split(sizes))]


@dataclass
class LossInputs:
    """The inputs of the loss terms: one view of a batch, and the outputs of the networks on it.

    `lr` and `hr` are N x 3 x H x W and N x 3 x sH x sW in [0, rgb_range]; `hr` is None on a view without ground truth.
    `teacher` is detached, and None where no term needs it. `weight` is that of the view, which multiplies every term.
    `forward(net, images)` -> sr runs a network that is not trained, for terms that need its output for other images.
    `ema_student` is the exponential moving average of the student if there is one, else the student. `cache` lives as long
    as these inputs and holds what several terms need, such as VGG features of the student's output.
    """

    lr: torch.Tensor
    hr: torch.Tensor | None
    student: Output
    teacher: Output | None = None
    teacher_sr_with_grad: torch.Tensor | None = None  # for terms that train the teacher
    view: str = "original"
    weight: float = 1
    iteration: int = 0
    teacher_net: nn.Module | None = None
    ema_student: nn.Module | None = None
    forward: Callable | None = None
    cache: dict = field(default_factory=dict)

    def alias(self) -> "LossInputs":
        """Return the inputs with aliases of the outputs that are trained; see `Output.alias`."""
        teacher = self.teacher_sr_with_grad
        return replace(self, student=self.student.alias(), teacher_sr_with_grad=None if teacher is None else teacher[...])

    def trained_outputs(self) -> list[torch.Tensor]:
        """Return the outputs that are trained: the student's sr and feature maps, and sr of a teacher that is trained."""
        teacher = self.teacher_sr_with_grad
        return [self.student.sr, *self.student.features, *([] if teacher is None else [teacher])]

    def detach(self) -> "LossInputs":
        """Return the inputs for `Term.update`: images without graph or feature maps."""
        return replace(self, student=Output(self.student.sr.detach()), teacher_sr_with_grad=None, cache={},
                       teacher=self.teacher and Output(self.teacher.sr.detach()))


def concatenate(parts: list[LossInputs]) -> LossInputs:
    """Return the detached inputs of a batch, given those of its parts (--split_batch)."""
    if len(parts) == 1:
        return parts[0]

    def cat(images):
        return None if images[0] is None else torch.cat(images)

    return replace(parts[0], lr=cat([part.lr for part in parts]), hr=cat([part.hr for part in parts]),
                   student=Output(cat([part.student.sr for part in parts])),
                   teacher=parts[0].teacher and Output(cat([part.teacher.sr for part in parts])))


class Term(nn.Module):
    """A term of the loss: `forward(inputs)` returns a scalar. It is computed on each view of a batch that meets its `needs`.

    The student's optimiser trains the parameters that `trainable_parameters` yields, by default all trainable ones. State
    that a resumed run needs must be in the state_dict.
    """

    # Inputs beyond the student's sr: "hr", "teacher" (its output), "features" (feature maps of both networks),
    # "teacher_grad" (a teacher that is trained too), "teacher_net" (the teacher itself, for other inputs).
    needs: frozenset[str] = frozenset()
    min_size = 1  # smallest side of the images, in pixels

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the student's optimiser trains."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def update(self, inputs: LossInputs) -> None:
        """Update the state of the term after each optimiser step, given the detached inputs of the original batch."""


@dataclass
class Context:
    """The arguments of `build_term`: flags, networks, and `shared`, the feature networks that several terms use."""

    args: Namespace
    student: nn.Module
    teachers: list[nn.Module]
    device: torch.device | str = "cpu"
    views: Iterable = ()  # data.views.PlannedView of each view beside the original batch
    shared: dict = field(default_factory=dict)

    def images_per_step(self) -> tuple[int, str]:
        """Return the number of images in the inputs of a term, and the flags that determine it."""
        args = self.args
        parts = f" in --split_batch {args.split_batch} parts" if args.split_batch > 1 else ""
        return args.batch_size // args.split_batch, f"--batch_size {args.batch_size}{parts}"
