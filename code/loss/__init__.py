"""The loss: a string of weighted terms such as `0.5*DS+0.5*TS+10*SA`, or one for each of several stages of the training.

Each file of this package holds a family of terms: its classes, `TERMS`, their names in the string, and `build_term`, which
maps the command-line flags to their constructors. The classes do not depend on the flags: any script can use them.
"""
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from loss import adversarial, affinity, consistency, contrastive, distribution, feature, nce, pixel
from loss.term import Context, LossInputs, Output, Term, concatenate
from option_types import parse_stages, stage_ends
from system.errors import UserError

__all__ = ["TERMS", "Context", "Loss", "LossInputs", "Output", "Term", "build_loss", "concatenate", "needs_of"]

FAMILIES = {name: family for family in (pixel, affinity, feature, contrastive, consistency, distribution, nce, adversarial)
            for name in family.TERMS}
TERMS = {name: family.TERMS[name] for name, family in FAMILIES.items()}


def parse(string: str) -> list[dict[str, float]]:
    """Parse '0.5*DS+10*SA' to [{'DS': 0.5, 'SA': 10.0}], the weights in each stage without those of 0; raises UserError."""
    stages = []
    for _, terms in parse_stages(string):
        unknown = next((name for _, name in terms if name not in TERMS), None)
        if unknown:
            raise UserError(f"loss {string!r}: there is no term {unknown}; the terms are {', '.join(TERMS)}")
        stages.append({name: weight for weight, name in terms if weight})
        if not stages[-1]:
            raise UserError(f"loss {string!r}: every weight is 0, so nothing would be trained")
    return stages


def names_of(stages: Iterable[dict[str, float]]) -> list[str]:
    """Return the names of the terms of all stages, each once."""
    return list(dict.fromkeys(name for weights in stages for name in weights))


def needs_of(string: str) -> frozenset[str]:
    """Return the union of the `needs` of the terms of a loss string."""
    return frozenset().union(*(TERMS[name].needs for name in names_of(parse(string))))


def build_loss(string: str, context: Context) -> "Loss":
    """Build the loss from its string and the flags; raises UserError where a term does not fit the flags or networks."""
    stages, args = parse(string), context.args
    names, views, view_terms = names_of(stages), list(context.views), args.view_terms if context.views else []
    check_views(names, views, view_terms)
    ends = stage_ends(parse_stages(string), args.epochs * args.test_every) if len(stages) > 1 else [math.inf]
    return Loss({name: FAMILIES[name].build_term(name, context) for name in names}, list(zip(ends, stages)), view_terms)


