"""Distillation in a VQGAN's features and codes: DCKD (Zhou et al., AAAI 2025).

The images are shown to the VQGAN in [-1, 1], on which it was trained; DCKD's published code shows it [0, 1].
"""
import copy

import torch
import torch.nn.functional as F
from system.errors import UserError

from loss.contrastive import contrast_l1
from loss.degradation import degrade
from loss.frozen import once
from loss.step import Term
from loss.vgg import without_graph
from loss.vqgan import shared_vqgan

SPAN = 100_000  # iterations after which the next number of --history_every holds
INERTIA = 0.1


def divergence(student, teacher):
    """-sum_k C_T log C_S, mean over positions; student, teacher: positions x codes, logits of the distributions C."""
    return -(F.softmax(teacher, 1) * F.log_softmax(student, 1)).sum(1).mean()


def student_maps(net, step):
    return once(step, "vqgan_student", lambda: net(step.student.sr))


class DistributionMapping(Term):
    """DMM: cross-entropy between the distributions over the VQGAN's codes, C = softmax(max d - d) of the squared distances d

    of z = quant_conv(encoder(image)) to the codes; the teacher's is a constant, whose entropy is the least the term can be.
    Departs from the published code, which passes probabilities to a cross-entropy that applies softmax once more.
    """
    needs = frozenset({"teacher"})

    def __init__(self, setting):
        super().__init__(setting)
        object.__setattr__(self, "vqgan", shared_vqgan(setting))

    def logits(self, maps):
        return self.vqgan.code_logits(self.vqgan.latent(maps[-1]))

    def forward(self, step):
        teacher = once(step, "vqgan_teacher", lambda: without_graph(self.vqgan, step.teacher.sr)[0])
        return divergence(self.logits(student_maps(self.vqgan, step)), self.logits(teacher))


class DynamicContrastiveLoss(Term):
    """DCR: contrast_l1 in the first residual block of each level of the VQGAN's encoder.

    Negatives are outputs of the history model on LR and on --dcr_negatives degradations of LR. The history model starts as
    the student, and every s iterations becomes 0.1 of itself + 0.9 of the student's moving average; s is the first number of
    --history_every in the first 100,000 iterations, the second in the next, and so on.
    """
    needs = frozenset({"teacher"})

    def __init__(self, setting):
        super().__init__(setting)
        self.args = setting.args
        if not self.args.dcr_negatives or not (self.args.dcr_noise or self.args.dcr_blur or self.args.dcr_resize):
            raise UserError("DCR: without degraded inputs its negatives are the student's own images: give --dcr_negatives "
                            "and one of --dcr_noise, --dcr_blur, --dcr_resize")
        object.__setattr__(self, "vqgan", shared_vqgan(setting))
        self.history = copy.deepcopy(setting.student).eval().requires_grad_(False)

    @torch.no_grad()
    def negatives(self, step):
        """Outputs of the history model, (1 + --dcr_negatives) N images."""
        args = self.args
        degraded = [degrade(step.lr, args.rgb_range, args.dcr_noise, args.dcr_blur, args.dcr_resize)
                    for _ in range(args.dcr_negatives)]
        return step.run(self.history, torch.cat([step.lr, *degraded]))

    def forward(self, step):
        negatives = self.negatives(step)
        if "vqgan_teacher" in step.kept:
            (others,) = without_graph(self.vqgan, negatives)
        else:
            step.kept["vqgan_teacher"], others = without_graph(self.vqgan, step.teacher.sr, negatives)
        chosen = torch.arange(len(negatives)).view(-1, len(step.lr))  # the k-th negative of an image is its own degradation
        return contrast_l1(student_maps(self.vqgan, step), step.kept["vqgan_teacher"], others, chosen)

    @torch.no_grad()
    def update(self, step):
        every = self.args.history_every[min(step.iteration // SPAN, len(self.args.history_every) - 1)]
        if (step.iteration + 1) % every == 0:
            torch._foreach_lerp_(list(self.history.parameters()), list(step.average.parameters()), 1 - INERTIA)
