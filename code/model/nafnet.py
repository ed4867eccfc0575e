"""NAFNet: Simple Baselines for Image Restoration (Chen et al., ECCV 2022), and TLC (Chu et al., ECCV 2022)."""
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from model.common import ImageConv, Network, conv
from model.layout import Layout, State, count


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of N x C x H x W, without a copy in the channels_last memory format."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise N x C x H x W."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelAttention(nn.Sequential):
    """Simplified channel attention: a 1x1 convolution of the channels' means, by which the input is multiplied.

    tlc_size: side of the windows of which the means are computed in evaluation mode; 0: the whole image.
    """

    def __init__(self, n_feats: int, tlc_size: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), conv(n_feats, n_feats, 1))
        self.tlc_size = tlc_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the attention on N x C x H x W."""
        local = self.tlc_size and not self.training and max(x.shape[2:]) > self.tlc_size
        return x * self[1](local_mean(x, self.tlc_size) if local else self[0](x))


def local_mean(x: torch.Tensor, size: int) -> torch.Tensor:
    """Compute the means of N x C x H x W over size x size windows around each pixel; near the border, over the nearest one.

    Along a side that is shorter than `size`, the window is the whole side. Each mean is a difference of cumulative sums,
    along one side after the other, so that rounding errors do not grow with the area of the image.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        window = min(size, length)
        sums = F.pad(x.cumsum(dim, dtype=torch.float32), _padding(dim, 1, 0))
        means = (sums.narrow(dim, window, length - window + 1) - sums.narrow(dim, 0, length - window + 1)) / window
        before = (window - 1) // 2
        x = F.pad(means.to(x.dtype), _padding(dim, before, window - 1 - before), mode="replicate")
    return x


def _padding(dim, before, after):
    return (before, after, 0, 0) if dim == 3 else (0, 0, before, after)


class NAFBlock(nn.Module):
    """Two residual branches: convolutions with channel attention, and a pointwise network, each with a simple gate."""

    def __init__(self, n_feats: int, tlc_size: int):
        super().__init__()
        self.conv1 = conv(n_feats, 2 * n_feats, 1)
        self.conv2 = nn.Conv2d(2 * n_feats, 2 * n_feats, 3, padding=1, groups=2 * n_feats)
        self.conv3 = conv(n_feats, n_feats, 1)
        self.sca = ChannelAttention(n_feats, tlc_size)
        self.conv4 = conv(n_feats, 2 * n_feats, 1)
        self.conv5 = conv(n_feats, n_feats, 1)
        self.norm1, self.norm2 = (LayerNorm2d(n_feats, eps=1e-6) for _ in range(2))
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, n_feats, 1, 1)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        x = torch.addcmul(x, self.conv3(self.sca(gate(self.conv2(self.conv1(self.norm1(x)))))), self.beta)
        return torch.addcmul(x, self.conv5(gate(self.conv4(self.norm2(x)))), self.gamma)


def gate(x: torch.Tensor) -> torch.Tensor:
    """Multiply the first half of the channels of N x 2C x H x W by the second."""
    first, second = x.chunk(2, 1)
    return first * second


class NAFNet(Network):
    """NAFNet, a U-Net for images of one size: the output is the input plus what the network computes.

    n_feats: channels at full size (`width`), doubled at each level. enc_blk_nums, dec_blk_nums: blocks of each level, of the
    encoder from full size, of the decoder to full size; middle_blk_num: blocks between the two. tlc_size: side, in pixels of
    the image, of the windows of the channel attention in evaluation mode, as in the authors' GoPro test, where it is 384,
    1.5 x the training crops; 0: the whole image. Raises ValueError for another scale than 1 and for numbers that do not fit
    together.

    The feature maps are those at full size: after the first convolution, after the first level of the encoder, where the
    last level of the decoder begins, and at its end.
    """

    native_range = 1
    scales = 1,
    sliceable = False

    def __init__(self, scale: int = 1, n_feats: int = 32, enc_blk_nums: Sequence[int] = (1, 1, 1, 28),
                 middle_blk_num: int = 1, dec_blk_nums: Sequence[int] = (1, 1, 1, 1), tlc_size: int = 0):
        super().__init__()
        self.require_scale(scale)
        levels = len(enc_blk_nums)
        if levels != len(dec_blk_nums):
            raise ValueError(f"{levels} enc_blk_nums and {len(dec_blk_nums)} dec_blk_nums: each level needs one of both")
        self.scale, self.n_feats, self.window = scale, n_feats, 2**levels
        self.config = dict(scale=scale, n_feats=n_feats, enc_blk_nums=list(enc_blk_nums), middle_blk_num=middle_blk_num,
                           dec_blk_nums=list(dec_blk_nums), tlc_size=tlc_size)

        def blocks(number, level):
            return nn.Sequential(*[NAFBlock(n_feats * 2**level, tlc_size and max(1, tlc_size // 2**level))
                                   for _ in range(number)])

        self.intro = ImageConv(3, n_feats)
        self.encoders = nn.ModuleList(blocks(number, level) for level, number in enumerate(enc_blk_nums))
        self.downs = nn.ModuleList(nn.Conv2d(n_feats * 2**level, n_feats * 2**(level + 1), 2, 2) for level in range(levels))
        self.middle_blks = blocks(middle_blk_num, levels)
        self.ups = nn.ModuleList(nn.Sequential(nn.Conv2d(n_feats * 2**level, n_feats * 2**(level + 1), 1, bias=False),
                                               nn.PixelShuffle(2)) for level in range(levels, 0, -1))
        self.decoders = nn.ModuleList(blocks(number, level)
                                      for level, number in zip(range(levels - 1, -1, -1), dec_blk_nums))
        self.ending = ImageConv(n_feats, 3)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad N x 3 x H x W with zeros, which take part in the channel attention, as in the authors' network."""
        return F.pad(x, (0, -x.shape[3] % self.window, 0, -x.shape[2] % self.window))

    def parts(self, name: str) -> dict[int, int]:
        """Return the parts of a parameter, as `Network.parts` does: those that a gate multiplies."""
        return {0: 2} if name.split(".")[-2] in ("conv1", "conv2", "conv4") else {}

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the restored image and the feature maps, as `Network.super_resolve` describes."""
        y = head = self.intro(x)
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(y))
            y = down(skips[-1])
        y = self.middle_blks(y)
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips)):
            start = up(y) + skip
            y = decoder(start)
        return x + self.ending(y), [head, skips[0], start, y]


def read_config(state: State) -> dict:
    """Read the arguments of NAFNet from names and shapes, which do not determine tlc_size."""
    enc_blk_nums, dec_blk_nums = ([count(state, f"{part}.{level}.*") for level in range(count(state, f"{part}.*"))]
                                  for part in ("encoders", "decoders"))
    return dict(scale=1, n_feats=state["intro.weight"].shape[0], enc_blk_nums=enc_blk_nums,
                middle_blk_num=count(state, "middle_blks.*"), dec_blk_nums=dec_blk_nums, tlc_size=0)


LAYOUTS = (Layout("the authors", ("intro.weight", "ending.weight", "downs.0.weight", "ups.0.0.weight",
                                  "encoders.0.0.beta", "decoders.0.0.gamma", "middle_blks.0.sca.1.weight"), read_config),)
