"""The base class of the networks, and the modules that they share under the parameter names of EDSR-PyTorch."""
from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB in [0, 1]
MEAN = torch.tensor(DIV2K_MEAN)
MEAN_SHIFTS = "sub_mean.", "add_mean."  # parameters with these prefixes may be missing in a checkpoint: see MeanShift


class Network(nn.Module):
    """Base class of super-resolution networks: a subclass implements `super_resolve`, callers use `forward`.

    Attributes: `config`, the arguments of the constructor; `scale`, one of `scales`; `n_feats`, the channels of the first
    feature maps; `rgb_range`, the maximum of the images that `forward` takes and returns; `native_range`, the maximum of
    those that `super_resolve` was designed for; `sliceable`, whether the first channels are a network of their own
    (--width_mult); `window`, the size to a multiple of which inputs are padded (1: no padding); `receptive_field`, in LR
    pixels to each side (None: the whole image).
    """

    rgb_range = 255
    native_range = 255
    scales = 1, 2, 3, 4, 8
    sliceable = True
    window = 1
    receptive_field = None

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """The channels of the four feature maps."""
        return 4 * (self.n_feats,)

    def require_scale(self, scale: int) -> None:
        """Raise ValueError unless the scale is one of `scales`."""
        if scale not in self.scales:
            name, held = type(self).__name__, ", ".join(map(str, self.scales))
            raise ValueError(f"there is no {name} for scale {scale}, only for {held}")

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the four feature maps that `forward` describes.

        x: N x 3 x H x W in [0, native_range] -> N x 3 x sH x sW in the same range, and feature maps N x C x H x W,
        their C in `feature_channels`. Without `features` the caller ignores them, so that some may be left out.
        """
        raise NotImplementedError

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad N x 3 x H x W at the bottom and right to multiples of `window`."""
        return pad_to_window(x, self.window)

    def block_name(self, name: str) -> str:
        """Return the name of a parameter in which repeated blocks are numbered, where the parameter's own name differs."""
        return name

    def parts(self, name: str) -> dict[int, int]:
        """Return the axes of a parameter along which equal parts of channels follow each other: {axis: number of parts}.

        A student with fewer channels inherits the first ones of each part.
        """
        return {}

    def forward(self, lr: torch.Tensor,
                features: bool = False) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Super-resolve a batch of LR images.

        lr: N x 3 x H x W in [0, rgb_range] -> sr: N x 3 x sH x sW in the same range. With `features`, (sr, [f0, f1, f2,
        f3]): the feature maps N x C x H x W after the head, after about a third and two thirds of the body, and at its end,
        or those that the class describes, their C in `feature_channels`.
        """
        height, width = lr.shape[-2:]
        x = lr if self.rgb_range == self.native_range else lr * (self.native_range / self.rgb_range)
        sr, feature_maps = self.super_resolve(self.pad(x), features)
        sr = sr[..., :height * self.scale, :width * self.scale]
        if self.rgb_range != self.native_range:
            sr = sr * (self.rgb_range / self.native_range)
        return (sr, [x[..., :height, :width] for x in feature_maps]) if features else sr


def is_exporting() -> bool:
    """Return whether the forward pass is recorded for an export, where sizes are symbols and no `if` may depend on them."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def pad_to_window(x: torch.Tensor, window: int) -> torch.Tensor:
    """Pad N x C x H x W at the bottom and right to multiples of `window`, by reflection without repeating the edge pixel.

    Unlike `torch.nn.functional.pad`, this takes sides that are shorter than the padding: they are reflected repeatedly.
    """
    if window == 1:
        return x
    for dim in (2, 3):
        if is_exporting():
            x = x.index_select(dim, reflected_positions(x.shape[dim], window, x.device))
            continue
        missing = -x.shape[dim] % window
        while missing:
            size = x.shape[dim]
            part = min(missing, max(size - 1, 1))
            x = torch.cat([x, x.narrow(dim, max(size - 1 - part, 0), part).flip(dim)], dim)
            missing -= part
    return x


def reflected_positions(size: int, window: int, device: torch.device) -> torch.Tensor:
    """Return, for each position of a side that is padded by `pad_to_window`, the position whose pixel it repeats."""
    period = torch.full((1,), 2 * size - 2 + 1 // size, device=device)  # 1 for a side of one pixel
    at = torch.arange((size + window - 1) // window * window, device=device) % period
    return torch.minimum(at, period - at)


def conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Conv2d:
    """Build a convolution with a bias that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def squeeze_and_excite(n_feats: int, reduction: int) -> nn.Sequential:
    """Build the two 1x1 convolutions of channel attention, `conv_du` in RCAN: N x C x 1 x 1 -> N x C x 1 x 1 in [0, 1]."""
    return nn.Sequential(conv(n_feats, n_feats // reduction, 1), nn.ReLU(inplace=True),
                         conv(n_feats // reduction, n_feats, 1), nn.Sigmoid())


class ImageConv(nn.Conv2d):
    """A convolution from or to an image, which autocast leaves in float32.

    bfloat16 has 8 significant bits, so that a pixel value of 200 would be rounded by up to 0.5. The residual body tolerates
    that, the image does not.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve N x C x H x W in the type of the weights."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class MeanShift(ImageConv):
    """Add `sign` x the DIV2K mean x 255, as the 1x1 convolution that the released checkpoints hold.

    Its 12 parameters are not trained: they are constant in EDSR-PyTorch, BasicSR, FAKD and CSD. A checkpoint that holds
    other values, as RCAN's and SAN's authors trained them, keeps those; where it holds none, these apply.
    """

    def __init__(self, sign: int):
        super().__init__(3, 3, kernel_size=1)
        with torch.no_grad():
            nn.init.dirac_(self.weight)
            self.bias.copy_(sign * 255 * MEAN)
        self.requires_grad_(False)


def upsampling_factors(scale: int) -> list[int]:
    """Return the factors of the successive upsampling steps of a scale that is 3 or a power of two."""
    return [3] if scale == 3 else [2] * (scale.bit_length() - 1)


class Upsampler(nn.Sequential):
    """Sub-pixel convolutions (Shi et al., CVPR 2016): N x C x H x W -> N x C x sH x sW; scale 2, 3, 4 or 8."""

    def __init__(self, scale: int, n_feats: int):
        layers = []
        for factor in upsampling_factors(scale):
            layers += [conv(n_feats, factor * factor * n_feats), nn.PixelShuffle(factor)]
        super().__init__(*layers)


class ResBlock(nn.Module):
    """The residual block of EDSR: x + res_scale * conv(ReLU(conv(x)))."""

    def __init__(self, n_feats: int, res_scale: float):
        super().__init__()
        self.body = nn.Sequential(conv(n_feats, n_feats), nn.ReLU(inplace=True), conv(n_feats, n_feats))
        self.res_scale = res_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        res = self.body(x)
        return x + (res if self.res_scale == 1 else res * self.res_scale)


def forward_features(blocks: Iterable[Callable], x: torch.Tensor,
                     feature_layers: Collection[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Apply blocks one after the other and return (output, the feature maps after the blocks of `feature_layers`).

    feature_layers: numbers of blocks that have been applied, from 0, the input, to that of all blocks, the output.
    """
    kept = {0: x}
    for done, block in enumerate(blocks, start=1):
        x = block(x)
        if done in feature_layers:
            kept[done] = x
    return x, [kept[layer] for layer in feature_layers]