class Loss(nn.Module):
    """Weighted sum of terms over the views of a batch.

    weights: those of the terms; or for several stages of the training a list of pairs, the iteration before which a stage
    ends and the weights of its terms, which alone are computed and updated in the stage.

    On views other than the original batch (data/views.py) the terms are those of `view_terms`, or, if that is empty, all
    that compare no feature maps. Terms that train the teacher are not computed on them, nor are terms that need ground truth
    on a view without it.
    """

    def __init__(self, terms: dict[str, Term], weights: dict[str, float] | Sequence[tuple[float, dict[str, float]]],
                 view_terms: list[str] = ()):
        super().__init__()
        self.stages, self.view_terms = [(math.inf, weights)] if isinstance(weights, dict) else weights, view_terms
        self.names = list(terms)
        self.terms = nn.ModuleDict(terms)

    def weights_at(self, iteration: int) -> dict[str, float]:
        """Return the weights of the stage in which an iteration is; those of the last stage after its end."""
        return next((weights for end, weights in self.stages if iteration < end), self.stages[-1][1])

    def terms_on(self, view: str, has_hr: bool, iteration: int | None = None) -> list[str]:
        """Return the names of the terms that are computed on a view, in an iteration or (None) in any of them."""
        names = self.names if iteration is None else self.weights_at(iteration)
        return terms_on(names, view, has_hr, self.view_terms)

    def needs_on(self, view: str, has_hr: bool, iteration: int | None = None) -> frozenset[str]:
        """Return the union of the `needs` of the terms on a view, in an iteration or (None) in any of them."""
        return frozenset().union(*(TERMS[name].needs for name in self.terms_on(view, has_hr, iteration)))

    def forward(self, *views: LossInputs, log_gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss in float32.

        views: the inputs of each view. Returns the sum and, detached, the weighted value of each term in the order of
        `names`, 0 for those of other stages; with log_gradients 2 x terms, these values and the squared norms of their
        gradients (`squared_gradient`).
        """
        weights = self.weights_at(views[0].iteration)
        names = [self.terms_on(inputs.view, inputs.hr is not None, inputs.iteration) for inputs in views]
        if log_gradients:
            views = [inputs.alias() for inputs in views]
        with torch.autocast(views[0].lr.device.type, enabled=False):
            values = [
                weights[name] * sum(inputs.weight * self.terms[name](inputs)
                                    for inputs, computed in zip(views, names) if name in computed)
                if name in weights else views[0].student.sr.new_zeros(()) for name in self.names]
            stacked = torch.stack(values)
            total, stacked = stacked.sum(), stacked.detach()
            if log_gradients:
                outputs = [output for inputs in views for output in inputs.trained_outputs()]
                squares = [squared_gradient(value, weights.get(name, 1), outputs) for name, value in zip(self.names, values)]
                stacked = torch.stack([stacked, torch.stack(squares)])
        return total, stacked

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all terms that the student's optimiser trains."""
        return [parameter for term in self.terms.values() for parameter in term.trainable_parameters()]

    def count(self, name: str, start: int, stop: int) -> int:
        """Return in how many of the iterations start .. stop - 1 a term is computed."""
        begins = [0, *(end for end, _ in self.stages)]
        return sum(max(min(stop, end) - max(start, begin), 0)
                   for begin, (end, weights) in zip(begins, self.stages) if name in weights)

    def update(self, inputs: LossInputs) -> None:
        """Update the state of the terms after an optimiser step."""
        with torch.autocast(inputs.lr.device.type, enabled=False):
            for name in self.weights_at(inputs.iteration):
                self.terms[name].update(inputs)


def squared_gradient(value: torch.Tensor, weight: float, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Compute the squared norm of the gradient of `value` with respect to the concatenation of `outputs`; keep the graph.

    weight: that of the term in `value`. The backward pass is scaled to that of the sum over pixels with weight 1, so that
    the gradients of float16 feature maps neither vanish nor overflow.
    """
    if not value.requires_grad:
        return torch.zeros_like(value)
    scale = outputs[0].numel() / weight
    found = torch.autograd.grad(value, outputs, torch.full_like(value, scale), retain_graph=True, allow_unused=True)
    squares = (gradient.to(value.dtype).square().sum() for gradient in found if gradient is not None)
    return sum(squares, torch.zeros_like(value)) / scale**2


def terms_on(names: Iterable[str], view: str, has_hr: bool, view_terms: list[str]) -> list[str]:
    """Return those of the terms `names` that are computed on a view; see `Loss`."""
    if view == "original":
        return list(names)
    chosen = [name for name in names if (name in view_terms if view_terms else "features" not in TERMS[name].needs)]
    missing = {"teacher_grad"} if has_hr else {"teacher_grad", "hr"}
    return [name for name in chosen if not TERMS[name].needs & missing]


def check_views(names: Iterable[str], views: list, view_terms: list[str]) -> None:
    """Raise UserError where a term cannot be computed on a view, or a view has no terms.

    names: the terms of the loss. views: `data.views.PlannedView` of each.
    """
    computed = {view: terms_on(names, view.name, view.has_hr, view_terms) for view in views}
    for name in view_terms:
        if name not in names:
            raise UserError(f"--view_terms {name}: the loss has no such term; its terms are {', '.join(names)}")
        if not any(name in terms for terms in computed.values()):
            raise UserError(f"--view_terms {name}: it cannot be computed on {' or '.join(view.name for view in views)}")
    for view, terms in computed.items():
        if not terms:
            raise UserError(f"--upcycle {view.name}: no term of {'+'.join(names)} can be computed on that view"
                            + ("" if view.has_hr else ", which has no ground truth: add TS"))
        large = next((name for name in terms if TERMS[name].min_size > view.side), None)
        if large:
            raise UserError(f"--upcycle {view.name}: {large} needs images of {TERMS[large].min_size} pixels or more, those "
                            f"of this view have {view.side}: give a larger --patch_size or other --view_terms")
