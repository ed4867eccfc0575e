"""Supervision of the output by HR (DS) and by the teacher's output (TS): the L1 of FAKD (He et al., ICIP 2020), and others.

Each distance is a function (student, target) of two batches of images N x 3 x H x W in [0, rgb_range]. In the loss string
DS_MSE is the distance MSE from HR, TS_MSE that from the teacher's output, and so on.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from loss.term import Context, LossInputs, Term

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WAVELET_LEVELS = 4


def charbonnier(student: torch.Tensor, target: torch.Tensor, epsilon: float = 1e-3 * 255) -> torch.Tensor:
    """Compute the mean of sqrt((S - target)^2 + epsilon^2).

    Source: LapSRN (Lai et al., CVPR 2017), with epsilon = 1e-3 for images in [0, 1].
    """
    return ((student - target).square() + epsilon ** 2).sqrt().mean()


def fft_l1(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the L1 of the real and imaginary parts of the Fourier transforms (rfft2), which are not normalised.

    It grows with the side of the crops. Source: MIMO-UNet (Cho et al., ICCV 2021), with the weight 0.1 beside an L1 of the
    images, and in the form of SAFMN (Sun et al., ICCV 2023), with the weight 0.05.
    """
    return torch.view_as_real(torch.fft.rfft2((student - target).float().contiguous())).abs().mean()


def gradient_l1(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the L1 of the differences between adjacent pixels: the mean over columns plus that over rows.

    Source: the gradient difference loss of Mathieu et al., ICLR 2016, which compares the absolute values of the differences.
    """
    error = student - target
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def wavelet_l1(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the L1 of the subbands of an orthonormal Haar transform of 4 levels.

    It is the mean over the three detail subbands of each level, summed over the levels, plus the mean over the last
    approximation, all with weight 1. Zeros extend an odd side. Source: the published code of MTKD (Jiang et al., ECCV 2024).
    """
    approximation, total = student - target, 0
    for _ in range(WAVELET_LEVELS):
        height, width = approximation.shape[2:]
        x = F.pad(approximation, (0, width % 2, 0, height % 2))
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        total = total + torch.stack([a - b + c - d, a + b - c - d, a - b - c + d]).abs().mean() / 2
        approximation = (a + b + c + d) / 2
    return total + approximation.abs().mean()


class DataSupervision(Term):
    """DS: L1(S, HR), mean over pixels; DS_MSE and others: another `distance` between the two."""

    needs = frozenset({"hr"})

    def __init__(self, distance: Distance = F.l1_loss):
        super().__init__()
        self.distance = distance

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the distance, a scalar."""
        return self.distance(inputs.student.sr, inputs.hr)


class TeacherSupervision(Term):
    """TS: L1(S, T), mean over pixels; TS_MSE and others: another `distance` between the two."""

    needs = frozenset({"teacher"})

    def __init__(self, distance: Distance = F.l1_loss):
        super().__init__()
        self.distance = distance

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the distance, a scalar."""
        return self.distance(inputs.student.sr, inputs.teacher.sr)


class MaskedTeacherSupervision(Term):
    """TS_masked: |S - T| where the teacher is nearer to HR than the student, |T - HR| < |S - HR|, else 0; mean over pixels.

    Each channel of a pixel is compared on its own; the comparison has no gradient. The term is this project's. Its condition
    is that of the teacher bounded regression loss (Chen et al., NeurIPS 2017), which draws the student to HR, not to T.
    """

    needs = frozenset({"hr", "teacher"})

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the mean over all pixels, masked ones included, a scalar."""
        sr, teacher = inputs.student.sr, inputs.teacher.sr
        nearer = (teacher - inputs.hr).abs() < (sr.detach() - inputs.hr).abs()
        return ((sr - teacher).abs() * nearer).mean()


def psnr_loss(student: torch.Tensor, target: torch.Tensor, rgb_range: float = 255) -> torch.Tensor:
    """Compute 10 log10(MSE + 1e-8) of the images in [0, 1], the negative PSNR in dB, mean over the images of the batch.

    Source: NAFNet (Chen et al., ECCV 2022), after HINet (Chen et al., CVPRW 2021).
    """
    error = (student - target).square().mean(dim=(1, 2, 3)) / rgb_range ** 2
    return 10 * torch.log10(error + 1e-8).mean()


DISTANCES = {"MSE": F.mse_loss, "Charbonnier": charbonnier, "FFT": fft_l1, "gradient": gradient_l1, "wavelet": wavelet_l1,
             "PSNR": psnr_loss}
TARGETS = {"DS": DataSupervision, "TS": TeacherSupervision}
TERMS = {**TARGETS, **{f"{target}_{distance}": term for target, term in TARGETS.items() for distance in DISTANCES},
         "TS_masked": MaskedTeacherSupervision}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags."""
    distance = DISTANCES.get(name.partition("_")[2])
    if distance is charbonnier:
        distance = partial(charbonnier, epsilon=1e-3 * context.args.rgb_range)
    if distance is psnr_loss:
        distance = partial(psnr_loss, rgb_range=context.args.rgb_range)
    return TERMS[name](distance) if distance else TERMS[name]()
