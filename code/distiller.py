"""One step of distillation as a module: views of a batch -> student and teacher -> loss."""
import logging
from argparse import Namespace
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from data import eco
from data.degradation import Degradation
from data.teacher_cache import decode
from data.views import View, forward_by_size, make_views
from loss import Loss, LossInputs, Output
from loss.consistency import with_label_consistency
from system.device import autocast

log = logging.getLogger("sr")


class MeanTeacher(nn.Module):
    """A teacher whose output is the mean of the outputs of several networks; it has no feature maps."""

    def __init__(self, teachers: Sequence[nn.Module]):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, lr: torch.Tensor, features: bool = False) -> torch.Tensor:
        """Super-resolve a batch of LR images; features: False, as the argument of `Network.forward`."""
        return sum(net(lr).float() for net in self.teachers) / len(self.teachers)


class Distiller(nn.Module):
    """The computation of a training step, a module that DistributedDataParallel can wrap.

    student, teachers: networks of model/; if there are several teachers, one is drawn at random for each batch. loss: the
    weighted terms. upcycle: pairs of weight and name of the views beside the original batch (data/views.py). upcycle_every:
    they are made in the first and then in every such iteration, with their weights multiplied by this number. n_zoom_in:
    tiles per image. zoom_in_tiles: `image` or `batch`, for which the tiles are drawn. label_consistency: probability of each
    operation on the student's inputs (loss/consistency.py) of the views label_consistency_views, `all` of them by default.
    degradation: makes LR of each batch anew (data/degradation.py); None leaves it as it is.
    eco_iterations: the number of iterations of a run with ECO (data/eco.py), 0 without it.
    rgb_range: maximum of the images that the networks take. precision: single, half or bf16, that of the student and of
    a teacher that is trained too. teacher_precision: that of networks that are not trained, teachers and the history model
    of DCR; by default `precision`.
    """

    def __init__(self, student: nn.Module, teachers: Sequence[nn.Module], loss: Loss, *, upcycle: Sequence = (),
                 upcycle_every: int = 1, n_zoom_in: int = 1, zoom_in_tiles: str = "image", label_consistency: float = 0,
                 label_consistency_views: Collection[str] = ("all",), degradation: Degradation | None = None,
                 eco_iterations: int = 0, rgb_range: float = 255, precision: str = "single",
                 teacher_precision: str | None = None):
        super().__init__()
        self.student, self.teachers, self.loss = student, nn.ModuleList(teachers), loss
        self.make_views = partial(make_views, scale=student.scale, n_zoom_in=n_zoom_in, zoom_in_tiles=zoom_in_tiles)
        self.upcycle = [(weight * upcycle_every, name) for weight, name in upcycle]
        self.upcycle_every, self.eco_iterations, self.degradation = upcycle_every, eco_iterations, degradation
        self.label_consistency, self.label_consistency_views = label_consistency, label_consistency_views
        self.rgb_range, self.precision, self.teacher_precision = rgb_range, precision, teacher_precision or precision
        self.compiled = {}  # network: its compiled form, for training only: test images have many sizes
        trained = set(student.parameters())  # include those of a teacher of which the student is a slice
        for parameter in set(self.teachers.parameters()) - trained:
            parameter.requires_grad_(False)
        self.teachers.eval()

    @property
    def device(self) -> torch.device:
        """The device of the student."""
        return next(self.student.parameters()).device

    def train(self, mode: bool = True) -> "Distiller":
        """Set the mode of the student; teachers and the networks of the loss remain in evaluation mode."""
        self.training = mode
        self.student.train(mode)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters for the optimiser: those of the student, and of loss terms that have some."""
        return [parameter for parameter in (*self.student.parameters(), *self.loss.trainable_parameters())
                if parameter.requires_grad]

    def forward(self, lr: torch.Tensor, hr: torch.Tensor, teacher_outputs: torch.Tensor | None = None,
                iteration: int = 0, log_gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor, LossInputs]:
        """Compute the loss of a batch.

        lr: uint8 N x 3 x H x W; hr: uint8 N x 3 x sH x sW; teacher_outputs: cached outputs of k networks, int16
        N x 3k x sH x sW (data/teacher_cache.py), which are the teachers, or those of a `MeanTeacher`. Returns the loss, the
        weighted value of each term without a graph (with log_gradients also the squared norms of their gradients, see
        `Loss.forward`), and the detached inputs of the original batch, for `loss.update` after the optimiser step.
        """
        lr, hr = (x.to(self.device, non_blocking=True) for x in (lr, hr))
        if self.degradation:
            lr, hr = self.degradation(lr, hr)
        views = self.make_views(lr, hr, upcycle=() if iteration % self.upcycle_every else self.upcycle)
        views = [view for view in views if self.loss.terms_on(view.name, view.hr is not None, iteration)]
        for view in views:
            view.lr, view.hr = self.to_input(view.lr), None if view.hr is None else self.to_input(view.hr)
        number = self.draw_teacher()
        teacher = None if number is None else self.teachers[number]
        cached = None
        if teacher_outputs is not None:
            sr = teacher_outputs.unflatten(1, (len(self.teachers), -1, 3))[:, number].to(self.device, non_blocking=True)
            cached = Output(self.to_input(decode(sr).mean(1)))
        weight = eco.weight_of_hr(iteration / self.eco_iterations) if self.eco_iterations else 1
        if weight < 1:
            self.mix(views[0], teacher, cached, weight)
        needs = [self.loss.needs_on(view.name, view.hr is not None, iteration) for view in views]
        if weight < 1 or "features" in needs[0]:
            cached = None  # of another LR, or without feature maps
        inputs, features = [view.lr for view in views], ["features" in need for need in needs]
        probabilities = [self.label_consistency * (not {"all", view.name}.isdisjoint(self.label_consistency_views))
                         for view in views]
        students = with_label_consistency(
            partial(forward_by_size, partial(self.run, self.student), features=features), inputs, probabilities,
            self.rgb_range)
        outputs = self.teacher_outputs(teacher, inputs, features, needs, cached)
        steps = [LossInputs(view.lr, view.hr, student, output and output.detach(),
                            output.sr if "teacher_grad" in need else None, view.name, view.weight, iteration, teacher,
                            forward=lambda net, x: self.run(net, x, False, self.teacher_precision).sr)
                 for view, need, student, output in zip(views, needs, students, outputs)]
        total, values = self.loss(*steps, log_gradients=log_gradients)
        return total, values, steps[0].detach()

    @torch.no_grad()
    def mix(self, view: View, teacher: nn.Module, cached: Output | None, weight: float) -> None:
        """Replace LR and HR of the original batch by the mixtures of ECO with this weight of LR and HR.

        cached: the teacher's output, if it is cached.
        """
        output = cached or self.run(teacher, view.lr, False, self.teacher_precision)
        view.lr, view.hr = eco.mix(view.lr, view.hr, output.sr, weight, self.student.scale, self.rgb_range)

    def teacher_outputs(self, teacher: nn.Module, inputs: list[torch.Tensor], features: list[bool],
                        needs: list[frozenset], cached: Output | None) -> list[Output | None]:
        """Compute the teacher's output on each view, None where no term needs it.

        It has a graph only where a term trains the teacher. cached: the output on the original batch, if it is cached.
        """
        outputs = {0: cached} if cached else {}
        for graph in (False, True):
            missing = [index for index, need in enumerate(needs)
                       if "teacher" in need and index not in outputs and graph == ("teacher_grad" in need)]
            precision = self.precision if graph else self.teacher_precision
            with nullcontext() if graph else torch.inference_mode():
                found = forward_by_size(partial(self.run, teacher, precision=precision),
                                        [inputs[index] for index in missing], [features[index] for index in missing])
            outputs.update(zip(missing, found if graph else (output.clone() for output in found)))
        return [outputs.get(index) for index in range(len(inputs))]

    def draw_teacher(self) -> int | None:
        """Draw the index of the teacher for a batch; None where no term needs one."""
        if len(self.teachers) > 1:
            return int(torch.randint(len(self.teachers), ()))
        return 0 if self.teachers else None

    def run(self, net: nn.Module, lr: torch.Tensor, features: bool, precision: str | None = None) -> Output:
        """Run a network, by default in the precision of the student; `features`: whether to return its feature maps too."""
        with autocast(self.device, precision or self.precision):
            out = self.compiled.get(net, net)(lr, features=features)
        return Output(*out) if features else Output(out)

    def to_input(self, x: torch.Tensor) -> torch.Tensor:
        """Convert images in [0, 255] of any type to float32 in [0, rgb_range]."""
        x = x.to(memory_format=torch.channels_last).float()
        return x * (self.rgb_range / 255) if self.rgb_range != 255 else x

    def compile_networks(self, images: int, side: int) -> None:
        """Compile student and teachers with torch.compile; one that cannot be compiled runs uncompiled, which is logged.

        images, side: size of a batch of LR crops and their side, with which each compiled network is tested.
        """
        lr = self.to_input(torch.zeros(images, 3, side, side, device=self.device))
        needs = self.loss.needs_on("original", True)
        for net in (self.student, *self.teachers):
            trained = net is self.student or "teacher_grad" in needs
            self.compiled[net] = torch.compile(net)
            try:
                with nullcontext() if trained else torch.inference_mode():
                    output = self.run(net, lr, "features" in needs, self.precision if trained else self.teacher_precision)
                if trained:
                    torch.autograd.backward([x.sum() for x in (output.sr, *output.features)])
            except Exception as error:  # the compiler and its back ends raise exceptions without a common class
                del self.compiled[net]
                reason = " ".join(str(error).split())[:100]
                log.info("--compile: %s cannot be compiled here and runs uncompiled (%s ...)", type(net).__name__, reason)
            self.zero_grad(set_to_none=True)


def build_distiller(args: Namespace, student: nn.Module, teachers: Sequence[nn.Module], loss: Loss) -> Distiller:
    """Build a Distiller from the flags."""
    if args.teacher_choice == "mean" and teachers:
        teachers = [MeanTeacher(teachers)]
    return Distiller(student, teachers, loss, upcycle=args.upcycle, upcycle_every=args.upcycle_every,
                     n_zoom_in=args.n_zoom_in, zoom_in_tiles=args.zoom_in_tiles, label_consistency=args.label_consistency,
                     label_consistency_views=args.label_consistency_views,
                     degradation=Degradation(args.degrade, student.scale) if args.degrade else None,
                     eco_iterations=args.epochs * args.test_every if args.eco else 0, rgb_range=args.rgb_range,
                     precision=args.precision, teacher_precision=args.teacher_precision)
