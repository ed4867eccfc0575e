"""Parts that the networks share, under the parameter names of the EDSR family's released files."""
import torch
from torch import nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB in [0, 1]


class Network(nn.Module):
    """A super-resolution network: `forward` here is what its surroundings see, `super_resolve` what it computes.

    Attributes: `config`, the arguments of its constructor; `scale`; `n_feats`, the channels of its feature maps;
    `rgb_range`, of its surroundings, and `native_range`, what it was designed for; `window`, the size that inputs are
    padded to a multiple of (1: none); `receptive_field`, LR pixels to each side (None: the whole image).
    """
    rgb_range = 255
    native_range = 255
    window = 1
    receptive_field = None

    def super_resolve(self, x, features):
        """x: N x 3 x H x W in [0, native_range] -> sr: N x 3 x sH x sW, and the four maps N x n_feats x H x W.

        Without features the maps are not looked at: those that the network itself needs no more may be missing.
        """
        raise NotImplementedError

    def forward(self, lr, features=False):
        """lr: N x 3 x H x W in [0, rgb_range] -> sr: N x 3 x sH x sW in the same range.

        With features, (sr, [f0, f1, f2, f3]): the maps after the head, at about a third and two thirds of the body, and at
        its end, N x n_feats x H x W (of the padded input where the network has a window).
        """
        height, width = lr.shape[-2:]
        x = lr if self.rgb_range == self.native_range else lr * (self.native_range / self.rgb_range)
        sr, maps = self.super_resolve(pad_to_window(x, self.window), features)
        sr = sr[..., :height * self.scale, :width * self.scale]
        if self.rgb_range != self.native_range:
            sr = sr * (self.rgb_range / self.native_range)
        return (sr, [x[..., :height, :width] for x in maps]) if features else sr


def pad_to_window(x, window):
    """Extends N x C x H x W at the bottom and right to multiples of `window`, by reflection (edge pixel not repeated)."""
    for dim in (2, 3):
        missing = -x.shape[dim] % window
        while missing:  # a side shorter than what is missing is reflected more than once
            size = x.shape[dim]
            part = min(missing, max(size - 1, 1))
            x = torch.cat([x, x.narrow(dim, max(size - 1 - part, 0), part).flip(dim)], dim)
            missing -= part
    return x


def conv(in_channels, out_channels, kernel_size=3):
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def squeeze_and_excite(n_feats, reduction):
    """N x C x 1 x 1 -> N x C x 1 x 1 in 0..1: channel attention's two 1x1 convolutions, under the authors' `conv_du`."""
    return nn.Sequential(conv(n_feats, n_feats // reduction, 1), nn.ReLU(inplace=True),
                         conv(n_feats // reduction, n_feats, 1), nn.Sigmoid())


class ImageConv(nn.Conv2d):
    """Convolution from an image or to one, in float32 under any autocast.

    bfloat16 keeps 8 bits: a pixel of 200 is known to +-0.5 only. Between the two ends the residual body tolerates that,
    the image itself does not.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class MeanShift(ImageConv):
    """Adds `sign` x the DIV2K mean x 255, as the 1x1 convolution that the released files hold.

    Its 12 numbers are constants in EDSR, and were trained along with the rest in RCAN and SAN: `trainable` says which.
    """

    def __init__(self, sign, trainable):
        super().__init__(3, 3, kernel_size=1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            self.bias.copy_(sign * 255 * torch.tensor(DIV2K_MEAN))
        self.requires_grad_(trainable)


class Upsampler(nn.Sequential):
    """Sub-pixel upsampling (Shi et al., CVPR 2016): N x C x H x W -> N x C x sH x sW; scale 2, 3, 4 or 8."""

    def __init__(self, scale, n_feats):
        layers = []
        for factor in [3] if scale == 3 else [2] * (scale.bit_length() - 1):
            layers += [conv(n_feats, factor * factor * n_feats), nn.PixelShuffle(factor)]
        super().__init__(*layers)


class ResBlock(nn.Module):
    """EDSR's residual block: conv, ReLU, conv, times res_scale, plus the input."""

    def __init__(self, n_feats, res_scale):
        super().__init__()
        self.body = nn.Sequential(conv(n_feats, n_feats), nn.ReLU(inplace=True), conv(n_feats, n_feats))
        self.res_scale = res_scale

    def forward(self, x):
        res = self.body(x)
        return x + (res if self.res_scale == 1 else res * self.res_scale)


def forward_features(blocks, x, feature_layers):
    """Runs x through the blocks -> (output, [x before block t for t in feature_layers]); t = len(blocks) is the output."""
    kept = {0: x}
    for done, block in enumerate(blocks, start=1):
        x = block(x)
        if done in feature_layers:
            kept[done] = x
    return x, [kept[tap] for tap in feature_layers]


# ---- reading sizes off the names and shapes of parameters

def count(state, pattern):
    """1 + the largest N for which `pattern` with N in the place of its * begins a name of the state; 0 without any."""
    before, after = pattern.split("*")
    numbers = [int(name[len(before):].split(after or ".", 1)[0]) for name in state
               if name.startswith(before) and after in name[len(before):]
               and name[len(before):].split(after or ".", 1)[0].isdigit()]
    return max(numbers, default=-1) + 1


def upsampler_scale(state, prefix, n_feats):
    """Scale of an Upsampler whose convolutions are `prefix`N.weight; None where the shapes are not of one."""
    ratios = [tensor.shape[0] / n_feats for name, tensor in state.items()
              if name.startswith(prefix) and name.endswith(".weight") and name[len(prefix):-7].isdigit()]
    if ratios == [9]:
        return 3
    return 2 ** len(ratios) if ratios and set(ratios) == {4} else None


def rename(state, *rules):
    """The state with the first (start, new start) rule that fits applied to each name."""
    renamed = {}
    for name, tensor in state.items():
        for start, new in rules:
            if name.startswith(start):
                name = new + name[len(start):]
                break
        renamed[name] = tensor
    return renamed


def with_default_means(state):
    """The state with the constant mean shift where it is a layout or a file that does without."""
    return {**{f"{name}.{part}": value for name, sign in (("sub_mean", -1), ("add_mean", 1))
               for part, value in MeanShift(sign, False).state_dict().items()}, **state}
