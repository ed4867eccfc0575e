"""RRDBNet: the network of ESRGAN (Wang et al., ECCVW 2018) and Real-ESRGAN (Wang et al., ICCVW 2021)."""
import torch
from torch import nn
from torch.nn import functional as F

from model.common import ImageConv, Network, conv, forward_features
from model.layout import Layout, Rules, State, count

N_CONVS = 5  # of a dense block
N_DENSE = 3  # dense blocks of a residual block


class DenseBlock(nn.Module):
    """Residual dense block: each convolution takes the block's input and the outputs of those before it."""

    def __init__(self, n_feats: int, growth: int):
        super().__init__()
        for number in range(1, N_CONVS + 1):
            layer = conv(n_feats + (number - 1) * growth, growth if number < N_CONVS else n_feats)
            nn.init.kaiming_normal_(layer.weight)
            with torch.no_grad():
                layer.weight.mul_(0.1)  # the authors' initialisation, with which deep networks start near the identity
            nn.init.zeros_(layer.bias)
            self.add_module(f"conv{number}", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        dense = x
        for number in range(1, N_CONVS):
            dense = torch.cat([dense, F.leaky_relu(getattr(self, f"conv{number}")(dense), 0.2, inplace=True)], 1)
        return x + 0.2 * getattr(self, f"conv{N_CONVS}")(dense)


class ResidualBlock(nn.Module):
    """Residual in residual dense block."""

    def __init__(self, n_feats: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(n_feats, growth) for _ in range(N_DENSE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDB(Network):
    """RRDBNet, which upscales by 4; for the scales 2 and 1 its input is rearranged by a pixel unshuffle of 2 or 4.

    n_feats: channels of the feature maps (`num_feat`); num_block: residual blocks; num_grow_ch: channels of each dense
    convolution. Raises ValueError for another scale.

    The feature maps of the scales 2 and 1 are at the size of the unshuffled input, and are repeated to that of the input.
    """

    native_range = 1
    scales = 1, 2, 4

    def __init__(self, scale: int, n_feats: int = 64, num_block: int = 23, num_grow_ch: int = 32):
        super().__init__()
        self.require_scale(scale)
        self.scale, self.n_feats, self.window = scale, n_feats, 4 // scale
        self.config = dict(scale=scale, n_feats=n_feats, num_block=num_block, num_grow_ch=num_grow_ch)
        # in unshuffled pixels: head 1, each residual block 15, end of the body 1, the four convolutions after it together 2
        self.receptive_field = self.window * (N_DENSE * N_CONVS * num_block + 4)
        self.feature_layers = num_block // 3, 2 * num_block // 3
        self.conv_first = ImageConv(3 * self.window**2, n_feats)
        self.body = nn.Sequential(*[ResidualBlock(n_feats, num_grow_ch) for _ in range(num_block)])
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (conv(n_feats, n_feats) for _ in range(4))
        self.conv_last = ImageConv(n_feats, 3)

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        head = self.conv_first(F.pixel_unshuffle(x, self.window) if self.window > 1 else x)
        y, middle = forward_features(self.body, head, self.feature_layers if features else ())
        y = body = head + self.conv_body(y)
        for layer in (self.conv_up1, self.conv_up2):
            y = F.leaky_relu(layer(F.interpolate(y, scale_factor=2, mode="nearest")), 0.2, inplace=True)
        sr = self.conv_last(F.leaky_relu(self.conv_hr(y), 0.2, inplace=True))
        return sr, [F.interpolate(one, scale_factor=self.window, mode="nearest") if self.window > 1 else one
                    for one in (head, *middle, body)] if features else []


def read_config(state: State) -> dict:
    """Read the arguments of RRDB from names and shapes; raises ValueError for an unknown number of input channels."""
    n_feats, in_channels = state["conv_first.weight"].shape[:2]
    scale = {3: 4, 12: 2, 48: 1}.get(in_channels)
    if not scale:
        raise ValueError(f"{in_channels} channels before the first convolution")
    return dict(scale=scale, n_feats=n_feats, num_block=count(state, "body.*"),
                num_grow_ch=state["body.0.rdb1.conv1.weight"].shape[0])


def esrgan_rules(state: State) -> Rules:
    """Rename the parameters of ESRGAN's code."""
    blocks = [(f"RRDB_trunk.*.RDB{number}", f"body.*.rdb{number}") for number in range(1, N_DENSE + 1)]
    return [*blocks, ("trunk_conv", "conv_body"), ("upconv1", "conv_up1"), ("upconv2", "conv_up2"), ("HRconv", "conv_hr")]


def sequential_rules(state: State) -> Rules:
    """Rename the parameters of ESRGAN's first code, in which the layers are numbered."""
    blocks = [(f"model.1.sub.*.RDB{block}.conv{layer}.0", f"body.*.rdb{block}.conv{layer}")
              for block in range(1, N_DENSE + 1) for layer in range(1, N_CONVS + 1)]
    return [*blocks, (f"model.1.sub.{count(state, 'model.1.sub.*') - 1}", "conv_body"), ("model.0", "conv_first"),
            ("model.3", "conv_up1"), ("model.6", "conv_up2"), ("model.8", "conv_hr"), ("model.10", "conv_last")]


LAYOUTS = (
    Layout("BasicSR", ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_body.weight", "conv_up2.weight",
                       "conv_hr.weight", "conv_last.weight"), read_config),
    Layout("ESRGAN", ("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight", "trunk_conv.weight", "upconv2.weight",
                      "HRconv.weight", "conv_last.weight"), read_config, esrgan_rules),
    Layout("the first ESRGAN", ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight", "model.3.weight", "model.6.weight",
                                "model.8.weight", "model.10.weight"), read_config, sequential_rules),
)
