"""SwinIR: Image Restoration Using Swin Transformer (Liang et al., ICCVW 2021).

Feature maps of the body are N x H x W x C, as linear layers require. Permuted to N x C x H x W for a convolution they have
the channels_last memory format, so that no data is copied.
"""
from collections.abc import Sequence
from functools import lru_cache
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F

from model.common import DIV2K_MEAN, ImageConv, Network, Upsampler, conv, forward_features, is_exporting
from model.layout import Layout, Rules, State, count, upsampler_scale

UPSAMPLER_FEATS = 64  # channels between body and image, in every released checkpoint


def to_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """Partition N x H x W x C into windows: (N x number of windows) x window^2 x C; a view where possible."""
    n, height, width, channels = x.shape
    x = x.view(n, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def from_windows(x: torch.Tensor, window: int, height: int, width: int) -> torch.Tensor:
    """Reverse `to_windows`."""
    x = x.view(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def relative_position_index(window: int) -> torch.Tensor:
    """Compute, for each pair of positions of a window, the row of the bias table for their offset: window^2 x window^2."""
    if torch.empty(0).is_meta:  # arange on that device imports parts of PyTorch's compiler, which takes a second
        return torch.empty(window**2, window**2, dtype=torch.int64)
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    return (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1


@lru_cache(maxsize=4)  # training uses few sizes; the mask of 512 x 512 takes 64 MiB
def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """Compute the attention mask of cyclically shifted windows: number of windows x 1 x window^2 x window^2.

    It is -100 between positions that are adjacent only through the shift, and 0 elsewhere.
    """
    rows, columns = (torch.arange(size, device=device) for size in (height, width))
    rows, columns = ((at >= size - window).int() + (at >= size - shift).int()
                     for at, size in ((rows, height), (columns, width)))
    region = to_windows((3 * rows[:, None] + columns)[None, :, :, None], window)
    return (region != region.transpose(-2, -1)).float().mul_(-100)[:, None]


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned relative position bias."""

    def __init__(self, n_feats: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", relative_position_index(window), persistent=False)
        self.qkv = linear(n_feats, 3 * n_feats)
        self.proj = linear(n_feats, n_feats)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Compute the attention of windows B x L x C; mask: that of `shift_mask` for the windows of an image, or None."""
        size, length, channels = x.shape
        qkv = self.qkv(x).view(size, length, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]
        bias = (bias if mask is None else bias + mask).to(qkv.dtype)
        # few fused kernels compute the gradient of a bias, and the fallback is slower than this; exported files have none
        if bias.requires_grad or is_exporting():
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            scores = (scores.view(-1, *bias.shape) + bias).view_as(scores)
            x = scores.softmax(-1).to(value.dtype) @ value
        else:
            if len(bias) > 1:
                bias = bias.repeat(size // len(bias), 1, 1, 1)
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(size, length, channels))


class Mlp(nn.Module):
    """Linear layer, GELU, linear layer."""

    def __init__(self, n_feats: int, hidden: int):
        super().__init__()
        self.fc1 = linear(n_feats, hidden)
        self.fc2 = linear(hidden, n_feats)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layers on ... x n_feats."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Swin Transformer layer; `shift`: by how many pixels its input is shifted cyclically up and left."""

    def __init__(self, n_feats: int, num_heads: int, window: int, shift: int, hidden: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(n_feats)
        self.attn = WindowAttention(n_feats, num_heads, window)
        self.norm2 = nn.LayerNorm(n_feats)
        self.mlp = Mlp(n_feats, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer on N x H x W x C."""
        height, width = x.shape[1:3]
        moved, mask = self.norm1(x), None
        if self.shift:
            moved = moved.roll((-self.shift, -self.shift), (1, 2))
            make_mask = shift_mask.__wrapped__ if is_exporting() else shift_mask  # sizes of a trace are no keys of a cache
            mask = make_mask(height, width, self.window, self.shift, x.device)
        moved = from_windows(self.attn(to_windows(moved, self.window), mask), self.window, height, width)
        if self.shift:
            moved = moved.roll((self.shift, self.shift), (1, 2))
        x = x + moved
        return x + self.mlp(self.norm2(x))


class SwinGroup(nn.Module):
    """Residual Swin Transformer block: layers, a convolution, plus the input."""

    def __init__(self, depth: int, n_feats: int, num_heads: int, window: int, hidden: int, resi_connection: str):
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(*[
            SwinBlock(n_feats, num_heads, window, n % 2 * (window // 2), hidden) for n in range(depth)])})
        self.conv = body_conv(n_feats, resi_connection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x H x W x C."""
        return x + self.conv(self.residual_group["blocks"](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinIR(Network):
    """SwinIR with every upsampler and residual connection that was released.

    upsampler: "pixelshuffle" (classical SR), "pixelshuffledirect" (lightweight SR), "nearest+conv" (real-world SR, scale 2
    or 4), or "" (denoising and JPEG artifact removal, scale 1, a global residual); by default the first, at scale 1 the
    last. resi_connection: "1conv", or "3conv", a bottleneck. in_chans: 1 (gray) or 3. img_range: maximum of the images
    inside the network; 255 in the released JPEG networks, 1 in the others. Raises ValueError for arguments that do not fit
    together.

    A pixel depends on some hundred pixels to each side, but on which ones depends on the grid of windows: the output of a
    tile equals that of the whole image only where the tile is aligned with the grid. Hence `receptive_field` is None. The
    stochastic depth of 0.1 of the authors' training is left out, see the table of departures in scripts/README.md.
    """

    native_range = 1

    def __init__(self, scale: int, depths: Sequence[int] = (6, 6, 6, 6), n_feats: int = 60,
                 num_heads: Sequence[int] = (6, 6, 6, 6), window_size: int = 8, mlp_ratio: float = 2,
                 upsampler: str | None = None, resi_connection: str = "1conv", in_chans: int = 3, img_range: float = 1):
        super().__init__()
        if upsampler is None:
            upsampler = "pixelshuffle" if scale > 1 else ""
        if len(depths) != len(num_heads):
            raise ValueError(f"{len(depths)} depths and {len(num_heads)} num_heads: each residual block needs one of both")
        if any(n_feats % heads for heads in num_heads):
            raise ValueError(f"{n_feats} channels are not divisible by {list(num_heads)} heads")
        if resi_connection not in ("1conv", "3conv"):
            raise ValueError(f"resi_connection {resi_connection} is neither 1conv nor 3conv")
        self.scale, self.n_feats, self.window, self.img_range = scale, n_feats, window_size, img_range
        self.upsampler = upsampler
        self.config = dict(scale=scale, depths=list(depths), n_feats=n_feats, num_heads=list(num_heads),
                           window_size=window_size, mlp_ratio=mlp_ratio, upsampler=upsampler,
                           resi_connection=resi_connection, in_chans=in_chans, img_range=img_range)
        self.feature_layers = len(depths) // 3, 2 * len(depths) // 3
        mean = torch.tensor(DIV2K_MEAN if in_chans == 3 else [0.0] * in_chans).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.conv_first = ImageConv(in_chans, n_feats)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(n_feats)})
        self.layers = nn.Sequential(*[
            SwinGroup(depth, n_feats, heads, window_size, round(n_feats * mlp_ratio), resi_connection)
            for depth, heads in zip(depths, num_heads)])
        self.norm = nn.LayerNorm(n_feats)
        self.conv_after_body = body_conv(n_feats, resi_connection)
        if upsampler in ("pixelshuffle", "nearest+conv"):
            self.conv_before_upsample = nn.Sequential(conv(n_feats, UPSAMPLER_FEATS), nn.LeakyReLU(inplace=True))
        if upsampler == "pixelshuffle":
            self.upsample = Upsampler(scale, UPSAMPLER_FEATS)
            self.conv_last = ImageConv(UPSAMPLER_FEATS, in_chans)
        elif upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(ImageConv(n_feats, scale * scale * in_chans), nn.PixelShuffle(scale))
        elif upsampler == "nearest+conv" and scale in (2, 4):
            self.conv_up1 = conv(UPSAMPLER_FEATS, UPSAMPLER_FEATS)
            if scale == 4:
                self.conv_up2 = conv(UPSAMPLER_FEATS, UPSAMPLER_FEATS)
            self.conv_hr = conv(UPSAMPLER_FEATS, UPSAMPLER_FEATS)
            self.conv_last = ImageConv(UPSAMPLER_FEATS, in_chans)
        elif upsampler == "" and scale == 1:
            self.conv_last = ImageConv(n_feats, in_chans)
        else:
            raise ValueError(f"there is no upsampler {upsampler or '(none)'} for scale {scale}")

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        x = (x - self.mean) * self.img_range
        head = self.conv_first(x)
        tokens = self.patch_embed["norm"](head.permute(0, 2, 3, 1))
        tokens, middle = forward_features(self.layers, tokens, self.feature_layers if features else ())
        body = self.conv_after_body(self.norm(tokens).permute(0, 3, 1, 2)) + head
        sr = self.reconstruct(body) if self.upsampler else x + self.conv_last(body)
        return sr / self.img_range + self.mean, [head, *(tokens.permute(0, 3, 1, 2) for tokens in middle), body]

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Upsample N x n_feats x H x W to an image N x in_chans x sH x sW."""
        if self.upsampler == "pixelshuffledirect":
            return self.upsample(x)
        x = self.conv_before_upsample(x)
        if self.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(x))
        for up in [self.conv_up1, self.conv_up2] if self.scale == 4 else [self.conv_up1]:
            x = F.leaky_relu(up(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


def linear(in_features: int, out_features: int) -> nn.Linear:
    """Build a linear layer with the initialisation of Swin Transformer."""
    layer = nn.Linear(in_features, out_features)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def body_conv(n_feats: int, resi_connection: str) -> nn.Module:
    """Build the convolution, or the bottleneck of three, at the end of a residual block and of the body."""
    if resi_connection == "1conv":
        return conv(n_feats, n_feats)
    return nn.Sequential(conv(n_feats, n_feats // 4), nn.LeakyReLU(0.2, inplace=True), conv(n_feats // 4, n_feats // 4, 1),
                         nn.LeakyReLU(0.2, inplace=True), conv(n_feats // 4, n_feats))


def buffer_rules(state: State) -> Rules:
    """Drop the constants of the released checkpoints, which are computed here."""
    return [(f"layers.*.residual_group.blocks.*.{name}", None) for name in ("attn.relative_position_index", "attn_mask")]


def read_config(state: State) -> dict:
    """Read the arguments of SwinIR from names and shapes; raises ValueError for an unknown upsampler."""
    block = "residual_group.blocks.0"
    n_feats, in_chans = state["conv_first.weight"].shape[:2]
    table = state[f"layers.0.{block}.attn.relative_position_bias_table"]
    tables = [state.get(f"layers.{n}.{block}.attn.relative_position_bias_table", table)
              for n in range(count(state, f"layers.*.{block}"))]
    window_size = (isqrt(len(table)) + 1) // 2
    upsampler, scale = read_upsampler(state, in_chans)
    return dict(
        scale=scale, depths=[count(state, f"layers.{n}.residual_group.blocks.*.norm1.weight") for n in range(len(tables))],
        n_feats=n_feats, num_heads=[table.shape[1] for table in tables], window_size=window_size,
        mlp_ratio=state[f"layers.0.{block}.mlp.fc1.weight"].shape[0] / n_feats, upsampler=upsampler,
        resi_connection="3conv" if "conv_after_body.0.weight" in state else "1conv", in_chans=in_chans,
        # names and shapes do not determine it: of the released networks, those for JPEG have windows of 7 and use [0, 255]
        img_range=255 if upsampler == "" and window_size == 7 else 1)


def read_upsampler(state: State, in_chans: int) -> tuple[str, int]:
    """Read the name and the scale of the upsampler; raises ValueError for shapes of none."""
    if "conv_up1.weight" in state:
        return "nearest+conv", 4 if "conv_up2.weight" in state else 2
    if "upsample.0.weight" not in state:
        if "conv_last.weight" not in state:
            raise ValueError("neither upsample.0.weight nor conv_last.weight")
        return "", 1
    if "conv_before_upsample.0.weight" in state:
        return "pixelshuffle", upsampler_scale(state, "upsample", UPSAMPLER_FEATS)
    return "pixelshuffledirect", isqrt(len(state["upsample.0.weight"]) // in_chans)


LAYOUTS = (Layout("the authors", (
    "conv_first.weight", "patch_embed.norm.weight", "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
    "layers.0.residual_group.blocks.0.attn.qkv.weight", "layers.0.residual_group.blocks.0.mlp.fc1.weight", "norm.weight"),
    read_config, buffer_rules),)
