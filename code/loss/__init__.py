"""The loss: a string of weighted terms, `0.5*DS+0.5*TS+10*SA`. A new term is a class in a file here and a line below."""
import torch
from option import parse_loss
from system.errors import UserError
from torch import nn

from loss import adversarial, affinity, consistency, contrastive, distribution, feature, nce, pixel
from loss.step import Output, Setting, Step, Term, join

__all__ = ["TERMS", "Loss", "Output", "Setting", "Step", "Term", "join"]

TERMS = {
    "DS": pixel.DataSupervision,
    "TS": pixel.TeacherSupervision,
    "SA": affinity.SpatialAffinity,
    "PSA": affinity.PooledSpatialAffinity,
    "RBF": affinity.RadialBasisFunction,
    "CA": feature.ChannelAffinity,
    "IA": feature.InstanceAffinity,
    "FSP": feature.FSP,
    "AT": feature.AttentionTransfer,
    "fitnet": feature.FitNet,
    "MMD": feature.MaximumMeanDiscrepancy,
    "CSD": contrastive.ContrastiveLoss,
    "VGG": contrastive.Perceptual,
    "T_DS": contrastive.TeacherDataSupervision,
    "LC": consistency.LabelConsistency,
    "DCR": distribution.DynamicContrastiveLoss,
    "DMM": distribution.DistributionMapping,
    "NCE": nce.InfoNCE,
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
    """What the terms of a loss string look at: a set of the words of `Term.needs`."""
    return frozenset().union(*(TERMS[name].needs for _, name in parse(string)))


class Loss(nn.Module):
    """Weighted sum of terms, over the views of a batch. `names` is the terms' order.

    On views that were made from the batch (data/views.py) a term is one of those of --view_terms, or, where none are named,
    any that compares no feature maps. It never is one that needs a truth where there is none, or trains the teacher.
    """

    def __init__(self, string, setting):
        super().__init__()
        self.names = [name for _, name in parse(string)]
        self.weights = {name: weight for weight, name in parse(string)}
        self.needs = needs_of(string)
        self.view_terms = setting.args.view_terms if setting.views else []
        check_views(self, setting.views)
        self.terms = nn.ModuleDict({name: TERMS[name](setting) for name in self.names})

    def looks_at(self, view, has_truth):
        """Names of the terms that are computed on the view of that name."""
        if view == "plain":
            return self.names
        asked = [name for name in self.names
                 if (name in self.view_terms if self.view_terms else "features" not in TERMS[name].needs)]
        missing = {"teacher_graph"} if has_truth else {"teacher_graph", "hr"}
        return [name for name in asked if not TERMS[name].needs & missing]

    def needs_on(self, view, has_truth):
        """What these terms look at."""
        return frozenset().union(*(TERMS[name].needs for name in self.looks_at(view, has_truth)))

    def forward(self, *steps):
        """A step for each view -> (total, the weighted value of each term in the order of `names`, without a graph).

        float32 throughout.
        """
        names = [self.looks_at(step.view, step.hr is not None) for step in steps]
        with torch.autocast(steps[0].lr.device.type, enabled=False):
            values = torch.stack([
                self.weights[name] * sum(step.weight * self.terms[name](step)
                                         for step, looking in zip(steps, names) if name in looking)
                for name in self.names])
        return values.sum(), values.detach()

    def trained(self):
        return [parameter for term in self.terms.values() for parameter in term.trained()]

    def update(self, step):
        with torch.autocast(step.lr.device.type, enabled=False):
            for term in self.terms.values():
                term.update(step)


def check_views(loss, views):
    """Raises UserError where a view and the terms that are to look at it do not fit."""
    looking = {view: loss.looks_at(view.name, view.has_truth) for view in views}
    for name in loss.view_terms:
        if name not in loss.names:
            raise UserError(f"--view_terms {name}: the loss has no such term, it has {', '.join(loss.names)}")
        if not any(name in names for names in looking.values()):
            raise UserError(f"--view_terms {name}: it cannot work on {' and '.join(view.name for view in views)}")
    for view, names in looking.items():
        if not names:
            raise UserError(f"--upcycle {view.name}: no term of {'+'.join(loss.names)} would look at that view"
                            + ("" if view.has_truth else ", which has no truth: add TS"))
        large = next((name for name in names if TERMS[name].smallest > view.side), None)
        if large:
            raise UserError(f"--upcycle {view.name}: {large} needs images of {TERMS[large].smallest} pixels and more, those "
                            f"of this view have {view.side}: give a larger --patch_size, or other --view_terms")
