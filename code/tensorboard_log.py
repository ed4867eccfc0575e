"""Curves for TensorBoard (--tensorboard), whose package is optional: event files in experiment/RUN/tensorboard/."""
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from system.errors import UserError, reason_of

log = logging.getLogger("sr")
IMAGE_SIDE = 256  # pixels; larger images would make the event files of a long run too large


def summary_writer() -> Callable:
    """Return PyTorch's class SummaryWriter; raises UserError where the package tensorboard cannot be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional, and takes seconds
    except Exception as error:  # where its version does not fit those of other packages, not only an ImportError
        raise UserError("--tensorboard: the package tensorboard is missing or cannot be imported "
                        f"({reason_of(error)}): pip install tensorboard") from None
    return SummaryWriter


class TensorBoard:
    """Writes scalars and images. A failure, for example on a full disk, is logged once and does not end the run."""

    def __init__(self, folder: Path, first_step: int):
        # what an interrupted run wrote for later steps is hidden, as the resumed run writes it again
        self.writer = None
        self._try(lambda: setattr(self, "writer", summary_writer()(folder, purge_step=first_step)))

    def add(self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        """Write values and uint8 H x W x 3 images under their names, to the disk before the next save of the state."""
        if self.writer:
            self._try(lambda: self._add(step, scalars, images))

    def _add(self, step, scalars, images):
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")
        self.writer.flush()

    def _try(self, action):
        try:
            action()
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("--tensorboard: cannot write (%s); the run continues without it", reason_of(error))
            self.writer = None

    def close(self) -> None:
        """Close the event file."""
        if self.writer:
            self._try(self.writer.close)
