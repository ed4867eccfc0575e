"""Label consistency: a network shown a transformed image should answer with the transformed answer.

Four invertible operations, in this order: colour inversion rgb_range - x, horizontal flip, vertical flip, transpose. `draw`
chooses them per image, `perturb` applies them, `restore` undoes them on the output. DUKD (Zhang et al., 2023) perturbs the
student's input (--label_consistency), DCKD (Zhou et al., AAAI 2025) the teacher's (LC). DUKD's published code undoes the
operations in the order in which it applied them, wrong wherever a transpose meets a flip; here it is the reverse order.

The student's feature maps are then those of the perturbed input, moved back to where the teacher's are; where the colours
were inverted, what it sees remains an inverted image.
"""
import torch
import torch.nn.functional as F
from system.distributed import global_batch_size, local_shard

from loss.step import Output, Term

INVERT, FLIP_HORIZONTAL, FLIP_VERTICAL, TRANSPOSE = range(4)


def draw(images, p):
    """N x 4 booleans on the CPU, each true with probability p: which operations which of the images N x 3 x H x W gets.

    Where H and W differ all images are transposed or none, as the results must have one size. Random numbers are those of
    torch's generator on the CPU.
    """
    chosen = torch.rand(global_batch_size(len(images)), 4) < p
    if images.shape[2] != images.shape[3]:
        chosen[:, TRANSPOSE] = chosen[:1, TRANSPOSE]
    return local_shard(chosen)


def perturb(images, chosen, rgb_range):
    """Applies the chosen operations to images in [0, rgb_range]."""
    chosen = chosen.to(images.device, non_blocking=True)
    for operation in range(4):
        images = _apply(operation, images, chosen[:, operation], rgb_range)
    return images


def restore(images, chosen, rgb_range):
    """Undoes `perturb`: each operation is its own inverse."""
    chosen = chosen.to(images.device, non_blocking=True)
    for operation in reversed(range(4)):
        images = _apply(operation, images, chosen[:, operation], rgb_range)
    return images


def restore_map(x, chosen):
    """Undoes what moved the positions of a feature map, N x C x H x W; a map of an image of inverted colours stays one."""
    chosen = chosen.to(x.device, non_blocking=True)
    for operation in (TRANSPOSE, FLIP_VERTICAL, FLIP_HORIZONTAL):
        x = _apply(operation, x, chosen[:, operation], None)
    return x


def on_perturbed(run, inputs, p, rgb_range):
    """The Outputs of run(inputs), a list of batches, for perturbed ones, mapped back; each operation has probability p.

    With p 0 those of the inputs.
    """
    if not p:
        return run(inputs)
    drawn = [draw(lr, p) for lr in inputs]
    outputs = run([perturb(lr, chosen, rgb_range) for lr, chosen in zip(inputs, drawn)])
    return [Output(restore(output.sr, chosen, rgb_range), [restore_map(x, chosen) for x in output.features])
            for output, chosen in zip(outputs, drawn)]


def _apply(operation, images, chosen, rgb_range):
    if operation == TRANSPOSE and images.shape[2] != images.shape[3]:
        if chosen.any() != chosen.all():
            raise ValueError(f"some images of {images.shape[3]} x {images.shape[2]} transposed, some not: no common size")
        return images.transpose(2, 3) if chosen.all() else images
    other = (rgb_range - images if operation == INVERT else images.flip(3) if operation == FLIP_HORIZONTAL
             else images.flip(2) if operation == FLIP_VERTICAL else images.transpose(2, 3))
    return torch.where(chosen.view(-1, 1, 1, 1), other, images)


class LabelConsistency(Term):
    """LC: L1(S, T_lc), T_lc the teacher's output on the perturbed LR, mapped back; each operation has probability --lc_p."""
    needs = frozenset({"teacher_net"})

    def __init__(self, setting):
        super().__init__(setting)
        self.p, self.rgb_range = setting.args.lc_p, setting.args.rgb_range

    @torch.no_grad()
    def target(self, step):
        chosen = draw(step.lr, self.p)
        sr = step.run(step.teacher_net, perturb(step.lr, chosen, self.rgb_range))
        return restore(sr, chosen, self.rgb_range)

    def forward(self, step):
        return F.l1_loss(step.student.sr, self.target(step))
