"""The loss: a string of weighted terms, `0.5*DS+0.5*TS+10*SA`. A new term is a class in a file here and a line below."""
import torch
from torch import nn

from error import UserError
from loss import adversarial, affinity, consistency, contrastive, distribution, feature, nce, pixel
from loss.step import Output, Setting, Step, Term
from option import parse_loss

__all__ = ["TERMS", "Loss", "Output", "Setting", "Step", "Term"]

TERMS = {
    "DS": pixel.DataSupervision,
    "TS": pixel.TeacherSupervision,
    "SA": affinity.SpatialAffinity,
    "PSA": affinity.PooledSpatialAffinity,
    "RBF": affinity.RadialBasisFunction,
    "CA": feature.ChannelAffinity,
    "IA": feature.InstanceAffinity,
    "FSP": feature.SolutionFlow,
    "AT": feature.AttentionTransfer,
    "fitnet": feature.Hint,
    "MMD": feature.MaximumMeanDiscrepancy,
    "CSD": contrastive.Contrast,
    "VGG": contrastive.Perceptual,
    "T_DS": contrastive.TeachersData,
    "LC": consistency.LabelConsistency,
    "DCR": distribution.DynamicContrast,
    "DMM": distribution.CodeDistribution,
    "NCE": nce.NoiseContrast,
    "GAN": adversarial.Adversarial,
}


def parse(string):
    """'0.5*DS+10*SA' -> [(0.5, 'DS'), (10.0, 'SA')] without the terms of weight 0; raises UserError for unknown ones."""
    terms = parse_loss(string)
    unknown = [name for _, name in terms if name not in TERMS]
    if unknown:
        raise UserError(f"loss {string!r}: there is no term {unknown[0]}; there are {', '.join(TERMS)}")
    terms = [(weight, name) for weight, name in terms if weight]
    if not terms:
        raise UserError(f"loss {string!r}: every weight is 0, nothing would be learned")
    return terms


def needs_of(string):
    """What the terms of a loss string look at: a set of 'hr', 'teacher', 'features'."""
    return frozenset().union(*(TERMS[name].needs for _, name in parse(string)))


class Loss(nn.Module):
    """Weighted sum of terms. `names` is their order; `needs` is what a step must hold."""

    def __init__(self, string, setting):
        super().__init__()
        self.names = [name for _, name in parse(string)]
        self.weights = {name: weight for weight, name in parse(string)}
        self.needs = needs_of(string)
        self.terms = nn.ModuleDict({name: TERMS[name](setting) for name in self.names})

    def forward(self, step):
        """-> (total, the weighted value of each term in the order of `names`, without a graph); float32 throughout."""
        with torch.autocast(step.lr.device.type, enabled=False):
            values = torch.stack([self.weights[name] * self.terms[name](step) for name in self.names])
        return values.sum(), values.detach()

    def trained(self):
        return [parameter for term in self.terms.values() for parameter in term.trained()]

    def update(self, step):
        with torch.autocast(step.lr.device.type, enabled=False):
            for term in self.terms.values():
                term.update(step)
