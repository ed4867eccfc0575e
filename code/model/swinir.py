"""SwinIR: Image Restoration Using Swin Transformer (Liang et al., ICCVW 2021).

Inside the body a feature map is N x H x W x C, as linear layers want it; permuted for a convolution that is the
channels_last format of N x C x H x W, so that no data moves between the two.
"""
from functools import lru_cache
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F

from model.common import DIV2K_MEAN, ImageConv, Network, Upsampler, conv, count, forward_features, upsampler_scale

TAIL_FEATS = 64  # channels between body and image, in every released file
BUFFERS = "relative_position_index", "attn_mask"  # constants in the released files, computed here


def to_windows(x, window):
    """N x H x W x C -> (N x number of windows) x window^2 x C; a view where it can be."""
    n, height, width, channels = x.shape
    x = x.view(n, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def from_windows(x, window, height, width):
    """The inverse of to_windows."""
    x = x.view(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def relative_positions(window):
    """window^2 x window^2: for two positions of a window, the row of the bias table that their distance has."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    return (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1


@lru_cache(maxsize=4)  # training alternates between few sizes; at 512 x 512 a mask is 64 MiB
def shift_mask(height, width, window, shift, device):
    """Number of windows x 1 x window^2 x window^2: -100 between positions that only the cyclic shift made neighbours."""
    rows, columns = (torch.arange(size, device=device) for size in (height, width))
    rows, columns = ((at >= size - window).int() + (at >= size - shift).int()
                     for at, size in ((rows, height), (columns, width)))
    region = to_windows((3 * rows[:, None] + columns)[None, :, :, None], window)
    return (region != region.mT).float().mul_(-100)[:, None]


class WindowAttention(nn.Module):
    """Multi-head attention within each window, with a learned bias for each distance."""

    def __init__(self, n_feats, num_heads, window):
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", relative_positions(window), persistent=False)
        self.qkv = linear(n_feats, 3 * n_feats)
        self.proj = linear(n_feats, n_feats)

    def forward(self, x, mask):
        """x: windows B x L x C; mask: None or a mask of each window of an image."""
        size, length, channels = x.shape
        qkv = self.qkv(x).view(size, length, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]
        bias = (bias if mask is None else bias + mask).to(qkv.dtype)
        if bias.requires_grad:  # few fused kernels give it a gradient, and what stands in for them is slower than this
            scores = (query * query.shape[-1] ** -0.5) @ key.mT
            scores = (scores.view(-1, *bias.shape) + bias).view_as(scores)
            x = scores.softmax(-1).to(value.dtype) @ value
        else:
            if len(bias) > 1:
                bias = bias.repeat(size // len(bias), 1, 1, 1)
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(size, length, channels))


class Mlp(nn.Module):
    def __init__(self, n_feats, hidden):
        super().__init__()
        self.fc1 = linear(n_feats, hidden)
        self.fc2 = linear(hidden, n_feats)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Swin transformer layer on N x H x W x C; `shift` moves its windows, cyclically, up and left."""

    def __init__(self, n_feats, num_heads, window, shift, hidden):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(n_feats)
        self.attn = WindowAttention(n_feats, num_heads, window)
        self.norm2 = nn.LayerNorm(n_feats)
        self.mlp = Mlp(n_feats, hidden)

    def forward(self, x):
        height, width = x.shape[1:3]
        moved, mask = self.norm1(x), None
        if self.shift:
            moved = moved.roll((-self.shift, -self.shift), (1, 2))
            mask = shift_mask(height, width, self.window, self.shift, x.device)
        moved = from_windows(self.attn(to_windows(moved, self.window), mask), self.window, height, width)
        if self.shift:
            moved = moved.roll((self.shift, self.shift), (1, 2))
        x = x + moved
        return x + self.mlp(self.norm2(x))


class SwinGroup(nn.Module):
    """Residual Swin transformer block: blocks, a convolution, plus the input; on N x H x W x C."""

    def __init__(self, depth, n_feats, num_heads, window, hidden, resi_connection):
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(*[
            SwinBlock(n_feats, num_heads, window, n % 2 * (window // 2), hidden) for n in range(depth)])})
        self.conv = body_conv(n_feats, resi_connection)

    def forward(self, x):
        return x + self.conv(self.residual_group["blocks"](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinIR(Network):
    """The network of every released head; a file's names say which.

    upsampler: "pixelshuffle" (classical), "pixelshuffledirect" (lightweight), "nearest+conv" (real-world, scale 2 or 4), or
    "" (denoising and JPEG, scale 1, where the network adds to its input).
    resi_connection: "1conv", or "3conv" with a narrow middle. in_chans: 1 (gray) or 3. img_range: that the image is brought
    to inside; 255 in the released JPEG networks, 1 in the others.

    What a pixel depends on is finite, some hundred pixels to each side, but lies on the grid of windows: only tiles that
    begin on it see what the whole image sees. Hence no receptive field is stated. The authors trained with stochastic depth
    of 0.1, which is left out.
    """
    native_range = 1

    def __init__(self, scale, depths=(6, 6, 6, 6), n_feats=60, num_heads=(6, 6, 6, 6), window_size=8, mlp_ratio=2,
                 upsampler="pixelshuffle", resi_connection="1conv", in_chans=3, img_range=1):
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"{len(depths)} depths and {len(num_heads)} num_heads: each group of blocks has one of both")
        if any(n_feats % heads for heads in num_heads):
            raise ValueError(f"{n_feats} channels do not divide among {list(num_heads)} heads")
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
            self.conv_before_upsample = nn.Sequential(conv(n_feats, TAIL_FEATS), nn.LeakyReLU(inplace=True))
        if upsampler == "pixelshuffle":
            self.upsample = Upsampler(scale, TAIL_FEATS)
            self.conv_last = ImageConv(TAIL_FEATS, in_chans)
        elif upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(ImageConv(n_feats, scale * scale * in_chans), nn.PixelShuffle(scale))
        elif upsampler == "nearest+conv" and scale in (2, 4):
            self.conv_up1 = conv(TAIL_FEATS, TAIL_FEATS)
            if scale == 4:
                self.conv_up2 = conv(TAIL_FEATS, TAIL_FEATS)
            self.conv_hr = conv(TAIL_FEATS, TAIL_FEATS)
            self.conv_last = ImageConv(TAIL_FEATS, in_chans)
        elif upsampler == "" and scale == 1:
            self.conv_last = ImageConv(n_feats, in_chans)
        else:
            raise ValueError(f"there is no upsampler {upsampler or '(none)'} for scale {scale}")

    def super_resolve(self, x, features):
        x = (x - self.mean) * self.img_range
        head = self.conv_first(x)
        tokens = self.patch_embed["norm"](head.permute(0, 2, 3, 1))
        tokens, middle = forward_features(self.layers, tokens, self.feature_layers if features else ())
        body = self.conv_after_body(self.norm(tokens).permute(0, 3, 1, 2)) + head
        sr = self.tail(body) if self.upsampler else x + self.conv_last(body)
        return sr / self.img_range + self.mean, [head, *(tokens.permute(0, 3, 1, 2) for tokens in middle), body]

    def tail(self, x):
        if self.upsampler == "pixelshuffledirect":
            return self.upsample(x)
        x = self.conv_before_upsample(x)
        if self.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(x))
        for up in [self.conv_up1, self.conv_up2] if self.scale == 4 else [self.conv_up1]:
            x = F.leaky_relu(up(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


def linear(in_features, out_features):
    layer = nn.Linear(in_features, out_features)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def body_conv(n_feats, resi_connection):
    """The convolution at the end of a group of blocks and of the body."""
    if resi_connection == "1conv":
        return conv(n_feats, n_feats)
    return nn.Sequential(conv(n_feats, n_feats // 4), nn.LeakyReLU(0.2, inplace=True), conv(n_feats // 4, n_feats // 4, 1),
                         nn.LeakyReLU(0.2, inplace=True), conv(n_feats // 4, n_feats))


def recognise(state):
    """(config, state) of a SwinIR as the authors released it, of any head, with or without its constants; else None."""
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in BUFFERS}
    block = "residual_group.blocks.0"
    table, hidden, first = (state.get(name) for name in (
        f"layers.0.{block}.attn.relative_position_bias_table", f"layers.0.{block}.mlp.fc1.weight", "conv_first.weight"))
    if table is None or hidden is None or first is None:
        return None
    n_feats, in_chans = first.shape[:2]
    upsampler, scale = _head(state, in_chans)
    if not scale:
        return None
    groups = range(count(state, "layers.*.residual_group.blocks.0.norm1.weight"))
    window = (isqrt(len(table)) + 1) // 2
    tables = [state.get(f"layers.{n}.{block}.attn.relative_position_bias_table", table) for n in groups]
    config = dict(
        scale=scale, depths=[count(state, f"layers.{n}.residual_group.blocks.*.norm1.weight") for n in groups],
        n_feats=n_feats, num_heads=[table.shape[1] for table in tables], window_size=window,
        mlp_ratio=hidden.shape[0] / n_feats, upsampler=upsampler,
        resi_connection="3conv" if "conv_after_body.0.weight" in state else "1conv", in_chans=in_chans,
        # not seen in names or shapes: of the released networks, those for JPEG have windows of 7 and work in [0, 255]
        img_range=255 if upsampler == "" and window == 7 else 1)
    return config, state


def _head(state, in_chans):
    """(upsampler, scale); the scale is None or 0 where the shapes are of no head."""
    if "conv_up1.weight" in state:
        return "nearest+conv", 4 if "conv_up2.weight" in state else 2
    if "upsample.0.weight" not in state:
        return "", 1 if "conv_last.weight" in state else None
    if "conv_before_upsample.0.weight" in state:
        return "pixelshuffle", upsampler_scale(state, "upsample.", TAIL_FEATS)
    return "pixelshuffledirect", isqrt(len(state["upsample.0.weight"]) // in_chans)
