"""LPIPS, DISTS, NIQE and other metrics (--metrics) of the package pyiqa, which is optional."""
from collections.abc import Sequence

import numpy as np
import torch

from system.errors import UserError, reason_of

INSTALL = f"pip install pyiqa, with the torchvision that belongs to torch {torch.__version__}"


class PerceptualMetric:
    """A metric of 8-bit RGB images, on the whole image.

    needs_hr: whether it compares with HR, as LPIPS and DISTS do; NIQE needs the SR image alone. lower_is_better: which of
    two values is that of the better image.
    """

    def __init__(self, name: str, net: torch.nn.Module, device: torch.device):
        self.name, self.net, self.device = name, net, device
        self.needs_hr, self.lower_is_better = net.metric_mode == "FR", bool(net.lower_better)

    @torch.no_grad()
    def __call__(self, sr: np.ndarray, hr: np.ndarray | None) -> float:
        """Compute the metric; raises ValueError where it cannot be computed, for example on images that are too small."""
        images = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device).float() / 255
                  for image in ((sr, hr) if self.needs_hr else (sr,))]
        try:
            return float(self.net(*images))
        except Exception as error:  # each metric has its own
            raise ValueError(f"{self.name} cannot be computed on {sr.shape[1]} x {sr.shape[0]} pixels "
                             f"({reason_of(error)})") from None


def make_metrics(names: Sequence[str], device: torch.device) -> list[PerceptualMetric]:
    """Build the metrics of these names; raises UserError without pyiqa, for a name that it lacks, and without its weights.

    pyiqa downloads the weights of a metric on its first use.
    """
    if not names:
        return []
    try:
        import pyiqa  # noqa: PLC0415 - optional, and takes seconds
    except ModuleNotFoundError as error:
        problem = "is not installed" if error.name == "pyiqa" else f"needs {error.name}, which is not installed"
        raise UserError(f"--metrics {'+'.join(names)}: the package pyiqa {problem}: {INSTALL}") from None
    except Exception as error:  # a torchvision of another version raises RuntimeError or OSError
        raise UserError(f"--metrics {'+'.join(names)}: the package pyiqa cannot be imported ({reason_of(error)}): "
                        f"{INSTALL}") from None
    metrics = []
    for name in names:
        try:
            metrics.append(PerceptualMetric(name, pyiqa.create_metric(name, device=device), device))
        except Exception as error:  # an assertion for an unknown name, network errors of several libraries
            raise UserError(f"--metrics {name}: pyiqa cannot build it ({reason_of(error)}); see pyiqa.list_models(); "
                            "weights are downloaded on the first use") from None
    return metrics
