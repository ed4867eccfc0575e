"""Formulas and networks, one call of each: affinity, SAN's pooling and attention, a large image in parts."""
from functools import partial
from unittest import mock

import torch
from inference import chop
from loss.affinity import affinity_l1
from model import san
from model.edsr import EDSR
from torch.nn import functional as F

from reference.pair import Pair, of_convolutions

CHANNELS = 64
BATCH = 16
SAN_SIZES = dict(n_resgroups=2, n_resblocks=2)  # of 20 and 10: the rest repeats them
EDSR_SIZES = dict(n_resblocks=16, n_feats=32)  # of the template EDSR_baseline, but for half of its channels
SHAVE = 10  # LR pixels by which EDSR-PyTorch extends the quarters of an image, and LR pixels that it computes at once
AT_ONCE = 160000
MEMORY = 5e8  # bytes that our tiles may take


def san_pooling(side, device):
    """SAN's covariance of the channels of one map, forward."""
    x = torch.rand(1, CHANNELS, side, side, device=device)
    return Pair(f"{CHANNELS} channels", lambda: (san.covariance(x),), lambda: (plain_covariance(x),), 1e-5)


def plain_covariance(x):
    """x (I / M - 1 / M^2) x^T with the M x M centring matrix, M = H W, as the authors' code has it."""
    m = x.shape[2] * x.shape[3]
    centring = torch.eye(m, device=x.device) / m - torch.ones(m, m, device=x.device) / m**2
    x = x.flatten(2)
    return x @ centring @ x.mT


def san_forward(side, device):
    """SAN x2, forward, without gradients."""
    net = san.SAN(2, n_feats=CHANNELS, **SAN_SIZES).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)  # a new SAN's attention is multiplied by zeros
    net.to(device)
    lr = 255 * torch.rand(1, 3, side, side, device=device)

    @torch.no_grad()
    def ours():
        return net(lr),

    def plain():
        with mock.patch.multiple(san, covariance=plain_covariance, gather=plain_gather):
            return ours()

    return Pair("{n_resgroups} x {n_resblocks} x {n_feats}".format(**net.config), ours, plain, 1e-5,
                arithmetic=of_convolutions(device))


def plain_gather(inner):
    """`san.gather` with its matrix of all pairs of positions."""
    n, channels, height, width = inner.shape
    query, key, value = inner.split(channels // 3, 1)
    key, value = (F.max_pool2d(x, 2).flatten(2) for x in (key, value))
    pairs = (query.flatten(2).mT @ key).softmax(2)
    return (pairs @ value.mT).mT.reshape(n, channels // 3, height, width)


def affinity(side, device, batch=1):
    """Spatial affinity of a student's and a teacher's maps: the loss and its gradient."""
    student, teacher = (torch.randn(batch, CHANNELS, side, side, device=device) for _ in range(2))
    student.requires_grad_()
    # two kinds of positions, with cosines near 0.9 and -0.9 where the student's are near 0: the gradient is made of signs of
    # differences, and the sign of one as small as the rounding is chance
    teacher = teacher * 0.3 + torch.randn(batch, 1, side, side, device=device).sign()

    def with_gradient(loss):
        value = loss(student, teacher)
        return value.detach(), *torch.autograd.grad(value, student)

    return Pair(f"{batch} x {CHANNELS} channels", lambda: with_gradient(affinity_l1),
                lambda: with_gradient(plain_affinity), 1e-5)


def plain_affinity(student, teacher):
    """L1 between the N x N cosine similarities, N = H W."""
    rows = [F.normalize(x.flatten(2), dim=1) for x in (student, teacher)]
    return (rows[0].mT @ rows[0] - rows[1].mT @ rows[1]).abs().mean()


affinity_batch = partial(affinity, batch=BATCH)  # a training step's; one map alone shows how cost grows


def chop_edsr(side, device):
    """EDSR x2 on a large image: tiles with halos, against the four-way split of EDSR-PyTorch, whose parts show seams."""
    net = EDSR(2, **EDSR_SIZES).eval().to(device)
    lr = 255 * torch.rand(1, 3, side, side, device=device)
    chop(net, lr[..., :8, :8], memory=MEMORY)  # what it finds out once per network is not the first image's

    def seams(split, at_once):
        (split, _), (sr, memory) = split, at_once
        return (f"the four-way split is off by up to {(split[0] - sr[0]).abs().max():.2g} grey levels at its seams (weights "
                f"untrained); the whole image at once takes {memory / 1e6:,.0f} MB")

    ours, plain, whole = (torch.no_grad()(lambda forward=forward: (forward(lr),))
                          for forward in (partial(chop, net, memory=MEMORY), partial(plain_chop, net), net))
    return Pair("EDSR {n_resblocks} x {n_feats}".format(**net.config), ours, plain, 1e-5, right=whole, remark=seams,
                arithmetic=of_convolutions(device))


def plain_chop(net, lr):
    """Quarters with SHAVE pixels beyond the middle, one after the other, each split again where it is large."""
    height, width = lr.shape[2:]
    top, left = height // 2, width // 2
    tall, wide = top + SHAVE, left + SHAVE
    forward = net if tall * wide < AT_ONCE else partial(plain_chop, net)
    quarters = [[forward(lr[..., rows, columns]) for columns in (slice(wide), slice(-wide, None))]
                for rows in (slice(tall), slice(-tall, None))]
    rows = slice(net.scale * top), slice(-net.scale * (height - top), None)
    columns = slice(net.scale * left), slice(-net.scale * (width - left), None)
    return torch.cat([torch.cat([sr[..., y, x] for sr, x in zip(half, columns)], 3) for half, y in zip(quarters, rows)], 2)
