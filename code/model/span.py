"""SPAN: Swift Parameter-free Attention Network for Efficient Super-Resolution (Wan et al., CVPRW 2024)."""
import math

import torch
from torch import nn

from model.common import DIV2K_MEAN, ImageConv, Network, conv
from model.layout import Layout, Rules, State
from model.reparameterisation import conv3x3

N_BLOCKS = 6


class SPAB(nn.Module):
    """Three convolutions, whose output plus the block's input is multiplied by a symmetric activation of that output."""

    def __init__(self, n_feats: int, reparameterise: str):
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (conv3x3(n_feats, n_feats, reparameterise) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the block on N x n_feats x H x W; return its output and that of its first convolution, activated."""
        first = nn.functional.silu(self.c1_r(x))
        out = self.c3_r(nn.functional.silu(self.c2_r(first)))
        return (out + x) * (torch.sigmoid(out) - 0.5), first


class SPAN(Network):
    """SPAN; its 3x3 convolutions are re-parameterised for training by Conv3XC, as published.

    reparameterise: that block, another one of model/reparameterisation.py, or `none`, the form for testing. img_range: the
    maximum of the images inside the network, from which the mean is subtracted; no parameter determines it.
    """

    native_range = 1

    def __init__(self, scale: int, n_feats: int = 48, img_range: float = 255, reparameterise: str = "Conv3XC"):
        super().__init__()
        self.scale, self.n_feats, self.img_range = scale, n_feats, img_range
        self.config = dict(scale=scale, n_feats=n_feats, img_range=img_range, reparameterise=reparameterise)
        self.receptive_field = 3 * N_BLOCKS + 3  # conv_1, conv_2 and the upsampler beside the blocks
        self.register_buffer("mean", torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_1 = conv3x3(3, n_feats, reparameterise, image=True)
        for number in range(1, N_BLOCKS + 1):
            self.add_module(f"block_{number}", SPAB(n_feats, reparameterise))
        self.conv_cat = conv(4 * n_feats, n_feats, 1)
        self.conv_2 = conv3x3(n_feats, n_feats, reparameterise)
        self.upsampler = nn.Sequential(ImageConv(n_feats, 3 * scale * scale), nn.PixelShuffle(scale))

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        head = self.conv_1((x - self.mean) * self.img_range)
        outputs = [head]
        for number in range(1, N_BLOCKS + 1):
            output, first = getattr(self, f"block_{number}")(outputs[-1])
            outputs.append(output)
        end = self.conv_cat(torch.cat([head, self.conv_2(outputs[-1]), outputs[1], first], 1))
        return self.upsampler(end), [head, outputs[N_BLOCKS // 3], outputs[2 * N_BLOCKS // 3], end]


def rules(state: State) -> Rules:
    """Drop the fused kernels of a training form, which may be outdated; without branches they are the weights."""
    training = is_training_form(state)
    return [(name.removesuffix(".weight"), None if training else name.removesuffix(".eval_conv.weight"))
            for name in state if name.endswith(".eval_conv.weight")]


def is_training_form(state: State) -> bool:
    """Return whether a state holds the branches of Conv3XC."""
    return any(name.endswith(".sk.weight") for name in state)


def read_config(state: State) -> dict:
    """Read the arguments of SPAN from names and shapes; raises ValueError where the scale is not an integer."""
    channels = state["upsampler.0.weight"].shape[0]
    scale = math.isqrt(channels // 3)
    if scale < 1 or channels != 3 * scale * scale:
        raise ValueError(f"{channels} channels before the upsampler")
    return dict(scale=scale, n_feats=state["conv_cat.weight"].shape[0],
                reparameterise="Conv3XC" if is_training_form(state) else "none")


# in the training form, and fused, with kernels named eval_conv as the authors' or named as the convolutions
LAYOUTS = (Layout("the authors", ("conv_cat.weight", "conv_cat.bias", "upsampler.0.weight", "upsampler.0.bias"), read_config,
                  rules),)
