"""RCAN: Image Super-Resolution Using Very Deep Residual Channel Attention Networks (Zhang et al., ECCV 2018)."""
import torch
from torch import nn

from model.common import ImageConv, MeanShift, Network, Upsampler, conv, forward_features, squeeze_and_excite
from model.layout import Layout, Rules, State, count, upsampler_scale


class ChannelAttention(nn.Module):
    """Channel attention: each channel times a factor in [0, 1] that is computed from the spatial means of all channels."""

    def __init__(self, n_feats: int, reduction: int):
        super().__init__()
        self.conv_du = squeeze_and_excite(n_feats, reduction)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rescale the channels of N x n_feats x H x W."""
        return x * self.conv_du(x.mean((2, 3), keepdim=True))


class RCAB(nn.Module):
    """Residual channel attention block."""

    def __init__(self, n_feats: int, reduction: int):
        super().__init__()
        self.body = nn.Sequential(conv(n_feats, n_feats), nn.ReLU(inplace=True), conv(n_feats, n_feats),
                                  ChannelAttention(n_feats, reduction))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        return x + self.body(x)


class ResidualGroup(nn.Module):
    """Residual group: blocks and a convolution, plus the input."""

    def __init__(self, n_resblocks: int, n_feats: int, reduction: int):
        super().__init__()
        self.body = nn.Sequential(*[RCAB(n_feats, reduction) for _ in range(n_resblocks)], conv(n_feats, n_feats))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        return x + self.body(x)


class RCAN(Network):
    """RCAN; its receptive field is the whole image, over which channel attention pools, so tiling changes the result.

    Raises ValueError for a reduction that leaves no channels.
    """

    def __init__(self, scale: int, n_resgroups: int = 10, n_resblocks: int = 6, n_feats: int = 64, reduction: int = 16):
        super().__init__()
        if reduction > n_feats:
            raise ValueError(f"reduction {reduction} of {n_feats} channels leaves none")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_resgroups=n_resgroups, n_resblocks=n_resblocks, n_feats=n_feats,
                           reduction=reduction)
        self.feature_layers = round(n_resgroups / 3), round(2 * n_resgroups / 3)  # 3 and 7 of 10, as in FAKD
        self.sub_mean = MeanShift(-1)
        self.head = nn.Sequential(ImageConv(3, n_feats))
        self.body = nn.Sequential(*[ResidualGroup(n_resblocks, n_feats, reduction) for _ in range(n_resgroups)],
                                  conv(n_feats, n_feats))
        self.tail = nn.Sequential(Upsampler(scale, n_feats), ImageConv(n_feats, 3))
        self.add_mean = MeanShift(1)

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        head = self.head(self.sub_mean(x))
        x, middle = forward_features(self.body[:-1], head, self.feature_layers if features else ())
        x = self.body[-1](x) + head  # f3 includes the long skip connection, as in FAKD's code
        return self.add_mean(self.tail(x)), [head, *middle, x]


def read_config(state: State) -> dict:
    """Read the arguments of RCAN from names and shapes."""
    n_feats = state["head.0.weight"].shape[0]
    return dict(scale=upsampler_scale(state, "tail.0", n_feats), n_resgroups=count(state, "body.*.body.0.body.0.weight"),
                n_resblocks=count(state, "body.0.body.*.body.0.weight"), n_feats=n_feats,
                reduction=n_feats // state["body.0.body.0.body.3.conv_du.0.weight"].shape[0])


def fakd_rules(state: State) -> Rules:
    """Rename FAKD's groups and the convolution at the end of the body."""
    return [("body_group*", "body.*"), ("body_tail", f"body.{count(state, 'body_group*')}")]


def basicsr_rules(state: State) -> Rules:
    """Rename BasicSR's parameters; its network takes [0, 1] and multiplies by 255, so that weights are the same."""
    return [("body.*.residual_group.*.rcab.3.attention.1", "body.*.body.*.body.3.conv_du.0"),
            ("body.*.residual_group.*.rcab.3.attention.3", "body.*.body.*.body.3.conv_du.2"),
            ("body.*.residual_group.*.rcab", "body.*.body.*.body"),
            ("body.*.conv", f"body.*.body.{count(state, 'body.0.residual_group.*')}"),
            ("conv_after_body", f"body.{count(state, 'body.*')}"), ("conv_first", "head.0"), ("upsample", "tail.0"),
            ("conv_last", "tail.1")]


def csd_rules(state: State) -> Rules:
    """Rename the parameters of CSD's slimmable RCAN."""
    return [("body.*.body.*.caLayer.conv_du.0", "body.*.body.*.body.3.conv_du.0"),
            ("body.*.body.*.caLayer.conv_du.1", "body.*.body.*.body.3.conv_du.2"),
            ("body.*.body.*.body.1", "body.*.body.*.body.2"),
            ("body.*.conv", f"body.*.body.{count(state, 'body.0.body.*')}"),
            ("body_conv", f"body.{count(state, 'body.*')}"), ("head_conv", "head.0"), ("tail_conv", "tail.1"),
            *[(f"upsampler.blocks.{n}", f"tail.0.{2 * n}") for n in range(3)]]


LAYOUTS = (
    Layout("EDSR-PyTorch", ("head.0.weight", "body.0.body.0.body.0.weight", "body.0.body.0.body.2.weight",
                            "body.0.body.0.body.3.conv_du.0.weight", "tail.0.0.weight", "tail.1.weight"), read_config),
    Layout("FAKD", ("head.0.weight", "body_group0.body.0.body.0.weight", "body_group0.body.0.body.3.conv_du.0.weight",
                    "body_tail.weight", "tail.0.0.weight", "tail.1.weight"), read_config, fakd_rules),
    Layout("BasicSR", ("conv_first.weight", "body.0.residual_group.0.rcab.0.weight",
                       "body.0.residual_group.0.rcab.3.attention.1.weight", "body.0.conv.weight", "conv_after_body.weight",
                       "upsample.0.weight", "conv_last.weight"), read_config, basicsr_rules),
    Layout("CSD", ("head_conv.weight", "body.0.body.0.body.0.weight", "body.0.body.0.caLayer.conv_du.0.weight",
                   "body.0.conv.weight", "body_conv.weight", "upsampler.blocks.0.weight", "tail_conv.weight"), read_config,
           csd_rules),
)
