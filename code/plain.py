"""What benchmark.py compares: formulas as papers and released code write them, beside what this project computes instead.

A comparison is a function of a size and a device that returns a `Pair`, and its line in COMPARISONS.
"""
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn import functional as F

from inference import chop
from loss.affinity import affinity_l1
from model import san
from model.edsr import EDSR

CHANNELS = 64
POSITIONS = 16 * 48 * 48  # of the maps in a batch for the affinity: 16 images of 48 x 48, 4 of 96 x 96
SAN_SIZES = dict(n_resgroups=2, n_resblocks=2)  # of 20 and 10: the rest repeats them
EDSR_SIZES = dict(n_resblocks=16, n_feats=64)  # of the template EDSR_baseline


class Pair(NamedTuple):
    """`ours()` and `plain()` -> a tuple of tensors, the same up to `tolerance` x the largest value of each."""
    what: str
    ours: Callable
    plain: Callable
    tolerance: float


def san_pooling(side, device):
    """SAN's covariance of the channels of one map, forward."""
    x = torch.rand(1, CHANNELS, side, side, device=device)
    return Pair(f"1 x {CHANNELS} x {side} x {side}", lambda: (san.covariance(x),), lambda: (plain_covariance(x),), 1e-5)


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

    return Pair("{n_resgroups} x {n_resblocks} x {n_feats}, ".format(**net.config) + f"{side} x {side}", ours, plain, 1e-5)


def plain_gather(inner):
    """`san.gather` with its matrix of all pairs of positions."""
    n, channels, height, width = inner.shape
    query, key, value = inner.split(channels // 3, 1)
    key, value = (F.max_pool2d(x, 2).flatten(2) for x in (key, value))
    pairs = (query.flatten(2).mT @ key).softmax(2)
    return (pairs @ value.mT).mT.reshape(n, channels // 3, height, width)


def affinity(side, device):
    """Spatial affinity of a student's and a teacher's maps: the loss and its gradient."""
    batch = max(1, POSITIONS // side**2)
    student, teacher = (torch.randn(batch, CHANNELS, side, side, device=device) for _ in range(2))
    student.requires_grad_()
    # two kinds of positions, with cosines near 0.9 and -0.9 where the student's are near 0: the gradient is made of signs of
    # differences, and the sign of one as small as the rounding is chance
    teacher = teacher * 0.3 + torch.randn(batch, 1, side, side, device=device).sign()

    def with_gradient(loss):
        value = loss(student, teacher)
        return value.detach(), *torch.autograd.grad(value, student)

    return Pair(f"{batch} x {CHANNELS} x {side} x {side}", lambda: with_gradient(affinity_l1),
                lambda: with_gradient(plain_affinity), 1e-5)


def plain_affinity(student, teacher):
    """L1 between the N x N cosine similarities, N = H W."""
    rows = [F.normalize(x.flatten(2), dim=1) for x in (student, teacher)]
    return (rows[0].mT @ rows[0] - rows[1].mT @ rows[1]).abs().mean()


def chop_edsr(side, device):
    """EDSR_baseline x2 in tiles, against the whole image at once."""
    net = EDSR(2, **EDSR_SIZES).eval().to(device)
    lr = 255 * torch.rand(1, 3, side, side, device=device)

    @torch.no_grad()
    def whole():
        return net(lr),

    return Pair(f"1 x 3 x {side} x {side}", lambda: (chop(net, lr),), whole, 1e-5)


COMPARISONS = {  # name: (comparison, sizes)
    "san_pooling": (san_pooling, (48, 128, 256)),
    "san_forward": (san_forward, (48, 128, 256)),
    "affinity": (affinity, (48, 96, 256)),
    "chop": (chop_edsr, (512,)),
}
