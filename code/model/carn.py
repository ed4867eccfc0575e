"""CARN, CARN-M: Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network (Ahn et al., ECCV 2018)."""
import torch
from torch import nn

from model.common import DIV2K_MEAN, ImageConv, MeanShift, Network, conv, upsampler_scale


class Shift(nn.Module):
    """Adds `sign` x the DIV2K mean, for images in [0, 1]."""

    def __init__(self, sign):
        super().__init__()
        self.shifter = MeanShift(sign, trainable=False)
        with torch.no_grad():
            self.shifter.bias.copy_(sign * torch.tensor(DIV2K_MEAN))

    def forward(self, x):
        return self.shifter(x)


class Body(nn.Module):
    """Layers one after the other, under the name that they have in the released files."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return self.body(x)


class ResidualBlock(Body):
    """Two 3x3 convolutions, in CARN-M in groups and then a 1x1; ReLU after the sum with the input too."""

    def __init__(self, n_feats, group):
        mix = [nn.ReLU(inplace=True), conv(n_feats, n_feats, 1)] if group > 1 else []
        super().__init__(grouped(n_feats, n_feats, group), nn.ReLU(inplace=True), grouped(n_feats, n_feats, group), *mix)

    def forward(self, x):
        return torch.relu(self.body(x) + x)


class CascadingBlock(nn.Module):
    """Three residual blocks, in CARN-M one used three times, each fused with all that went before."""

    def __init__(self, n_feats, group):
        super().__init__()
        self.b1 = ResidualBlock(n_feats, group)
        if group == 1:
            self.b2, self.b3 = ResidualBlock(n_feats, group), ResidualBlock(n_feats, group)
        self.c1, self.c2, self.c3 = fusions(n_feats)
        self.group = group

    def forward(self, x):
        blocks = (self.b1, self.b2, self.b3) if self.group == 1 else (self.b1, self.b1, self.b1)
        return cascade(x, blocks, (self.c1, self.c2, self.c3))[-1]


class CARN(Network):
    """For one scale, or for those of `multi_scale` with a tail for each, of which `scale` is the one in use.

    `group` > 1 is CARN-M. multi_scale=True is (2, 3, 4), as in the published configurations. No long skip connection.
    """
    native_range = 1

    def __init__(self, scale, n_feats=64, group=1, multi_scale=False):
        super().__init__()
        scales = (2, 3, 4) if multi_scale is True else tuple(multi_scale or ())
        if scales and scale not in scales:
            raise ValueError(f"scale {scale} is none of the scales {scales} of multi_scale")
        if n_feats % group:
            raise ValueError(f"n_feats {n_feats} cannot be split into {group} groups")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_feats=n_feats, group=group, multi_scale=scales or False)
        # 1 entry, 2 in each of 3 x 3 residual blocks; a tail's convolutions and the exit reach 2 LR pixels at any scale
        self.receptive_field = 21
        self.sub_mean, self.add_mean = Shift(-1), Shift(1)
        self.entry = ImageConv(3, n_feats)
        self.b1, self.b2, self.b3 = (CascadingBlock(n_feats, group) for _ in range(3))
        self.c1, self.c2, self.c3 = fusions(n_feats)
        tails = {f"up{s}": s for s in scales} or {"up": scale}
        self.upsample = nn.ModuleDict({name: upsampler(s, n_feats, group) for name, s in tails.items()})
        self.exit = ImageConv(n_feats, 3)

    def super_resolve(self, x, features):
        maps = cascade(self.entry(self.sub_mean(x)), (self.b1, self.b2, self.b3), (self.c1, self.c2, self.c3))
        upsample = self.upsample[f"up{self.scale}" if self.config["multi_scale"] else "up"]
        return self.add_mean(self.exit(upsample(maps[-1]))), maps


class CARN_M(CARN):
    """CARN for mobile devices: grouped convolutions, shared residual blocks."""

    def __init__(self, scale, n_feats=64, group=4, multi_scale=False):
        super().__init__(scale, n_feats, group, multi_scale)


def cascade(x, blocks, fusions):
    """Each block sees a fusion of all outputs before it -> [x, the fusion after each block]."""
    outputs, fused = [x], [x]
    for block, fuse in zip(blocks, fusions):
        outputs.append(block(fused[-1]))
        fused.append(fuse(torch.cat(outputs, 1)))
    return fused


def fusions(n_feats):
    return [Body(conv(n * n_feats, n_feats, 1), nn.ReLU(inplace=True)) for n in (2, 3, 4)]


def grouped(in_channels, out_channels, group):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=group)


def upsampler(scale, n_feats, group):
    layers = []
    for factor in [3] if scale == 3 else [2] * (scale.bit_length() - 1):
        layers += [grouped(n_feats, factor * factor * n_feats, group), nn.ReLU(inplace=True), nn.PixelShuffle(factor)]
    return Body(*layers)


def recognise(state):
    """(config, state) of a CARN as its authors released it, else None; no scale in it where the file holds several."""
    return _sizes(state) if "b1.b2.body.0.weight" in state else None


def recognise_m(state):
    """(config, state) of a CARN-M as its authors released it, else None; the scale as in `recognise`."""
    return _sizes(state) if "b1.b1.body.4.weight" in state else None


def _sizes(state):
    if not {"entry.weight", "b1.b1.body.0.weight", "b1.c1.body.0.weight"} <= state.keys():
        return None
    n_feats = state["entry.weight"].shape[0]
    config = dict(n_feats=n_feats, group=n_feats // state["b1.b1.body.0.weight"].shape[1], multi_scale=False)
    scales = tuple(scale for scale in (2, 3, 4, 8) if f"upsample.up{scale}.body.0.weight" in state)
    if len(scales) == 1:
        config["scale"] = scales[0]
    if scales:
        return dict(config, multi_scale=scales), _with_shifts(state)
    scale = upsampler_scale(state, "upsample.up.body.", n_feats)
    return (dict(config, scale=scale), _with_shifts(state)) if scale else None


def _with_shifts(state):
    """The state with the constant mean shifts where the file does without."""
    return {**{f"{name}.{key}": value for name, sign in (("sub_mean", -1), ("add_mean", 1))
               for key, value in Shift(sign).state_dict().items()}, **state}
