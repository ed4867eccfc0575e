"""EDSR: Enhanced Deep Residual Networks for Single Image Super-Resolution (Lim et al., CVPRW 2017)."""
from torch import nn

from model.common import (
    ImageConv,
    MeanShift,
    Network,
    ResBlock,
    Upsampler,
    conv,
    count,
    forward_features,
    rename,
    upsampler_scale,
    with_default_means,
)


class EDSR(Network):
    def __init__(self, scale, n_resblocks=16, n_feats=64, res_scale=None):
        super().__init__()
        if res_scale is None:  # no file of others says it; 0.1 is what the 256 wide published networks were trained with
            res_scale = 0.1 if n_feats >= 256 else 1.0
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_resblocks=n_resblocks, n_feats=n_feats, res_scale=res_scale)
        # 1 head, 2 a block, 1 body end; the tail's convolutions together reach 2 LR pixels at any scale
        self.receptive_field = 2 * n_resblocks + 4
        self.feature_layers = n_resblocks // 3, 2 * n_resblocks // 3
        self.sub_mean = MeanShift(-1, trainable=False)
        self.head = nn.Sequential(ImageConv(3, n_feats))
        self.body = nn.Sequential(*[ResBlock(n_feats, res_scale) for _ in range(n_resblocks)], conv(n_feats, n_feats))
        self.tail = nn.Sequential(Upsampler(scale, n_feats), ImageConv(n_feats, 3))
        self.add_mean = MeanShift(1, trainable=False)

    def super_resolve(self, x, features):
        head = self.head(self.sub_mean(x))
        x, middle = forward_features(self.body[:-1], head, self.feature_layers if features else ())
        x = self.body[-1](x) + head  # map 3 contains the long skip connection, as in FAKD's code
        return self.add_mean(self.tail(x)), [head, *middle, x]


def recognise(state):
    """(config, state in this file's names) of an EDSR in any layout that it was released in, else None.

    EDSR-PyTorch as it is here; FAKD with the body cut in three; BasicSR (input in [0, 1] x 255: the same network); CSD's
    slimmable EDSR.
    """
    if "body1.0.body.0.weight" in state:  # FAKD
        first = count(state, "body1.*.body.0.weight")
        second = first + count(state, "body2.*.body.0.weight")
        state = rename(state, *[(f"body{part}.{n}.", f"body.{start + n}.") for part, start, end in
                                ((1, 0, first), (2, first, second), (3, second, second + count(state, "body3.*.")))
                                for n in range(end - start)])
    elif "body.0.conv1.weight" in state and "conv_after_body.weight" in state:  # BasicSR
        blocks = count(state, "body.*.conv1.weight")
        state = rename(
            state, *_blocks(blocks), ("conv_after_body.", f"body.{blocks}."), ("conv_first.", "head.0."),
            ("upsample.", "tail.0."), ("conv_last.", "tail.1."))
    elif "body.0.conv1.weight" in state and "upsampler.blocks.0.weight" in state:  # CSD
        blocks = count(state, "body.*.conv1.weight")
        state = rename(
            state, *_blocks(blocks), ("body_conv.", f"body.{blocks}."), ("head.", "head.0."),
            *[(f"upsampler.blocks.{n}.", f"tail.0.{2 * n}.") for n in range(3)], ("tail_conv.", "tail.1."))
    if not {"head.0.weight", "body.0.body.0.weight", "tail.0.0.weight", "tail.1.weight"} <= state.keys():
        return None
    n_feats = state["head.0.weight"].shape[0]
    scale = upsampler_scale(state, "tail.0.", n_feats)
    config = dict(scale=scale, n_resblocks=count(state, "body.*.body.0.weight"), n_feats=n_feats)
    return (config, with_default_means(state)) if scale else None


def _blocks(number):
    """Rules from `body.N.conv1` and `conv2` to this file's residual blocks."""
    return [(f"body.{n}.conv{k}.", f"body.{n}.body.{2 * (k - 1)}.") for n in range(number) for k in (1, 2)]
