"""ECO: inputs and labels between the teacher's output and HR (Lee and Heo, Noise-free Optimization, AAAI 2024).

The training begins with the pairs (teacher output, downscaled) -> teacher output, in which the label follows from the input,
and passes over to LR -> HR. In between LR and HR are mixtures with the same weights. Schedule and 8-bit images are those of
the published code, which in addition doubles the learning rate. Departs from it in that crops of the teacher output are
downscaled, not the image, so that LR differs within two pixels of the border of a crop.
"""
import math

import torch

from data import degrade


def weight_of_hr(progress: float) -> float:
    """Return the weight of LR and HR in the mixtures, given the part of the iterations that is done.

    It is 0 up to 0.26 and 1 from 0.74, with a sigmoid in between; a linear one was as good, according to the authors.
    """
    sigmoid = 1 / (1 + math.exp(-10 * (progress - 0.5)))
    return min(max(0.5 + 1.2 * (sigmoid - 0.5), 0), 1)


def mix(lr: torch.Tensor, hr: torch.Tensor, teacher: torch.Tensor, weight: float, scale: int,
        rgb_range: float = 255) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight * LR + (1 - weight) * (teacher output, downscaled), and the same mixture of HR and teacher output.

    lr: N x 3 x H x W; hr, teacher: N x 3 x sH x sW, all in [0, rgb_range].
    """
    unit = rgb_range / 255
    pixels = (teacher.float() / unit).round().clamp(0, 255)
    small = degrade.downscale_batch(pixels, scale)
    return torch.lerp(small * unit, lr, weight), torch.lerp(pixels * unit, hr, weight)
