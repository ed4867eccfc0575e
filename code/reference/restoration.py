"""Comparisons of training steps of NAFNet and Restormer with their published formulas, in the contiguous memory format."""
import copy
from unittest import mock

import torch
from torch.nn import functional as F

from model import nafnet, restormer
from model.common import Network
from reference.comparison import Comparison, convolution_arithmetic

BATCH_SIZE = {"cuda": 16, "cpu": 2}
NAFNET = dict(n_feats=16, enc_blk_nums=(1, 1, 1, 4))
RESTORMER = dict(n_feats=24, num_blocks=(1, 1, 1, 2), num_refinement_blocks=1)
TOLERANCE = 1e-4  # of gradients, which are sums over all pixels


def nafnet_step(side: int, device: torch.device) -> Comparison:
    """Compare forward and backward passes of NAFNet, with random factors of the branches, which are zero in a new one."""
    net = nafnet.NAFNet(**NAFNET)
    for name, parameter in net.named_parameters():
        if name.endswith(("beta", "gamma")):
            torch.nn.init.normal_(parameter, std=0.5)
    return compare(net, side, device, "NAFNet {n_feats}", (nafnet.LayerNorm2d, "forward", reference_norm))


def restormer_step(side: int, device: torch.device) -> Comparison:
    """Compare forward and backward passes of Restormer."""
    return compare(restormer.Restormer(**RESTORMER), side, device, "Restormer {n_feats}",
                   (restormer.LayerNorm2d, "forward", lambda layer, x: reference_norm(layer.body, x)),
                   (restormer, "attend", reference_attend))


def compare(net: Network, side: int, device: torch.device, setting: str, *replacements: tuple) -> Comparison:
    """Compare a network in channels_last with a contiguous copy in which objects' attributes are replaced.

    replacements: (object, name of the attribute, other value).
    """
    ours, reference = (copy.deepcopy(net).to(device, memory_format=memory_format)
                       for memory_format in (torch.channels_last, torch.contiguous_format))
    lr = 255 * torch.rand(BATCH_SIZE[device.type], 3, side, side, device=device)

    def forward_backward(net, x):
        sr = net(x)
        return sr.detach(), *torch.autograd.grad(sr, list(net.parameters()), torch.ones_like(sr))

    def by_formulas():
        patches = [mock.patch.object(*replacement) for replacement in replacements]
        for patch in patches:
            patch.start()
        try:
            return forward_backward(reference, lr)
        finally:
            for patch in patches:
                patch.stop()

    channels_last = lr.contiguous(memory_format=torch.channels_last)
    return Comparison(f"{setting.format(**net.config)}, {len(lr)} images", lambda: forward_backward(ours, channels_last),
                      by_formulas, TOLERANCE, arithmetic=convolution_arithmetic(device))


def reference_norm(layer: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalise the channels of N x C x H x W by the formula."""
    centred = x - x.mean(1, keepdim=True)
    x = centred / (centred.pow(2).mean(1, keepdim=True) + layer.eps).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def reference_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: torch.Tensor,
                     projection: torch.Tensor) -> torch.Tensor:
    """Compute `restormer.attend` with normalised queries and keys, and the projection after the attention."""
    shape, heads = value.shape, len(temperature)
    query, key, value = (x.reshape(len(x), heads, -1, x.shape[2] * x.shape[3]) for x in (query, key, value))
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    return F.conv2d((((query @ key.mT) * temperature).softmax(-1) @ value).reshape(shape), projection)
