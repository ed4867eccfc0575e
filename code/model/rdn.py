"""RDN: Residual Dense Network for Image Super-Resolution (Zhang et al., CVPR 2018)."""
import torch
from torch import nn

from model.common import ImageConv, Network, conv, count

PUBLISHED = {"A": (20, 6, 32), "B": (16, 8, 64)}  # D blocks, C convolutions in each, G channels that each adds


class DenseConv(nn.Module):
    """A convolution whose output is added to the channels of its input."""

    def __init__(self, in_channels, growth):
        super().__init__()
        self.conv = nn.Sequential(conv(in_channels, growth), nn.ReLU(inplace=True))

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


class RDB(nn.Module):
    """Residual dense block: every convolution sees all before it, a 1x1 (local feature fusion) sums up, plus the input."""

    def __init__(self, n_feats, n_convs, growth):
        super().__init__()
        self.convs = nn.Sequential(*[DenseConv(n_feats + n * growth, growth) for n in range(n_convs)])
        self.LFF = conv(n_feats + n_convs * growth, n_feats, 1)

    def forward(self, x):
        return self.LFF(self.convs(x)) + x


class RDN(Network):
    """RDNconfig: A or B of the paper, or "D,C,G" for D blocks of C convolutions that add G channels each.

    RDNkSize is the kernel outside of the blocks, as in EDSR-PyTorch; inside it is 3. Subtracts no mean.
    """

    def __init__(self, scale, G0=64, RDNkSize=3, RDNconfig="A"):
        super().__init__()
        n_blocks, n_convs, growth = sizes(RDNconfig)
        if RDNkSize % 2 == 0:
            raise ValueError(f"RDNkSize {RDNkSize} is even: a kernel needs a centre")
        self.scale, self.n_feats = scale, G0
        self.config = dict(scale=scale, G0=G0, RDNkSize=RDNkSize, RDNconfig=name_of(n_blocks, n_convs, growth))
        self.feature_layers = n_blocks // 3, 2 * n_blocks // 3
        self.SFENet1 = ImageConv(3, G0, RDNkSize)
        self.SFENet2 = conv(G0, G0, RDNkSize)
        self.RDBs = nn.ModuleList([RDB(G0, n_convs, growth) for _ in range(n_blocks)])
        self.GFF = nn.Sequential(conv(n_blocks * G0, G0, 1), conv(G0, G0, RDNkSize))
        layers, channels, half = [], G0, RDNkSize // 2
        reach = half  # of the convolution to the image, in its pixels; below, in those before each upsampling
        for factor in [3] if scale == 3 else [2] * (scale.bit_length() - 1):
            layers += [conv(channels, factor * factor * growth, RDNkSize), nn.PixelShuffle(factor)]
            channels, reach = growth, -(-reach // factor) + half
        self.UPNet = nn.Sequential(*layers, ImageConv(growth, 3, RDNkSize))
        # SFENet1, SFENet2 and GFF.1 reach half a kernel, each block's convolutions 1, the upsampling its own
        self.receptive_field = 3 * half + n_blocks * n_convs + reach

    def super_resolve(self, x, features):
        head = self.SFENet1(x)
        outputs = [self.SFENet2(head)]
        for block in self.RDBs:
            outputs.append(block(outputs[-1]))
        end = self.GFF(torch.cat(outputs[1:], 1)) + head
        return self.UPNet(end), [outputs[0], *(outputs[tap] for tap in self.feature_layers), end]


def sizes(config):
    """D, C, G of an RDNconfig; raises ValueError."""
    parts = PUBLISHED.get(config) or tuple(int(part) if part.strip().isdecimal() else 0 for part in str(config).split(","))
    if len(parts) != 3 or min(parts) < 1:
        raise ValueError(f"RDNconfig {config}: A, B, or three numbers D,C,G such as 16,8,64")
    return parts


def name_of(*parts):
    return next((name for name, published in PUBLISHED.items() if published == parts), ",".join(map(str, parts)))


def recognise(state):
    """(config, state) of an RDN in EDSR-PyTorch's layout, which is this file's, else None."""
    if not {"SFENet1.weight", "RDBs.0.convs.0.conv.0.weight", "UPNet.0.weight"} <= state.keys():
        return None
    n_feats, _, _, kernel = state["SFENet1.weight"].shape
    growth = state["RDBs.0.convs.0.conv.0.weight"].shape[0]
    parts = count(state, "RDBs.*.LFF.weight"), count(state, "RDBs.0.convs.*.conv.0.weight"), growth
    steps = count(state, "UPNet.*.weight") // 2  # 0, 2 and so on, of which the last is the convolution to the image
    factor = {4: 2, 9: 3}.get(state["UPNet.0.weight"].shape[0] / growth)
    if not parts[0] or not steps or not factor or (factor == 3 and steps > 1):
        return None
    return dict(scale=factor ** steps, G0=n_feats, RDNkSize=kernel, RDNconfig=name_of(*parts)), state
