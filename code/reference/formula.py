"""Comparisons of single operations: affinity loss, SAN's pooling and attention, inference on whole images and in tiles."""
import copy
from functools import partial
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from inference import chop, upscale
from loss.affinity import affinity_l1
from model import san
from model.edsr import EDSR
from reference.comparison import Comparison, convolution_arithmetic

CHANNELS = 64
BATCH_SIZE = 16
SAN_SIZES = dict(n_resgroups=2, n_resblocks=2)  # instead of 20 and 10, which repeat the same blocks
EDSR_SIZES = dict(n_resblocks=16, n_feats=32)  # the preset EDSR_baseline with half of its channels
SHAVE = 10  # overlap of the quarters in EDSR-PyTorch's forward_chop, in LR pixels
MIN_SIZE = 160000  # LR pixels below which forward_chop does not split
MEMORY = 5e8  # bytes for the tiles of this implementation


def san_pooling(side: int, device: torch.device) -> Comparison:
    """Compare SAN's covariance pooling of one feature map, forward pass."""
    x = torch.rand(1, CHANNELS, side, side, device=device)
    return Comparison(f"{CHANNELS} channels", lambda: (san.covariance(x),), lambda: (reference_covariance(x),), 1e-5)


def reference_covariance(x: torch.Tensor) -> torch.Tensor:
    """Compute x (I / M - 1 / M^2) x^T with the M x M centring matrix, M = H W, as in SAN's published code."""
    m = x.shape[2] * x.shape[3]
    centring = torch.eye(m, device=x.device) / m - torch.ones(m, m, device=x.device) / m**2
    x = x.flatten(2)
    return x @ centring @ x.mT


def san_forward(side: int, device: torch.device) -> Comparison:
    """Compare SAN x2 with few blocks, inference."""
    net = san.SAN(2, n_feats=CHANNELS, **SAN_SIZES).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)  # the non-local blocks of a new SAN are multiplied by zeros
    net.to(device)
    lr = 255 * torch.rand(1, 3, side, side, device=device)

    @torch.no_grad()
    def ours():
        return net(lr),

    def reference():
        with mock.patch.multiple(san, covariance=reference_covariance, attend=reference_attend):
            return ours()

    return Comparison("{n_resgroups} x {n_resblocks} x {n_feats}".format(**net.config), ours, reference, 1e-5,
                      arithmetic=convolution_arithmetic(device))


def reference_attend(inner: torch.Tensor) -> torch.Tensor:
    """Compute `san.attend`, softmax attention over the positions, with the matrix of all scores."""
    n, channels, height, width = inner.shape
    query, key, value = inner.split(channels // 3, 1)
    key, value = (F.max_pool2d(x, 2).flatten(2) for x in (key, value))
    weights = (query.flatten(2).mT @ key).softmax(2)
    return (weights @ value.mT).mT.reshape(n, channels // 3, height, width)


def affinity(side: int, device: torch.device, batch_size: int = 1) -> Comparison:
    """Compare the spatial affinity loss of two feature maps and its gradient."""
    student, teacher = (torch.randn(batch_size, CHANNELS, side, side, device=device) for _ in range(2))
    student.requires_grad_()
    # The gradient is a sum of signs of differences of similarities, and signs of differences near 0 depend on rounding.
    # Therefore the teacher's similarities are near 0.9 and -0.9, while those of the student are near 0.
    teacher = teacher * 0.3 + torch.randn(batch_size, 1, side, side, device=device).sign()

    def with_gradient(loss):
        value = loss(student, teacher)
        return value.detach(), *torch.autograd.grad(value, student)

    return Comparison(f"{batch_size} x {CHANNELS} channels", lambda: with_gradient(affinity_l1),
                      lambda: with_gradient(reference_affinity), 1e-5)


def reference_affinity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the L1 between the N x N cosine similarities, N = H W."""
    rows = [F.normalize(x.flatten(2), dim=1) for x in (student, teacher)]
    return (rows[0].mT @ rows[0] - rows[1].mT @ rows[1]).abs().mean()


affinity_batch = partial(affinity, batch_size=BATCH_SIZE)  # as in training; a single feature map shows how the cost grows


def whole_image(side: int, device: torch.device) -> Comparison:
    """Compare EDSR x2 on a whole image, as in a test, with a call of the network on a contiguous image."""
    net = EDSR(2, **EDSR_SIZES).eval().to(device)
    ours = copy.deepcopy(net).to(memory_format=torch.channels_last)
    lr = 255 * torch.rand(1, 3, side, side, device=device)
    return Comparison("EDSR {n_resblocks} x {n_feats}".format(**net.config), lambda: (upscale(ours, lr),),
                      lambda: (torch.no_grad()(net)(lr),), 1e-5, arithmetic=convolution_arithmetic(device))


def chop_edsr(side: int, device: torch.device) -> Comparison:
    """Compare EDSR x2 in overlapping tiles with the four-way split of EDSR-PyTorch, whose result has errors at the seams."""
    net = EDSR(2, **EDSR_SIZES).eval().to(device)
    lr = 255 * torch.rand(1, 3, side, side, device=device)
    chop(net, lr[..., :8, :8], memory=MEMORY)  # a warm-up, which measures the memory per pixel of the network

    def seams(reference, exact):
        (split, _), (sr, memory) = reference, exact
        return (f"the four-way split differs by up to {(split[0] - sr[0]).abs().max():.2g} grey levels at its seams (with "
                f"untrained weights); the whole image at once takes {memory / 1e6:,.0f} MB")

    ours, reference, exact = (torch.no_grad()(lambda forward=forward: (forward(lr),))
                              for forward in (partial(chop, net, memory=MEMORY), partial(reference_chop, net), net))
    return Comparison("EDSR {n_resblocks} x {n_feats}".format(**net.config), ours, reference, 1e-5, exact=exact,
                      remark=seams, arithmetic=convolution_arithmetic(device))


def reference_chop(net: nn.Module, lr: torch.Tensor) -> torch.Tensor:
    """Upscale in quarters that overlap by SHAVE pixels, recursively down to MIN_SIZE, as EDSR-PyTorch's forward_chop."""
    height, width = lr.shape[2:]
    top, left = height // 2, width // 2
    tall, wide = top + SHAVE, left + SHAVE
    forward = net if tall * wide < MIN_SIZE else partial(reference_chop, net)
    quarters = [[forward(lr[..., rows, columns]) for columns in (slice(wide), slice(-wide, None))]
                for rows in (slice(tall), slice(-tall, None))]
    rows = slice(net.scale * top), slice(-net.scale * (height - top), None)
    columns = slice(net.scale * left), slice(-net.scale * (width - left), None)
    return torch.cat([torch.cat([sr[..., y, x] for sr, x in zip(half, columns)], 3) for half, y in zip(quarters, rows)], 2)
