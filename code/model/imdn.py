"""IMDN: Lightweight Image Super-Resolution with Information Multi-distillation Network (Hui et al., ACM MM 2019)."""
import math

import torch
from torch import nn

from model.common import ImageConv, Network, conv, forward_features, is_exporting, squeeze_and_excite
from model.layout import Layout, State, count

NEGATIVE_SLOPE = 0.05  # of the leaky ReLUs


class ContrastAttention(nn.Module):
    """Contrast-aware channel attention.

    Each channel is multiplied by a factor in [0, 1] that is computed from all channels' spatial means plus standard
    deviations.
    """

    def __init__(self, n_feats: int):
        super().__init__()
        self.conv_du = squeeze_and_excite(n_feats, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rescale the channels of N x n_feats x H x W."""
        if is_exporting():  # few formats have torch.std_mean
            mean = x.mean((2, 3), keepdim=True)
            return x * self.conv_du((x - mean).square().mean((2, 3), keepdim=True).sqrt() + mean)
        # torch.std_mean has gradient 0 where a channel is constant; the square root of a variance has an infinite one
        deviation, mean = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
        return x * self.conv_du(deviation + mean)


class IMDB(nn.Module):
    """Information multi-distillation block: a quarter of each convolution's channels is kept, the next takes the rest."""

    def __init__(self, n_feats: int):
        super().__init__()
        kept = n_feats // 4
        self.split = kept, n_feats - kept
        self.c1 = conv(n_feats, n_feats)
        self.c2 = conv(n_feats - kept, n_feats)
        self.c3 = conv(n_feats - kept, n_feats)
        self.c4 = conv(n_feats - kept, kept)
        self.cca = ContrastAttention(4 * kept)
        self.c5 = conv(4 * kept, n_feats, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        kept, rest = [], x
        for layer in (self.c1, self.c2, self.c3):
            first, rest = nn.functional.leaky_relu(layer(rest), NEGATIVE_SLOPE).split(self.split, 1)
            kept.append(first)
        return self.c5(self.cca(torch.cat([*kept, self.c4(rest)], 1))) + x


class IMDN(Network):
    """IMDN; its receptive field is the whole image, over which channel attention pools, so tiling changes the result.

    Raises ValueError for fewer than 16 channels.
    """

    native_range = 1
    sliceable = False  # blocks keep the first channels of a convolution and pass on the others: a slice mixes the two

    def __init__(self, scale: int, n_feats: int = 64, n_modules: int = 6):
        super().__init__()
        if n_feats < 16:
            raise ValueError(f"n_feats {n_feats}: channel attention reduces 16 channels to one, so it must be 16 or more")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_feats=n_feats, n_modules=n_modules)
        self.feature_layers = n_modules // 3, 2 * n_modules // 3
        self.fea_conv = ImageConv(3, n_feats)
        self.numbers = range(1, n_modules + 1)
        for number in self.numbers:
            self.add_module(f"IMDB{number}", IMDB(n_feats))
        self.c = nn.Sequential(conv(n_modules * n_feats, n_feats, 1), nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True))
        self.LR_conv = conv(n_feats, n_feats)
        self.upsampler = nn.Sequential(ImageConv(n_feats, 3 * scale * scale), nn.PixelShuffle(scale))

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        head = self.fea_conv(x)
        blocks = [getattr(self, f"IMDB{number}") for number in self.numbers]
        _, outputs = forward_features(blocks, head, range(len(blocks) + 1))
        end = self.LR_conv(self.c(torch.cat(outputs[1:], 1))) + head
        return self.upsampler(end), [head, *(outputs[layer] for layer in self.feature_layers), end]


def read_config(state: State) -> dict:
    """Read the arguments of IMDN from names and shapes; raises ValueError where the scale is not an integer."""
    channels = state["upsampler.0.weight"].shape[0]
    scale = math.isqrt(channels // 3)
    if scale < 1 or channels != 3 * scale * scale:
        raise ValueError(f"{channels} channels before the upsampler")
    n_modules = count(state, "IMDB*.c1.weight") - 1  # numbered from 1
    return dict(scale=scale, n_feats=state["fea_conv.weight"].shape[0], n_modules=n_modules)


LAYOUTS = (Layout("the authors", ("fea_conv.weight", "IMDB1.c1.weight", "IMDB1.cca.conv_du.0.weight", "c.0.weight",
                                  "LR_conv.weight", "upsampler.0.weight"), read_config),)
