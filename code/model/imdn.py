"""IMDN: Lightweight Image Super-Resolution with Information Multi-distillation Network (Hui et al., ACM MM 2019)."""
import math

import torch
from torch import nn

from model.common import ImageConv, Network, conv, count, forward_features, squeeze_and_excite

SLOPE = 0.05  # of the leaky ReLUs


class ContrastAttention(nn.Module):
    """Scales each channel by a sigmoid of what all channels' standard deviations plus means over the image say."""

    def __init__(self, n_feats):
        super().__init__()
        self.conv_du = squeeze_and_excite(n_feats, 16)

    def forward(self, x):
        # torch's own deviation: its gradient is 0 where a channel is constant; that of a square root would be infinite
        deviation, mean = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
        return x * self.conv_du(deviation + mean)


class IMDB(nn.Module):
    """Information multi-distillation block: each convolution's first quarter is kept, the rest goes on to the next one."""

    def __init__(self, n_feats):
        super().__init__()
        kept = n_feats // 4
        self.split = kept, n_feats - kept
        self.c1 = conv(n_feats, n_feats)
        self.c2 = conv(n_feats - kept, n_feats)
        self.c3 = conv(n_feats - kept, n_feats)
        self.c4 = conv(n_feats - kept, kept)
        self.cca = ContrastAttention(4 * kept)
        self.c5 = conv(4 * kept, n_feats, 1)

    def forward(self, x):
        kept, rest = [], x
        for layer in (self.c1, self.c2, self.c3):
            first, rest = nn.functional.leaky_relu(layer(rest), SLOPE).split(self.split, 1)
            kept.append(first)
        return self.c5(self.cca(torch.cat([*kept, self.c4(rest)], 1))) + x


class IMDN(Network):
    """Its receptive field is the whole image: channel attention looks at it, so a tile is not the same as the whole."""
    native_range = 1

    def __init__(self, scale, n_feats=64, n_modules=6):
        super().__init__()
        if n_feats < 16:
            raise ValueError(f"n_feats {n_feats}: channel attention squeezes 16 channels into one")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_feats=n_feats, n_modules=n_modules)
        self.feature_layers = n_modules // 3, 2 * n_modules // 3
        self.fea_conv = ImageConv(3, n_feats)
        self.numbers = range(1, n_modules + 1)
        for number in self.numbers:
            self.add_module(f"IMDB{number}", IMDB(n_feats))
        self.c = nn.Sequential(conv(n_modules * n_feats, n_feats, 1), nn.LeakyReLU(SLOPE, inplace=True))
        self.LR_conv = conv(n_feats, n_feats)
        self.upsampler = nn.Sequential(ImageConv(n_feats, 3 * scale * scale), nn.PixelShuffle(scale))

    def super_resolve(self, x, features):
        head = self.fea_conv(x)
        blocks = [getattr(self, f"IMDB{number}") for number in self.numbers]
        _, outputs = forward_features(blocks, head, range(len(blocks) + 1))
        end = self.LR_conv(self.c(torch.cat(outputs[1:], 1))) + head
        return self.upsampler(end), [head, *(outputs[tap] for tap in self.feature_layers), end]


def recognise(state):
    """(config, state) of an IMDN as its authors released it, else None."""
    if not {"fea_conv.weight", "IMDB1.c1.weight", "upsampler.0.weight"} <= state.keys():
        return None
    squared, rest = divmod(state["upsampler.0.weight"].shape[0], 3)
    scale = math.isqrt(squared)
    if rest or scale < 1 or scale * scale != squared:
        return None
    n_modules = count(state, "IMDB*.c1.weight") - 1  # numbered from 1
    return dict(scale=scale, n_feats=state["fea_conv.weight"].shape[0], n_modules=n_modules), state
