"""Feature distillation of the maps of --features: FAKD's transforms beside spatial affinity (He et al., ICIP 2020).

Each is L1(transform(student), transform(teacher)), mean over elements, summed over the maps.
"""
import torch.nn.functional as F
from system.distributed import all_gather
from system.errors import UserError
from torch import nn

from loss.affinity import pool
from loss.step import Term, images_together, require_equal_widths


def channel_affinity(x):
    """B x C x H x W -> B x C x C, cosine similarity of channels (norm + 1e-8)."""
    rows = x.flatten(2)
    rows = rows / (rows.norm(dim=2, keepdim=True) + 1e-8)
    return rows @ rows.transpose(1, 2)


def instance_affinity(x):
    """B x C x H x W -> B x B, inner products of whole maps, each row divided by its norm (Tung and Mori, ICCV 2019).

    Under several processes the rows of this one's images, the columns those of all.
    """
    rows = x.flatten(1)
    return F.normalize(rows @ all_gather(rows).T, dim=1)


def attention(x):
    """B x C x H x W -> B x HW, squares summed over channels, over their norm + 1e-6 (Zagoruyko and Komodakis, ICLR 2017)."""
    energy = x.pow(2).sum(1).flatten(1)
    return energy / (energy.norm(dim=1, keepdim=True) + 1e-6)


def mean_distances(x):
    """B x C x H x W -> B x HW x HW, |m_i - m_j| of the positions' means over channels."""
    means = x.mean(1).flatten(1)
    return (means[:, :, None] - means[:, None, :]).abs()


def flow(first, second):
    """Two maps B x C x H x W -> B x C x C, their product over the positions / HW (Yim et al., CVPR 2017)."""
    return first.flatten(2) @ second.flatten(2).transpose(1, 2) / first[0, 0].numel()


class FeatureTerm(Term):
    """L1 between transforms of single maps."""
    needs = frozenset({"teacher", "features"})

    def __init__(self, setting):
        super().__init__(setting)
        self.args = setting.args

    def transform(self, x):
        raise NotImplementedError

    def forward(self, step):
        pairs = ((step.student.features[index].float(), step.teacher.features[index].float())
                 for index in self.args.features)
        return sum(F.l1_loss(self.transform(student), self.transform(teacher)) for student, teacher in pairs)


class ChannelAffinity(FeatureTerm):
    """CA. Needs networks of equal width."""

    def __init__(self, setting):
        super().__init__(setting)
        require_equal_widths("CA", setting)

    def transform(self, x):
        return channel_affinity(x)


class InstanceAffinity(FeatureTerm):
    """IA. Needs a batch."""

    def __init__(self, setting):
        super().__init__(setting)
        images, said = images_together(setting.args)
        if images < 2:
            raise UserError(f"IA compares the images of a batch, {said} has one: give 2 or more")

    def transform(self, x):
        return instance_affinity(x)


class AttentionTransfer(FeatureTerm):
    """AT."""

    def transform(self, x):
        return attention(x)


class MaximumMeanDiscrepancy(FeatureTerm):
    """MMD, as FAKD's code calls the distances between the positions' means; of the pooled maps."""

    def transform(self, x):
        return mean_distances(pool(x, self.args))


class FSP(FeatureTerm):
    """FSP: between successive maps of --features. Needs networks of equal width."""

    def __init__(self, setting):
        super().__init__(setting)
        require_equal_widths("FSP", setting)
        if len(self.args.features) < 2:
            raise UserError(f"FSP compares successive maps, --features {self.args.features} holds only one")

    def forward(self, step):
        student, teacher = ([features[index].float() for index in self.args.features]
                            for features in (step.student.features, step.teacher.features))
        return sum(F.l1_loss(flow(*student[k:k + 2]), flow(*teacher[k:k + 2])) for k in range(len(student) - 1))


class FitNet(FeatureTerm):
    """fitnet: the maps themselves, through a learned 1x1 convolution where widths differ (Romero et al., ICLR 2015)."""

    def __init__(self, setting):
        super().__init__(setting)
        width = setting.student.n_feats
        others = sorted({teacher.n_feats for teacher in setting.teachers} - {width})
        self.adapters = nn.ModuleDict({f"{index}_to_{other}": nn.Conv2d(width, other, 1)
                                       for other in others for index in self.args.features})

    def forward(self, step):
        total = 0
        for index in self.args.features:
            student, teacher = step.student.features[index].float(), step.teacher.features[index].float()
            if student.shape[1] != teacher.shape[1]:
                student = self.adapters[f"{index}_to_{teacher.shape[1]}"](student)
            total = total + F.l1_loss(student, teacher)
        return total
