"""CARN, CARN-M: Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network (Ahn et al., ECCV 2018)."""
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from model.common import MEAN, ImageConv, MeanShift, Network, conv, upsampling_factors
from model.layout import Layout, Rules, State, upsampler_scale

VARIANTS = {"Ahn": 1, "CSD": 255}  # maximum of the images of each


class Shift(nn.Module):
    """Add `sign` x the DIV2K mean to images in [0, 1]."""

    def __init__(self, sign: int):
        super().__init__()
        self.shifter = MeanShift(sign)
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
    """Two 3x3 convolutions plus the input, then ReLU; in CARN-M grouped convolutions, followed by a 1x1 convolution.

    CSD's has no ReLU after the sum.
    """

    def __init__(self, n_feats: int, group: int, variant: str):
        pointwise = [nn.ReLU(inplace=True), conv(n_feats, n_feats, 1)] if group > 1 else []
        super().__init__(grouped(n_feats, n_feats, group), nn.ReLU(inplace=True), grouped(n_feats, n_feats, group),
                         *pointwise)
        self.final_relu = variant != "CSD"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        x = self.body(x) + x
        return torch.relu(x) if self.final_relu else x


class CascadingBlock(nn.Module):
    """Three residual blocks with cascading connections; in CARN-M the three share their weights."""

    def __init__(self, n_feats: int, group: int, variant: str):
        super().__init__()
        self.b1 = ResidualBlock(n_feats, group, variant)
        if group == 1:
            self.b2, self.b3 = ResidualBlock(n_feats, group, variant), ResidualBlock(n_feats, group, variant)
        self.c1, self.c2, self.c3 = fusions(n_feats)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        blocks = (self.b1, self.b2, self.b3) if self.group == 1 else (self.b1, self.b1, self.b1)
        return cascade(x, blocks, (self.c1, self.c2, self.c3))[-1]


class CARN(Network):
    """CARN for one scale, or with an upsampler for each scale of `multi_scale`, of which `scale` is the one in use.

    multi_scale=True is (2, 3, 4), as published. group: groups of the convolutions, 4 in CARN-M. There is no long skip
    connection. carn_variant: `Ahn`, or `CSD` (Wang et al., IJCAI 2021), whose code computes another function with weights of
    the same shapes: no ReLU after the sum of a residual block, none in the upsampler, images in [0, 255]. Raises ValueError
    for sizes that do not fit together.
    """

    def __init__(self, scale: int, n_feats: int = 64, group: int = 1, multi_scale: bool | Sequence[int] = False,
                 carn_variant: str = "Ahn"):
        super().__init__()
        if carn_variant not in VARIANTS:
            raise ValueError(f"carn_variant {carn_variant} is none of {', '.join(VARIANTS)}")
        scales = (2, 3, 4) if multi_scale is True else tuple(multi_scale or ())
        if scales and scale not in scales:
            raise ValueError(f"scale {scale} is not among the scales {scales} of multi_scale")
        if n_feats % group:
            raise ValueError(f"n_feats {n_feats} cannot be split into {group} groups")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_feats=n_feats, group=group, multi_scale=scales or False, carn_variant=carn_variant)
        self.native_range = VARIANTS[carn_variant]
        # entry 1, each of 3 x 3 residual blocks 2; convolutions of an upsampler and exit together 2 LR pixels at any scale
        self.receptive_field = 21
        self.sub_mean, self.add_mean = (MeanShift(sign) if carn_variant == "CSD" else Shift(sign)
                                        for sign in (-1, 1))
        self.entry = ImageConv(3, n_feats)
        self.b1, self.b2, self.b3 = (CascadingBlock(n_feats, group, carn_variant) for _ in range(3))
        self.c1, self.c2, self.c3 = fusions(n_feats)
        upsamplers = {f"up{s}": s for s in scales} or {"up": scale}
        self.upsample = nn.ModuleDict({name: upsampler(s, n_feats, group, carn_variant)
                                       for name, s in upsamplers.items()})
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
        del self.config["carn_variant"]  # not an argument of this class


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


def upsampler(scale: int, n_feats: int, group: int, variant: str) -> nn.Module:
    """Build the grouped sub-pixel convolutions of a scale, each followed by ReLU, in CSD's variant by nothing."""
    layers = []
    for factor in upsampling_factors(scale):
        activation = nn.Identity() if variant == "CSD" else nn.ReLU(inplace=True)
        layers += [grouped(n_feats, factor * factor * n_feats, group), activation, nn.PixelShuffle(factor)]
    return Body(*layers)


def read_config(state: State) -> dict:
    """Read the arguments of CARN or CARN-M from names and shapes; without `scale` where there are several upsamplers."""
    n_feats = state["entry.weight"].shape[0]
    scales = tuple(scale for scale in (2, 3, 4, 8) if f"upsample.up{scale}.body.0.weight" in state)
    group = n_feats // state["b1.b1.body.0.weight"].shape[1]
    config = dict(n_feats=n_feats, group=group, multi_scale=scales or False)
    if group == 1:
        config["carn_variant"] = "CSD" if "sub_mean.weight" in state else "Ahn"
    if len(scales) > 1:
        return config
    return dict(config, scale=scales[0] if scales else upsampler_scale(state, "upsample.up.body", n_feats))


def csd_rules(state: State) -> Rules:
    """Rename the parameters of CSD's slimmable CARN."""
    return [("b*.b*.conv1", "b*.b*.body.0"), ("b*.b*.conv2", "b*.b*.body.2"), ("b*.c*.conv", "b*.c*.body.0"),
            ("c*.conv", "c*.body.0"), *[(f"upsample.blocks.{n}", f"upsample.up.body.{3 * n}") for n in range(3)]]


def read_csd_config(state: State) -> dict:
    """Read the arguments of CSD's CARN, given its renamed parameters."""
    return {**read_config(state), "carn_variant": "CSD"}


SHARED_NAMES = "entry.weight", "b1.b1.body.0.weight", "b1.c1.body.0.weight", "c1.body.0.weight", "exit.weight"
LAYOUTS = (
    Layout("the authors", (*SHARED_NAMES, "b1.b2.body.0.weight", "b2.b2.body.0.weight"), read_config),
    Layout("CSD", ("entry.weight", "b1.b1.conv1.weight", "b1.b2.conv1.weight", "b1.c1.conv.weight", "c1.conv.weight",
                   "upsample.blocks.0.weight", "exit.weight"), read_csd_config, csd_rules),
)
LAYOUTS_M = (Layout("the authors", (*SHARED_NAMES, "b1.b1.body.4.weight", "b2.b1.body.4.weight"), read_config),)
