"""Supervision of the output: L1 to the truth (DS) and to the teacher (TS), FAKD's names (He et al., ICIP 2020)."""
import torch.nn.functional as F

from loss.step import Term


class DataSupervision(Term):
    """L1(S, HR), mean over pixels."""
    needs = frozenset({"hr"})

    def forward(self, step):
        return F.l1_loss(step.student.sr, step.hr)


class TeacherSupervision(Term):
    """L1(S, T), mean over pixels."""
    needs = frozenset({"teacher"})

    def forward(self, step):
        return F.l1_loss(step.student.sr, step.teacher.sr)
