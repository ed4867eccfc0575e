"""Distillation in the feature space and the code distributions of a VQGAN: DCKD (Zhou et al., AAAI 2025).

The inputs of the VQGAN are in [-1, 1], as in its training; in DCKD's published code they are in [0, 1], see the
table of departures in scripts/README.md.
"""
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from loss.contrastive import contrast_l1
from loss.degradation import degrade
from loss.frozen import compute_once
from loss.term import Context, LossInputs, Term
from loss.vgg import without_graph
from loss.vqgan import shared_vqgan
from model.lora import merged, merged_parameters
from system.errors import UserError

PERIOD = 100_000  # iterations after which the next element of `history_every` applies
HISTORY_DECAY = 0.1


def cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute -sum_k C_T log C_S, mean over positions, from the logits of the distributions C, positions x codes each."""
    return -(F.softmax(teacher, 1) * F.log_softmax(student, 1)).sum(1).mean()


def student_features(vqgan: nn.Module, inputs: LossInputs) -> list[torch.Tensor]:
    """Compute the VQGAN features of the student's output, once for all terms."""
    return compute_once(inputs, "vqgan_student", lambda: vqgan(inputs.student.sr))


class DistributionMapping(Term):
    """DMM: cross-entropy between the distributions of student and teacher over the codes of the VQGAN.

    C = softmax(max d - d), with the squared distances d of z = quant_conv(encoder(image)) to the codes. The minimum of the
    term is the entropy of the teacher's distribution. Departs from the published code, which passes probabilities to
    a cross-entropy that applies softmax once more (table of departures in scripts/README.md). vqgan: loss.vqgan.VQGAN.
    """

    needs = frozenset({"teacher"})

    def __init__(self, vqgan: nn.Module):
        super().__init__()
        object.__setattr__(self, "vqgan", vqgan)  # not a submodule: it is neither trained nor saved

    def logits(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute the logits of the code distributions from the encoder's features."""
        return self.vqgan.code_logits(self.vqgan.latent(features[-1]))

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the cross-entropy, mean over N x H/16 x W/16 positions."""
        teacher = compute_once(inputs, "vqgan_teacher", lambda: without_graph(self.vqgan, inputs.teacher.sr)[0])
        return cross_entropy(self.logits(student_features(self.vqgan, inputs)), self.logits(teacher))


class DynamicContrastiveLoss(Term):
    """DCR: contrast_l1 in the first residual block of each level of the VQGAN's encoder.

    Negatives are the outputs of the history model for LR and for `negatives` degradations of LR: noise, blur and resizing,
    each with its probability. The history model is a copy of `student`. Every s iterations it becomes 0.1 of itself + 0.9 of
    the EMA of the student, where s is the first element of `history_every` in the first 100,000 iterations, the
    second in the next, and so on. vqgan: loss.vqgan.VQGAN. Raises ValueError where no input would be degraded.
    """

    needs = frozenset({"teacher"})

    def __init__(self, vqgan: nn.Module, student: nn.Module, negatives: int = 4, noise: float = 1, blur: float = 0,
                 resize: float = 0, history_every: Sequence[int] = (1000, 2000, 3000), rgb_range: float = 255):
        super().__init__()
        if not negatives or not (noise or blur or resize):
            raise ValueError("without degraded inputs the negatives are the student's own images")
        self.negatives, self.degradation = negatives, dict(noise=noise, blur=blur, resize=resize)
        self.history_every, self.rgb_range = list(history_every), rgb_range
        object.__setattr__(self, "vqgan", vqgan)
        self.history = copy.deepcopy(merged(student)).eval().requires_grad_(False)

    @torch.no_grad()
    def history_outputs(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the outputs of the history model: (1 + negatives) N images."""
        degraded = [degrade(inputs.lr, self.rgb_range, **self.degradation) for _ in range(self.negatives)]
        return inputs.forward(self.history, torch.cat([inputs.lr, *degraded]))

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the contrast of teacher output and negatives, a scalar."""
        negatives = self.history_outputs(inputs)
        if "vqgan_teacher" in inputs.cache:
            (others,) = without_graph(self.vqgan, negatives)
        else:
            inputs.cache["vqgan_teacher"], others = without_graph(self.vqgan, inputs.teacher.sr, negatives)
        chosen = torch.arange(len(negatives)).view(-1, len(inputs.lr))  # the negatives of an image are its own degradations
        return contrast_l1(student_features(self.vqgan, inputs), inputs.cache["vqgan_teacher"], others, chosen)

    @torch.no_grad()
    def update(self, inputs: LossInputs) -> None:
        """Update the history model every s iterations."""
        every = self.history_every[min(inputs.iteration // PERIOD, len(self.history_every) - 1)]
        if (inputs.iteration + 1) % every == 0:
            torch._foreach_lerp_(list(self.history.parameters()), merged_parameters(inputs.ema_student), 1 - HISTORY_DECAY)


TERMS = {"DCR": DynamicContrastiveLoss, "DMM": DistributionMapping}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags; raises UserError where it does not fit them."""
    args = context.args
    if name == "DMM":
        return DistributionMapping(shared_vqgan(context))
    try:
        return DynamicContrastiveLoss(
            shared_vqgan(context), context.student, args.dcr_negatives, args.dcr_noise, args.dcr_blur, args.dcr_resize,
            args.history_every, args.rgb_range)
    except ValueError as error:
        raise UserError(f"DCR: {error}: give --dcr_negatives and one of --dcr_noise, --dcr_blur, --dcr_resize") from None
