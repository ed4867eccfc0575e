"""Contrast in the features of a frozen network: near to the teacher, far from bad images.

CSD: Towards Compact Single Image Super-Resolution via Contrastive Self-distillation (Wang et al., IJCAI 2021).
"""
import torch
import torch.nn.functional as F
from system.distributed import all_gather, all_reduce_mean, global_batch_size, local_shard
from system.errors import UserError
from torch.utils.checkpoint import checkpoint

from loss.frozen import once
from loss.step import Term, images_together
from loss.vgg import SMALLEST, shared_vgg, without_graph

WEIGHTS = 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1
EPSILON = 1e-7


def contrast_l1(student, teacher, negatives, chosen=None):
    """sum_i w_i d(f_i(T), f_i(S)) / (sum_k d(f_i(S), f_i(N_k)) + 1e-7), d the mean absolute difference.

    student, teacher: for each level i, N x C x H x W; negatives: M x C x H x W. chosen, K x N: the k-th negative of each of
    the N anchors; without it all M are negatives of every anchor. The differences to the negatives are not kept for the
    backward pass but computed again there: K of them would take more memory than the networks.
    """
    total = 0
    for weight, s, t, n in zip(WEIGHTS, student, teacher, negatives, strict=True):
        rows = all_of(n, s) if chosen is None else chosen.to(s.device, non_blocking=True)
        apart = sum(checkpoint(distance, s, n, row, use_reentrant=False, preserve_rng_state=False) for row in rows)
        total = total + weight * all_reduce_mean(F.l1_loss(s, t)) / (all_reduce_mean(apart) + EPSILON)
    return total


def contrast_cos(student, teacher, negatives, chosen=None):
    """sum_i w_i (-log(exp(cos(T, S)) / (exp(c) + 1e-7))), arguments as of `contrast_l1`; as published:

    cos(T, S) is the cosine along the batch axis, mean over the other axes; in c, samples are flattened and normalised, their
    elementwise products with each negative are summed over the negatives and averaged over samples and elements.
    """
    total = 0
    for weight, s, t, n in zip(WEIGHTS, student, teacher, negatives, strict=True):
        near = cosine_along_batch(t, s).mean()
        rows = all_of(n, s) if chosen is None else chosen.to(s.device, non_blocking=True)
        products = F.normalize(s.flatten(1)) @ F.normalize(n.flatten(1)).T
        apart = all_reduce_mean(products.gather(1, rows.T).sum() / s.numel())
        total = total + weight * (torch.log(apart.exp() + EPSILON) - near)
    return total


def cosine_along_batch(first, second):
    """N x C x H x W each -> C x H x W."""
    products, *squares = (all_reduce_mean((x * y).sum(0)) for x, y in ((first, second), (first, first), (second, second)))
    return products / (squares[0] * squares[1]).clamp_min(1e-16).sqrt()  # as F.cosine_similarity has it


def all_of(negatives, anchors):
    """K x N, each of the K negatives for every one of the N anchors."""
    return torch.arange(len(negatives), device=anchors.device)[:, None].expand(-1, len(anchors))


def distance(anchors, others, row):
    return F.l1_loss(anchors, others[row])


def others_of_the_batch(images, count):
    """count x N: for each of `images` anchors that many different others, never itself, each as often a negative as any."""
    shifts = 1 + torch.randperm(images - 1)[:count]
    return (torch.arange(images) + shifts[:, None]) % images


def student_maps(vgg, step):
    return once(step, "vgg_student", lambda: vgg(step.student.sr))


class ContrastiveLoss(Term):
    """CSD: contrast in VGG-19's relu1_1, relu2_1, relu3_1, relu4_1, relu5_1, with --d_func L1 or cos.

    Negatives are --neg_num other LR images of the batch, upsampled by the bicubic kernel that LR was made with. Departs from
    the published code: there an image can be its own negative, VGG gets [0, 255] without ImageNet's normalisation, and a
    graph of teacher and negatives is kept that nothing uses.
    """
    needs = frozenset({"teacher"})
    smallest = SMALLEST

    def __init__(self, setting):
        super().__init__(setting)
        self.count = setting.args.neg_num
        self.contrast = {"L1": contrast_l1, "cos": contrast_cos}[setting.args.d_func]
        self.require_batch(*images_together(setting.args))
        object.__setattr__(self, "vgg", shared_vgg(setting))

    def require_batch(self, size, said):
        if self.count > size - 1:
            remedy = f" or --neg_num {size - 1} at most" if size > 1 else ""
            raise UserError(f"CSD: --neg_num {self.count} negatives are other images of the batch, too many for "
                            f"{said}: give --batch_size {self.count + 1} or more{remedy}")

    def others(self, step):
        """Maps of the teacher's output and of upsampled LR images of the batch, and which of these are whose negatives."""
        self.require_batch(global_batch_size(len(step.lr)), f"a batch of {global_batch_size(len(step.lr))}")
        chosen = local_shard(others_of_the_batch(global_batch_size(len(step.lr)), self.count).T).T
        used, chosen = chosen.unique(return_inverse=True)
        lr = all_gather(step.lr)[used.to(step.lr.device, non_blocking=True)]
        upsampled = F.interpolate(lr, size=step.student.sr.shape[-2:], mode="bicubic", antialias=True)
        return *without_graph(self.vgg, step.teacher.sr, upsampled), chosen

    def forward(self, step):
        return self.contrast(student_maps(self.vgg, step), *self.others(step))


class Perceptual(Term):
    """VGG: sum_i w_i L1(f_i(S), f_i(HR)) over the levels and weights of CSD, the perceptual loss of pix2pixHD

    (Johnson et al., ECCV 2016; Wang et al., CVPR 2018). EDSR's code takes the squared difference of one layer, conv5_4.
    """
    needs = frozenset({"hr"})
    smallest = SMALLEST

    def __init__(self, setting):
        super().__init__(setting)
        object.__setattr__(self, "vgg", shared_vgg(setting))

    def forward(self, step):
        (truth,) = without_graph(self.vgg, step.hr)
        student = student_maps(self.vgg, step)
        return sum(weight * F.l1_loss(s, t) for weight, s, t in zip(WEIGHTS, student, truth, strict=True))


class TeacherDataSupervision(Term):
    """T_DS: L1(T, HR), the teacher's own supervision where it is trained along; 0 from epoch --t_l_remove on."""
    needs = frozenset({"hr", "teacher", "teacher_graph"})

    def __init__(self, setting):
        super().__init__(setting)
        if not setting.args.width_mult:
            raise UserError("T_DS trains the teacher, which is fixed here: it needs a student that is a slice of it, "
                            "--width_mult")
        self.end = setting.args.t_l_remove * setting.args.test_every

    def forward(self, step):
        if step.iteration >= self.end:
            return step.hr.new_zeros(())
        return F.l1_loss(step.teacher_graph, step.hr)
