"""Restormer: Efficient Transformer for High-Resolution Image Restoration (Zamir et al., CVPR 2022)."""
from collections.abc import Sequence
from math import ceil

import torch
from torch import nn
from torch.nn import functional as F

from model.common import ImageConv, Network
from model.layout import Layout, State, count

LEVELS = 4
NORMS = "WithBias", "BiasFree"  # the authors' LayerNorm_type; BiasFree in their networks for denoising


class BiasFreeNorm(nn.Module):
    """Division of ... x C by the standard deviation of the channels, whose mean is not subtracted."""

    def __init__(self, n_feats: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_feats))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ... x C."""
        return x * (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt() * self.weight


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of N x C x H x W, without a copy in the channels_last memory format."""

    def __init__(self, n_feats: int, norm: str):
        super().__init__()
        self.body = nn.LayerNorm(n_feats) if norm == "WithBias" else BiasFreeNorm(n_feats)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise N x C x H x W."""
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TransposedAttention(nn.Module):
    """Self-attention between the channels of each head: the scores are their cosine similarities over all positions."""

    def __init__(self, n_feats: int, heads: int):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = conv(n_feats, 3 * n_feats, 1)
        self.qkv_dwconv = depthwise(3 * n_feats)
        self.project_out = conv(n_feats, n_feats, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the attention on N x n_feats x H x W."""
        query, key, value = self.qkv_dwconv(self.qkv(x)).chunk(3, 1)
        return attend(query, key, value, self.temperature, self.project_out.weight)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: torch.Tensor,
           projection: torch.Tensor) -> torch.Tensor:
    """Compute the attention between channels and the 1x1 convolution after it.

    query, key, value: N x C x H x W; temperature: heads x 1 x 1; projection: C x C x 1 x 1. Scores are divided by the norms
    of queries and keys, which avoids a normalised copy of both, and the projection is multiplied by the attention matrices,
    which are smaller than the feature maps.
    """
    shape, heads = value.shape, len(temperature)
    query, key = (x.flatten(2).unflatten(1, (heads, -1)) for x in (query, key))
    with torch.autocast(query.device.type, enabled=False):  # a sum of products over all positions overflows in float16
        query, key = query.float(), key.float()
        norms = [x.norm(dim=3).clamp(min=1e-12) for x in (query, key)]
        scores = (query / norms[0][..., None]) @ key.transpose(-2, -1) / norms[1][:, :, None] * temperature
    weights = projection.flatten(1).unflatten(1, (heads, -1)).transpose(0, 1) @ scores.softmax(-1).to(projection.dtype)
    return (weights.transpose(1, 2).flatten(2) @ value.flatten(2)).view(shape)


