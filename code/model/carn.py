"""CARN, CARN-M: Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network (Ahn et al., ECCV 2018)."""
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from model.common import MEAN, ImageConv, MeanShift, Network, conv, upsampling_factors
from model.layout import Layout, State, upsampler_scale


class Shift(nn.Module):
    """Add `sign` x the DIV2K mean to images in [0, 1]."""

    def __init__(self, sign: int):
        super().__init__()
        self.shifter = MeanShift(sign, trainable=False)
        with torch.no_grad():
            self.shifter.bias.copy_(sign * MEAN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shift N x 3 x H x W."""
        return self.shifter(x)


class Body(nn.Module):
    """Layers one after the other, with the prefix `body` in their names."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers."""
        return self.body(x)


class ResidualBlock(Body):
    """Two 3x3 convolutions plus the input, then ReLU; in CARN-M grouped convolutions, followed by a 1x1 convolution."""

    def __init__(self, n_feats: int, group: int):
        pointwise = [nn.ReLU(inplace=True), conv(n_feats, n_feats, 1)] if group > 1 else []
        super().__init__(grouped(n_feats, n_feats, group), nn.ReLU(inplace=True), grouped(n_feats, n_feats, group),
                         *pointwise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        return torch.relu(self.body(x) + x)


class CascadingBlock(nn.Module):
    """Three residual blocks with cascading connections; in CARN-M the three share their weights."""

    def __init__(self, n_feats: int, group: int):
        super().__init__()
        self.b1 = ResidualBlock(n_feats, group)
        if group == 1:
            self.b2, self.b3 = ResidualBlock(n_feats, group), ResidualBlock(n_feats, group)
        self.c1, self.c2, self.c3 = fusions(n_feats)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        blocks = (self.b1, self.b2, self.b3) if self.group == 1 else (self.b1, self.b1, self.b1)
        return cascade(x, blocks, (self.c1, self.c2, self.c3))[-1]


class CARN(Network):
    """CARN for one scale, or with an upsampler for each scale of `multi_scale`, of which `scale` is the one in use.

    multi_scale=True is (2, 3, 4), as published. group: groups of the convolutions, 4 in CARN-M. There is no long skip
    connection. Raises ValueError for sizes that do not fit together.
    """

    native_range = 1

    def __init__(self, scale: int, n_feats: int = 64, group: int = 1, multi_scale: bool | Sequence[int] = False):
        super().__init__()
        scales = (2, 3, 4) if multi_scale is True else tuple(multi_scale or ())
        if scales and scale not in scales:
            raise ValueError(f"scale {scale} is not among the scales {scales} of multi_scale")
        if n_feats % group:
            raise ValueError(f"n_feats {n_feats} cannot be split into {group} groups")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_feats=n_feats, group=group, multi_scale=scales or False)
        # entry 1, each of 3 x 3 residual blocks 2; convolutions of an upsampler and exit together 2 LR pixels at any scale
        self.receptive_field = 21
        self.sub_mean, self.add_mean = Shift(-1), Shift(1)
        self.entry = ImageConv(3, n_feats)
        self.b1, self.b2, self.b3 = (CascadingBlock(n_feats, group) for _ in range(3))
        self.c1, self.c2, self.c3 = fusions(n_feats)
        upsamplers = {f"up{s}": s for s in scales} or {"up": scale}
        self.upsample = nn.ModuleDict({name: upsampler(s, n_feats, group) for name, s in upsamplers.items()})
        self.exit = ImageConv(n_feats, 3)

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        feature_maps = cascade(self.entry(self.sub_mean(x)), (self.b1, self.b2, self.b3),
                               (self.c1, self.c2, self.c3))
        upsample = self.upsample[f"up{self.scale}" if self.config["multi_scale"] else "up"]
        return self.add_mean(self.exit(upsample(feature_maps[-1]))), feature_maps


class CARN_M(CARN):
    """CARN-M, for mobile devices: grouped convolutions and shared residual blocks."""

    def __init__(self, scale: int, n_feats: int = 64, group: int = 4, multi_scale: bool | Sequence[int] = False):
        super().__init__(scale, n_feats, group, multi_scale)


def cascade(x: torch.Tensor, blocks: Iterable[nn.Module], fusions: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Apply blocks with cascading connections: the input of each is a fusion of x and the outputs of all blocks before.

    Returns x and the fusion after each block, N x n_feats x H x W each.
    """
    outputs, fused = [x], [x]
    for block, fuse in zip(blocks, fusions):
        outputs.append(block(fused[-1]))
        fused.append(fuse(torch.cat(outputs, 1)))
    return fused


def fusions(n_feats: int) -> list[nn.Module]:
    """Build the 1x1 convolutions that fuse 2, 3 and 4 concatenated feature maps."""
    return [Body(conv(n * n_feats, n_feats, 1), nn.ReLU(inplace=True)) for n in (2, 3, 4)]


def grouped(in_channels: int, out_channels: int, group: int) -> nn.Conv2d:
    """Build a grouped 3x3 convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=group)


def upsampler(scale: int, n_feats: int, group: int) -> nn.Module:
    """Build the grouped sub-pixel convolutions of a scale, each followed by ReLU."""
    layers = []
    for factor in upsampling_factors(scale):
        layers += [grouped(n_feats, factor * factor * n_feats, group), nn.ReLU(inplace=True), nn.PixelShuffle(factor)]
    return Body(*layers)


def read_config(state: State) -> dict:
    """Read the arguments of CARN or CARN-M from names and shapes; without `scale` where there are several upsamplers."""
    n_feats = state["entry.weight"].shape[0]
    scales = tuple(scale for scale in (2, 3, 4, 8) if f"upsample.up{scale}.body.0.weight" in state)
    config = dict(n_feats=n_feats, group=n_feats // state["b1.b1.body.0.weight"].shape[1], multi_scale=scales or False)
    if len(scales) > 1:
        return config
    return dict(config, scale=scales[0] if scales else upsampler_scale(state, "upsample.up.body", n_feats))


SHARED_NAMES = "entry.weight", "b1.b1.body.0.weight", "b1.c1.body.0.weight", "c1.body.0.weight", "exit.weight"
LAYOUTS = (Layout("the authors", (*SHARED_NAMES, "b1.b2.body.0.weight", "b2.b2.body.0.weight"), read_config),)
LAYOUTS_M = (Layout("the authors", (*SHARED_NAMES, "b1.b1.body.4.weight", "b2.b1.body.4.weight"), read_config),)
