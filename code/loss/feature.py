"""Feature distillation: the transforms of FAKD other than spatial affinity (He et al., ICIP 2020).

Each term is the sum over the feature maps `features` of L1(transform(student), transform(teacher)), mean over elements. The
four feature maps of a network are: 0 after the head, 1 and 2 at a third and two thirds of the body, 3 at its end; those of
NAFNet and Restormer are described there.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from loss.affinity import pool
from loss.term import Context, LossInputs, Term
from system.distributed import all_gather
from system.errors import UserError


def channel_affinity(x: torch.Tensor) -> torch.Tensor:
    """Compute the cosine similarities of channels (norm + 1e-8): B x C x H x W -> B x C x C."""
    rows = x.flatten(2)
    rows = rows / (rows.norm(dim=2, keepdim=True) + 1e-8)
    return rows @ rows.transpose(1, 2)


def instance_affinity(x: torch.Tensor) -> torch.Tensor:
    """Compute inner products of flattened feature maps, each row divided by its norm: B x C x H x W -> B x B.

    In several processes the rows are those of the local shard, the columns those of the global batch.
    Source: Tung and Mori, ICCV 2019.
    """
    rows = x.flatten(1)
    return F.normalize(rows @ all_gather(rows).T, dim=1)


def attention(x: torch.Tensor) -> torch.Tensor:
    """Sum squares over channels and divide by their norm + 1e-6: B x C x H x W -> B x HW.

    Source: Zagoruyko and Komodakis, ICLR 2017.
    """
    energy = x.pow(2).sum(1).flatten(1)
    return energy / (energy.norm(dim=1, keepdim=True) + 1e-6)


def mean_distances(x: torch.Tensor) -> torch.Tensor:
    """Compute |m_i - m_j| of the means m over channels at all pairs of positions: B x C x H x W -> B x HW x HW."""
    means = x.mean(1).flatten(1)
    return (means[:, :, None] - means[:, None, :]).abs()


def fsp_matrix(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compute the flow of the solution procedure between two feature maps: B x C x H x W each -> B x C x C.

    Source: Yim et al., CVPR 2017.
    """
    return first.flatten(2) @ second.flatten(2).transpose(1, 2) / first[0, 0].numel()


class FeatureTerm(Term):
    """L1 between transforms of single feature maps."""

    needs = frozenset({"teacher", "features"})

    def __init__(self, features: Sequence[int] = (1, 2, 3)):
        super().__init__()
        self.features = tuple(features)

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Transform a feature map B x C x H x W before student and teacher are compared."""
        raise NotImplementedError

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the L1 between transformed feature maps, summed over `features`."""
        pairs = ((inputs.student.features[index].float(), inputs.teacher.features[index].float())
                 for index in self.features)
        return sum(F.l1_loss(self.transform(student), self.transform(teacher)) for student, teacher in pairs)


class ChannelAffinity(FeatureTerm):
    """CA: channel affinity; both networks need the same number of channels."""

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the channel affinity B x C x C."""
        return channel_affinity(x)


class InstanceAffinity(FeatureTerm):
    """IA: instance affinity; needs two images or more."""

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the instance affinity B x B."""
        return instance_affinity(x)


class AttentionTransfer(FeatureTerm):
    """AT: attention transfer."""

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the attention B x HW."""
        return attention(x)


class MaximumMeanDiscrepancy(FeatureTerm):
    """MMD: FAKD's name for the distances between the channel means of pooled feature maps."""

    def __init__(self, features: Sequence[int] = (1, 2, 3), pool_size: int = 1, pool_type: str = "max"):
        super().__init__(features)
        self.pool_size, self.pool_type = pool_size, pool_type

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the distances B x hw x hw of pooled feature maps h x w."""
        return mean_distances(pool(x, self.pool_size, self.pool_type))


class FSP(FeatureTerm):
    """FSP: flow of the solution procedure between successive feature maps; both networks need the same channels."""

    def __init__(self, features: Sequence[int] = (1, 2, 3)):
        super().__init__(features)
        if len(self.features) < 2:
            raise ValueError(f"FSP compares successive feature maps, features {list(self.features)} is only one")

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the L1 between the FSP matrices of successive feature maps, summed over the pairs."""
        student, teacher = ([features[index].float() for index in self.features]
                            for features in (inputs.student.features, inputs.teacher.features))
        return sum(F.l1_loss(fsp_matrix(*student[k:k + 2]), fsp_matrix(*teacher[k:k + 2]))
                   for k in range(len(student) - 1))


class FitNet(FeatureTerm):
    """fitnet: the feature maps themselves (Romero et al., ICLR 2015).

    Where the numbers of channels differ, a learned 1x1 convolution maps the student's to the teacher's; this adapter is an
    addition to FAKD, whose code compares equal widths only. student_feats, and for each teacher teacher_feats: the number of
    channels, or those of the four feature maps.
    """

    def __init__(self, features: Sequence[int] = (1, 2, 3), student_feats: int | Sequence[int] = 64,
                 teacher_feats: Sequence[int | Sequence[int]] = (64,)):
        super().__init__(features)
        student, *teachers = (4 * (feats,) if isinstance(feats, int) else feats for feats in (student_feats, *teacher_feats))
        self.adapters = nn.ModuleDict({
            f"{index}_to_{width}": nn.Conv2d(student[index], width, 1)
            for width in sorted({width for teacher in teachers for width in teacher}) for index in self.features
            if width != student[index] and width in [teacher[index] for teacher in teachers]})

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the L1 between feature maps, of the same width after the adapters, summed over `features`."""
        total = 0
        for index in self.features:
            student, teacher = inputs.student.features[index].float(), inputs.teacher.features[index].float()
            if student.shape[1] != teacher.shape[1]:
                student = self.adapters[f"{index}_to_{teacher.shape[1]}"](student)
            total = total + F.l1_loss(student, teacher)
        return total


TERMS = {"CA": ChannelAffinity, "IA": InstanceAffinity, "FSP": FSP, "AT": AttentionTransfer, "fitnet": FitNet,
         "MMD": MaximumMeanDiscrepancy}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags; raises UserError where it does not fit the networks or the batch."""
    args, settings = context.args, dict(features=context.args.features)
    if name in ("CA", "FSP"):
        for teacher in context.teachers:
            for index in args.features:
                own, other = (net.feature_channels[index] for net in (context.student, teacher))
                if own != other:
                    raise UserError(f"{name} compares channel with channel, but the student's feature maps have {own} "
                                    f"channels and the teacher's {other}: choose a term that does not, such as SA, AT or "
                                    "fitnet")
    if name == "IA":
        images, flags = context.images_per_step()
        if images < 2:
            raise UserError(f"IA compares the images of a batch, {flags} has one: give 2 or more")
    if name == "MMD":
        settings |= dict(pool_size=args.pool_size, pool_type=args.pool_type)
    if name == "fitnet":
        settings |= dict(student_feats=context.student.feature_channels,
                         teacher_feats=[teacher.feature_channels for teacher in context.teachers])
    try:
        return TERMS[name](**settings)
    except ValueError as error:
        raise UserError(f"--features {args.features}: {error}") from None
