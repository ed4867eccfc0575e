"""Supervision of the output: DS and TS of FAKD (He et al., ICIP 2020)."""
import torch
import torch.nn.functional as F

from loss.term import Context, LossInputs, Term


class DataSupervision(Term):
    """DS: L1(S, HR), mean over pixels."""

    needs = frozenset({"hr"})

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute L1(S, HR), a scalar."""
        return F.l1_loss(inputs.student.sr, inputs.hr)


class TeacherSupervision(Term):
    """TS: L1(S, T), mean over pixels."""

    needs = frozenset({"teacher"})

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute L1(S, T), a scalar."""
        return F.l1_loss(inputs.student.sr, inputs.teacher.sr)


TERMS = {"DS": DataSupervision, "TS": TeacherSupervision}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags."""
    return TERMS[name]()
