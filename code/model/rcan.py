"""RCAN: Image Super-Resolution Using Very Deep Residual Channel Attention Networks (Zhang et al., ECCV 2018)."""
from torch import nn

from model.common import (
    ImageConv,
    MeanShift,
    Network,
    Upsampler,
    conv,
    count,
    forward_features,
    rename,
    squeeze_and_excite,
    upsampler_scale,
    with_default_means,
)


class ChannelAttention(nn.Module):
    """Scales each channel by a sigmoid of what all channels' means over the image say."""

    def __init__(self, n_feats, reduction):
        super().__init__()
        self.conv_du = squeeze_and_excite(n_feats, reduction)

    def forward(self, x):
        return x * self.conv_du(x.mean((2, 3), keepdim=True))


class RCAB(nn.Module):
    """Residual channel attention block."""

    def __init__(self, n_feats, reduction):
        super().__init__()
        self.body = nn.Sequential(conv(n_feats, n_feats), nn.ReLU(inplace=True), conv(n_feats, n_feats),
                                  ChannelAttention(n_feats, reduction))

    def forward(self, x):
        return x + self.body(x)


class ResidualGroup(nn.Module):
    def __init__(self, n_resblocks, n_feats, reduction):
        super().__init__()
        self.body = nn.Sequential(*[RCAB(n_feats, reduction) for _ in range(n_resblocks)], conv(n_feats, n_feats))

    def forward(self, x):
        return x + self.body(x)


class RCAN(Network):
    """Its receptive field is the whole image: channel attention pools over it, so a tile is not the same as the whole."""

    def __init__(self, scale, n_resgroups=10, n_resblocks=6, n_feats=64, reduction=16):
        super().__init__()
        if reduction > n_feats:
            raise ValueError(f"reduction {reduction} of {n_feats} channels leaves none")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_resgroups=n_resgroups, n_resblocks=n_resblocks, n_feats=n_feats,
                           reduction=reduction)
        self.feature_layers = round(n_resgroups / 3), round(2 * n_resgroups / 3)  # 3 and 7 of 10, as in FAKD
        self.sub_mean = MeanShift(-1, trainable=True)
        self.head = nn.Sequential(ImageConv(3, n_feats))
        self.body = nn.Sequential(*[ResidualGroup(n_resblocks, n_feats, reduction) for _ in range(n_resgroups)],
                                  conv(n_feats, n_feats))
        self.tail = nn.Sequential(Upsampler(scale, n_feats), ImageConv(n_feats, 3))
        self.add_mean = MeanShift(1, trainable=True)

    def super_resolve(self, x, features):
        head = self.head(self.sub_mean(x))
        x, middle = forward_features(self.body[:-1], head, self.feature_layers if features else ())
        x = self.body[-1](x) + head  # map 3 contains the long skip connection, as in FAKD's code
        return self.add_mean(self.tail(x)), [head, *middle, x]


def recognise(state):
    """(config, state in this file's names) of an RCAN in any layout that it was released in, else None.

    RCAN as it is here; FAKD with numbered groups; BasicSR (input in [0, 1] x 255: the same network).
    """
    if "body_tail.weight" in state:  # FAKD
        groups = count(state, "body_group*.")
        state = rename(state, *[(f"body_group{n}.", f"body.{n}.") for n in range(groups)],
                       ("body_tail.", f"body.{groups}."))
    elif "body.0.residual_group.0.rcab.0.weight" in state:  # BasicSR
        groups, blocks = count(state, "body.*.conv.weight"), count(state, "body.0.residual_group.*.rcab.0.weight")
        state = rename(
            state, *[(f"body.{g}.residual_group.{b}.rcab.{theirs}", f"body.{g}.body.{b}.body.{ours}")
                     for g in range(groups) for b in range(blocks)
                     for theirs, ours in (("0.", "0."), ("2.", "2."), ("3.attention.1.", "3.conv_du.0."),
                                          ("3.attention.3.", "3.conv_du.2."))],
            *[(f"body.{g}.conv.", f"body.{g}.body.{blocks}.") for g in range(groups)],
            ("conv_after_body.", f"body.{groups}."), ("conv_first.", "head.0."), ("upsample.", "tail.0."),
            ("conv_last.", "tail.1."))
    squeeze = state.get("body.0.body.0.body.3.conv_du.0.weight")
    if squeeze is None or not {"head.0.weight", "tail.0.0.weight"} <= state.keys():
        return None
    n_feats = state["head.0.weight"].shape[0]
    scale = upsampler_scale(state, "tail.0.", n_feats)
    config = dict(scale=scale, n_resgroups=count(state, "body.*.body.0.body.0.weight"),
                  n_resblocks=count(state, "body.0.body.*.body.0.weight"), n_feats=n_feats,
                  reduction=n_feats // squeeze.shape[0])
    return (config, with_default_means(state)) if scale else None
