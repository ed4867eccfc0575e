"""Label consistency: the output for a transformed image should be the transformed output.

Four invertible operations, in this order: colour inversion rgb_range - x, horizontal flip, vertical flip, transpose. `draw`
chooses them for each image, `perturb` applies them, `restore` undoes them on the output. DUKD (Zhang et al., 2023) perturbs
the student's inputs of the view zoom_in (--label_consistency, --label_consistency_views), DCKD (Zhou et al., AAAI 2025) the
teacher's (LC). DUKD's published code undoes the operations in the order in which it applied them, which is wrong where a
transpose meets exactly one flip; here they are undone in reverse order, see the table of departures in scripts/README.md.
"""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from loss.term import Context, LossInputs, Output, Term
from system.distributed import global_batch_size, local_shard

INVERT, FLIP_HORIZONTAL, FLIP_VERTICAL, TRANSPOSE = range(4)


def draw(images: torch.Tensor, p: float) -> torch.Tensor:
    """Draw the operations for each of the images N x 3 x H x W, each with probability p: N x 4 booleans on the CPU.

    Where H and W differ either all images are transposed or none, since the results must have one size. The random numbers
    are those of torch's default generator on the CPU.
    """
    chosen = torch.rand(global_batch_size(len(images)), 4) < p
    if images.shape[2] != images.shape[3]:
        chosen[:, TRANSPOSE] = chosen[:1, TRANSPOSE]
    return local_shard(chosen)


def perturb(images: torch.Tensor, chosen: torch.Tensor, rgb_range: float) -> torch.Tensor:
    """Apply the chosen operations to images in [0, rgb_range]."""
    chosen = chosen.to(images.device, non_blocking=True)
    for operation in range(4):
        images = _apply(operation, images, chosen[:, operation], rgb_range)
    return images


def restore(images: torch.Tensor, chosen: torch.Tensor, rgb_range: float) -> torch.Tensor:
    """Undo `perturb`: each operation is its own inverse, applied in reverse order."""
    chosen = chosen.to(images.device, non_blocking=True)
    for operation in reversed(range(4)):
        images = _apply(operation, images, chosen[:, operation], rgb_range)
    return images


def restore_features(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Undo the flips and the transpose on a feature map N x C x H x W; a colour inversion cannot be undone on features."""
    chosen = chosen.to(x.device, non_blocking=True)
    for operation in (TRANSPOSE, FLIP_VERTICAL, FLIP_HORIZONTAL):
        x = _apply(operation, x, chosen[:, operation], None)
    return x


def with_label_consistency(forward: Callable[[list[torch.Tensor]], list[Output]], inputs: list[torch.Tensor],
                           probabilities: Sequence[float], rgb_range: float) -> list[Output]:
    """Run `forward` on perturbed batches, and undo the operations on its outputs.

    probabilities: for each batch that of each operation; a batch with 0 is passed as it is. Feature maps are those of the
    perturbed inputs, with flips and transposes undone.
    """
    drawn = [draw(lr, p) if p else None for lr, p in zip(inputs, probabilities, strict=True)]
    outputs = forward([lr if chosen is None else perturb(lr, chosen, rgb_range) for lr, chosen in zip(inputs, drawn)])
    return [output if chosen is None else
            Output(restore(output.sr, chosen, rgb_range), [restore_features(x, chosen) for x in output.features])
            for output, chosen in zip(outputs, drawn)]


def _apply(operation, images, chosen, rgb_range):
    if operation == TRANSPOSE and images.shape[2] != images.shape[3]:
        if chosen.any() != chosen.all():
            raise ValueError(f"only some images of {images.shape[3]} x {images.shape[2]} pixels are to be transposed: the "
                             "results would have different sizes")
        return images.transpose(2, 3) if chosen.all() else images
    other = (rgb_range - images if operation == INVERT else images.flip(3) if operation == FLIP_HORIZONTAL
             else images.flip(2) if operation == FLIP_VERTICAL else images.transpose(2, 3))
    return torch.where(chosen.view(-1, 1, 1, 1), other, images)


class LabelConsistency(Term):
    """LC: L1(S, T_lc), where T_lc is the teacher's output for the perturbed LR, with the operations undone (DCKD).

    p: probability of each of the four operations. Images are in [0, rgb_range].
    """

    needs = frozenset({"teacher_net"})

    def __init__(self, p: float = 0.5, rgb_range: float = 255):
        super().__init__()
        self.p, self.rgb_range = p, rgb_range

    @torch.no_grad()
    def target(self, inputs: LossInputs) -> torch.Tensor:
        """Compute T_lc."""
        chosen = draw(inputs.lr, self.p)
        sr = inputs.forward(inputs.teacher_net, perturb(inputs.lr, chosen, self.rgb_range))
        return restore(sr, chosen, self.rgb_range)

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute L1(S, T_lc), a scalar."""
        return F.l1_loss(inputs.student.sr, self.target(inputs))


TERMS = {"LC": LabelConsistency}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags."""
    return LabelConsistency(p=context.args.lc_p, rgb_range=context.args.rgb_range)
