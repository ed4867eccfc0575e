"""Re-parameterised 3x3 convolutions: more parameters for training, a plain convolution for testing, the same function.

A block holds the parameters of several linear layers, whose sum or product is one kernel. The forward pass of training
computes that kernel and convolves once, as in OREPA (Hu et al., CVPR 2022), at nearly the cost of a plain convolution.
"""
import torch
from torch import nn
from torch.nn import functional as F

from model.common import ImageConv, Network, conv
from model.slicing import Slice, inherit

SOBEL, LAPLACIAN = [[1, 0, -1], [2, 0, -2], [1, 0, -1]], [[0, 1, 0], [1, -4, 1], [0, 1, 0]]


class Reparameterised(nn.Module):
    """Base class: a subclass computes the kernel of the equivalent convolution, which pads with zeros, in `kernel`.

    image: the convolution is one from or to an image, which autocast leaves in float32.
    """

    def __init__(self, image: bool = False):
        super().__init__()
        self.image = image

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the bias of the equivalent 3x3 convolution."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve N x C x H x W."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.kernel()
            if self.image:
                return F.conv2d(x.to(weight.dtype), weight, bias, padding=1)
        return F.conv2d(x, weight, bias, padding=1)


class Conv3XC(Reparameterised):
    """The block of SPAN (Wan et al., CVPRW 2024): 1x1, 3x3 and 1x1 convolutions, plus a 1x1 convolution of the input."""

    def __init__(self, in_channels: int, out_channels: int, image: bool = False):
        super().__init__(image)
        self.conv = nn.Sequential(nn.Conv2d(in_channels, 2 * in_channels, 1),
                                  nn.Conv2d(2 * in_channels, 2 * out_channels, 3),
                                  nn.Conv2d(2 * out_channels, out_channels, 1))
        self.sk = nn.Conv2d(in_channels, out_channels, 1)

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the bias of the equivalent 3x3 convolution."""
        first, second, third = self.conv
        weight, bias = compose(*compose(first.weight, first.bias, second.weight, second.bias), third.weight, third.bias)
        return weight + F.pad(self.sk.weight, (1, 1, 1, 1)), bias + self.sk.bias


class ECB(Reparameterised):
    """The edge-oriented convolution block of ECBSR (Zhang et al., ACM MM 2021), initialised as published.

    The sum of a 3x3 convolution, a 1x1 followed by a 3x3 convolution, and scaled Sobel and Laplacian filters of 1x1
    convolutions, whose biases are left out, as these filters map a constant to 0.
    """

    def __init__(self, in_channels: int, out_channels: int, image: bool = False):
        super().__init__(image)
        self.conv3x3 = conv(in_channels, out_channels)
        self.expand, self.squeeze = nn.Conv2d(in_channels, 2 * out_channels, 1), nn.Conv2d(2 * out_channels, out_channels, 3)
        self.edges = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 1, bias=False) for _ in range(3))
        self.scales, self.shifts = (nn.Parameter(1e-3 * torch.randn(3, out_channels)) for _ in range(2))

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the bias of the equivalent 3x3 convolution."""
        weight, bias = compose(self.expand.weight, self.expand.bias, self.squeeze.weight, self.squeeze.bias)
        sobel, laplacian = (weight.new_tensor(mask) for mask in (SOBEL, LAPLACIAN))
        for mask, layer, scale in zip((sobel, sobel.T, laplacian), self.edges, self.scales):
            weight = weight + scale[:, None, None, None] * layer.weight * mask
        return weight + self.conv3x3.weight, bias + self.conv3x3.bias + self.shifts.sum(0)


class DOConv(Reparameterised):
    """DO-Conv (Cao et al., TIP 2022): a 3x3 kernel times a 9 x 9 matrix for each input channel, at first the identity."""

    def __init__(self, in_channels: int, out_channels: int, image: bool = False):
        super().__init__(image)
        plain = conv(in_channels, out_channels)
        self.weight, self.bias = plain.weight, plain.bias
        self.D = nn.Parameter(torch.zeros(in_channels, 9, 9))  # the matrices minus the identity

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the bias of the equivalent 3x3 convolution."""
        return self.weight + torch.einsum("oid,imd->oim", self.weight.flatten(2), self.D).view_as(self.weight), self.bias


BLOCKS = {"Conv3XC": Conv3XC, "ECB": ECB, "DOConv": DOConv}


def conv3x3(in_channels: int, out_channels: int, block: str, image: bool = False) -> nn.Module:
    """Build a 3x3 convolution, re-parameterised by a block of BLOCKS, or plain for `none`; raises ValueError."""
    if block == "none":
        return ImageConv(in_channels, out_channels) if image else conv(in_channels, out_channels)
    if block not in BLOCKS:
        raise ValueError(f"reparameterise {block} is none of none, {', '.join(BLOCKS)}")
    return BLOCKS[block](in_channels, out_channels, image)


def compose(weight: torch.Tensor, bias: torch.Tensor, next_weight: torch.Tensor,
            next_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the convolution that equals two in succession, at least one of them 1x1.

    Padding is zeros before the first one, without any in between.
    """
    equation = "mnxy,niuv->miuv" if next_weight.shape[-1] == 1 else "mnxy,niuv->mixy"
    return torch.einsum(equation, next_weight, weight), next_weight.sum((2, 3)) @ bias + next_bias


@torch.no_grad()
def fuse(net: Network | Slice) -> Network | Slice:
    """Return the network for testing, in which each re-parameterised convolution is a plain one, or `net` if it has none.

    It has weights of its own, so that it is made anew when those of `net` have changed.
    """
    if not any(isinstance(module, Reparameterised) for module in net.modules()):
        return net
    if isinstance(net, Slice):
        net = inherit(type(net.full_network)(**net.config), net.full_network)
    state = net.state_dict()
    for name, module in net.named_modules():
        if isinstance(module, Reparameterised):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state[f"{name}.weight"], state[f"{name}.bias"] = module.kernel()
    fused = type(net)(**{**net.config, "reparameterise": "none"}).to(next(net.parameters()))
    fused.load_state_dict(state)
    fused.rgb_range = net.rgb_range
    return fused.train(net.training)
