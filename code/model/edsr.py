"""EDSR: Enhanced Deep Residual Networks for Single Image Super-Resolution (Lim et al., CVPRW 2017)."""
import torch
from torch import nn

from model.common import ImageConv, MeanShift, Network, ResBlock, Upsampler, conv, forward_features
from model.layout import Layout, Rules, State, count, upsampler_scale


class EDSR(Network):
    """EDSR; 16 blocks of 64 channels are EDSR-baseline, 32 of 256 with res_scale 0.1 the full network.

    res_scale, which checkpoints of other code bases do not hold, is by default that of the published networks of this depth:
    0.1 for 32 blocks, whatever their width, 1 for 16. For other depths it is 0.1 from 256 channels on, else 1.
    """

    def __init__(self, scale: int, n_resblocks: int = 16, n_feats: int = 64, res_scale: float | None = None):
        super().__init__()
        if res_scale is None:
            res_scale = {32: 0.1, 16: 1.0}.get(n_resblocks, 0.1 if n_feats >= 256 else 1.0)
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_resblocks=n_resblocks, n_feats=n_feats, res_scale=res_scale)
        # head 1, each block 2, end of the body 1; the tail's convolutions together 2 LR pixels at any scale
        self.receptive_field = 2 * n_resblocks + 4
        self.feature_layers = n_resblocks // 3, 2 * n_resblocks // 3
        self.sub_mean = MeanShift(-1)
        self.head = nn.Sequential(ImageConv(3, n_feats))
        self.body = nn.Sequential(*[ResBlock(n_feats, res_scale) for _ in range(n_resblocks)], conv(n_feats, n_feats))
        self.tail = nn.Sequential(Upsampler(scale, n_feats), ImageConv(n_feats, 3))
        self.add_mean = MeanShift(1)

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        head = self.head(self.sub_mean(x))
        x, middle = forward_features(self.body[:-1], head, self.feature_layers if features else ())
        x = self.body[-1](x) + head  # f3 includes the long skip connection, as in FAKD's code
        return self.add_mean(self.tail(x)), [head, *middle, x]


def read_config(state: State) -> dict:
    """Read the arguments of EDSR from names and shapes, which do not determine res_scale."""
    n_feats = state["head.0.weight"].shape[0]
    return dict(scale=upsampler_scale(state, "tail.0", n_feats), n_resblocks=count(state, "body.*.body.0.weight"),
                n_feats=n_feats)


def fakd_rules(state: State) -> Rules:
    """Join the three parts into which FAKD divides the body."""
    layers = [f"body{part}.{n}" for part in (1, 2, 3) for n in range(count(state, f"body{part}.*"))]
    return [(layer, f"body.{n}") for n, layer in enumerate(layers)]


def block_rules(end: str, state: State) -> list[tuple[str, str]]:
    """Rename the convolutions of the blocks, and the one at the end of the body."""
    return [("body.*.conv1", "body.*.body.0"), ("body.*.conv2", "body.*.body.2"),
            (end, f"body.{count(state, 'body.*.conv1')}")]


def basicsr_rules(state: State) -> Rules:
    """Rename BasicSR's parameters; its network takes [0, 1] and multiplies by 255, so that weights are the same."""
    return [*block_rules("conv_after_body", state), ("conv_first", "head.0"), ("upsample", "tail.0"),
            ("conv_last", "tail.1")]


def csd_rules(state: State) -> Rules:
    """Rename the parameters of CSD's slimmable EDSR."""
    return [*block_rules("body_conv", state), ("head", "head.0"), ("tail_conv", "tail.1"),
            *[(f"upsampler.blocks.{n}", f"tail.0.{2 * n}") for n in range(3)]]


LAYOUTS = (
    Layout("EDSR-PyTorch", ("head.0.weight", "body.0.body.0.weight", "tail.0.0.weight", "tail.1.weight"), read_config),
    Layout("FAKD", ("head.0.weight", "body1.0.body.0.weight", "body2.0.body.0.weight", "body3.0.body.0.weight",
                    "tail.0.0.weight", "tail.1.weight"), read_config, fakd_rules),
    Layout("BasicSR", ("conv_first.weight", "body.0.conv1.weight", "conv_after_body.weight", "upsample.0.weight",
                       "conv_last.weight"), read_config, basicsr_rules),
    Layout("CSD", ("head.weight", "body.0.conv1.weight", "body_conv.weight", "upsampler.blocks.0.weight",
                   "tail_conv.weight"), read_config, csd_rules),
)