class GatedFeedForward(nn.Module):
    """Two depthwise convolved projections, one of which gates the other by a GELU."""

    def __init__(self, n_feats: int, hidden: int):
        super().__init__()
        self.project_in = conv(n_feats, 2 * hidden, 1)
        self.dwconv = depthwise(2 * hidden)
        self.project_out = conv(hidden, n_feats, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layers on N x n_feats x H x W."""
        first, second = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(first) * second)


class TransformerBlock(nn.Module):
    """Attention between channels and a gated feed-forward network, each with normalisation and a residual."""

    def __init__(self, n_feats: int, heads: int, hidden: int, norm: str):
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm2d(n_feats, norm) for _ in range(2))
        self.attn = TransposedAttention(n_feats, heads)
        self.ffn = GatedFeedForward(n_feats, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Restormer(Network):
    """Restormer, a U-Net of four levels for images of one size: the output is the input plus what the network computes.

    n_feats: channels at full size (`dim`), doubled at each level; the last level of the decoder has twice as many too.
    num_blocks, heads: blocks and attention heads of each level from full size; num_refinement_blocks: blocks after the
    decoder. ffn_expansion_factor: ratio of hidden to input channels of the feed-forward networks. LayerNorm_type: WithBias,
    or BiasFree as in the networks for denoising. in_chans: 1 (gray) or 3. Convolutions have no biases, as published. Raises
    ValueError for another scale than 1 and for numbers that do not fit together.

    The feature maps are those at full size: after the first convolution, after the first level of the encoder, after the
    last level of the decoder, and after the refinement; the last two have 2 x n_feats channels.
    """

    native_range = 1
    scales = 1,
    sliceable = False
    window = 2**(LEVELS - 1)

    def __init__(self, scale: int = 1, n_feats: int = 48, num_blocks: Sequence[int] = (4, 6, 6, 8),
                 num_refinement_blocks: int = 4, heads: Sequence[int] = (1, 2, 4, 8), ffn_expansion_factor: float = 2.66,
                 LayerNorm_type: str = "WithBias", in_chans: int = 3):
        super().__init__()
        self.require_scale(scale)
        if len(num_blocks) != LEVELS or len(heads) != LEVELS:
            raise ValueError(f"{len(num_blocks)} num_blocks and {len(heads)} heads: it has {LEVELS} levels")
        widths = [n_feats * 2**level for level in range(LEVELS)]
        if n_feats % 2 or any(width % number for width, number in zip((*widths, 2 * n_feats), (*heads, heads[0]))):
            raise ValueError(f"{n_feats} channels, doubled at each level, are odd or not divisible by {list(heads)} heads")
        if LayerNorm_type not in NORMS:
            raise ValueError(f"LayerNorm_type {LayerNorm_type} is none of {', '.join(NORMS)}")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_feats=n_feats, num_blocks=list(num_blocks),
                           num_refinement_blocks=num_refinement_blocks, heads=list(heads),
                           ffn_expansion_factor=ffn_expansion_factor, LayerNorm_type=LayerNorm_type, in_chans=in_chans)

        def blocks(number, level, width):
            return nn.Sequential(*[TransformerBlock(width, heads[level], int(width * ffn_expansion_factor), LayerNorm_type)
                                   for _ in range(number)])

        def resampler(in_channels, out_channels, shuffle):
            return nn.ModuleDict({"body": nn.Sequential(conv(in_channels, out_channels), shuffle)})

        self.patch_embed = nn.ModuleDict({"proj": ImageConv(in_chans, n_feats, bias=False)})
        for level, (number, width) in enumerate(zip(num_blocks[:-1], widths), 1):
            self.add_module(f"encoder_level{level}", blocks(number, level - 1, width))
            self.add_module(f"down{level}_{level + 1}", resampler(width, width // 2, nn.PixelUnshuffle(2)))
        self.latent = blocks(num_blocks[-1], LEVELS - 1, widths[-1])
        for level in range(LEVELS - 1, 0, -1):
            width = widths[level - 1]
            self.add_module(f"up{level + 1}_{level}", resampler(2 * width, 4 * width, nn.PixelShuffle(2)))
            if level > 1:
                self.add_module(f"reduce_chan_level{level}", conv(2 * width, width, 1))
            self.add_module(f"decoder_level{level}", blocks(num_blocks[level - 1], level - 1, max(width, 2 * n_feats)))
        self.refinement = blocks(num_refinement_blocks, 0, 2 * n_feats)
        self.output = ImageConv(2 * n_feats, in_chans, bias=False)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """The channels of the four feature maps."""
        return self.n_feats, self.n_feats, 2 * self.n_feats, 2 * self.n_feats

    def parts(self, name: str) -> dict[int, int]:
        """Return the parts of a parameter, as `Network.parts` does: heads, gates, and the concatenation with the encoder."""
        stage, heads = name.partition(".")[0], 1
        joined = 2 if stage in ("decoder_level1", "refinement") else 1  # twice n_feats: decoder and encoder
        if stage == "output" or stage.startswith("reduce_chan"):
            return {1: 2}
        if ".attn." in name:
            heads = len(self.get_parameter(".".join(name.split(".")[:3]) + ".temperature"))
        rows, columns = next((value for key, value in {
            "norm": (joined, 1), "attn.qkv.": (3 * heads, joined), "attn.qkv_dwconv": (3 * heads, 1),
            "attn.project_out": (joined, heads), "ffn.project_in": (2, joined), "ffn.dwconv": (2, 1),
            "ffn.project_out": (joined, 1)}.items() if f".{key}" in name), (1, 1))
        return {axis: number for axis, number in enumerate((rows, columns)) if number > 1}

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the restored image and the feature maps, as `Network.super_resolve` describes."""
        y = head = self.patch_embed["proj"](x)
        skips = []
        for level in range(1, LEVELS):
            skips.append(getattr(self, f"encoder_level{level}")(y))
            y = getattr(self, f"down{level}_{level + 1}")["body"](skips[-1])
        y = self.latent(y)
        for level in range(LEVELS - 1, 0, -1):
            y = torch.cat([getattr(self, f"up{level + 1}_{level}")["body"](y), skips[level - 1]], 1)
            if level > 1:
                y = getattr(self, f"reduce_chan_level{level}")(y)
            y = getattr(self, f"decoder_level{level}")(y)
        end = self.refinement(y)
        return x + self.output(end), [head, skips[0], y, end]


def conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Conv2d:
    """Build a convolution without a bias that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)


def depthwise(channels: int) -> nn.Conv2d:
    """Build a 3x3 depthwise convolution without a bias."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def expansion_factor(channels: Sequence[int], hidden: Sequence[int]) -> float:
    """Return the shortest decimal of which the products with `channels`, rounded down, are `hidden`.

    Raises ValueError where there is none.
    """
    lowest = max(number / width for number, width in zip(hidden, channels))
    for digits in range(9):
        factor = ceil(lowest * 10**digits) / 10**digits
        if [int(width * factor) for width in channels] == list(hidden):
            return factor
    raise ValueError(f"{list(hidden)} hidden channels are no multiple of {list(channels)}")


def read_config(state: State) -> dict:
    """Read the arguments of Restormer from names and shapes; raises ValueError where the feed-forward networks fit none."""
    levels = [*(f"encoder_level{level}" for level in range(1, LEVELS)), "latent"]
    n_feats, in_chans = state["patch_embed.proj.weight"].shape[:2]
    projections = [state[f"{level}.0.ffn.project_out.weight"] for level in levels]
    return dict(scale=1, n_feats=n_feats, num_blocks=[count(state, f"{level}.*") for level in levels],
                num_refinement_blocks=count(state, "refinement.*"),
                heads=[len(state[f"{level}.0.attn.temperature"]) for level in levels],
                ffn_expansion_factor=expansion_factor(*zip(*(weight.shape[:2] for weight in projections))),
                LayerNorm_type=NORMS["encoder_level1.0.norm1.body.bias" not in state], in_chans=in_chans)


LAYOUTS = (Layout("the authors", ("patch_embed.proj.weight", "encoder_level1.0.attn.temperature",
                                  "latent.0.ffn.project_out.weight", "refinement.0.norm1.body.weight", "output.weight"),
                  read_config),)
