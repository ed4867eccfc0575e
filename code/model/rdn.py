"""RDN: Residual Dense Network for Image Super-Resolution (Zhang et al., CVPR 2018)."""
import torch
from torch import nn

from model.common import ImageConv, Network, conv, upsampling_factors
from model.layout import Layout, State, count

PUBLISHED = {"A": (20, 6, 32), "B": (16, 8, 64)}  # D blocks, C convolutions per block, growth rate G


class DenseConv(nn.Module):
    """A convolution with ReLU whose output is concatenated to its input."""

    def __init__(self, in_channels: int, growth: int):
        super().__init__()
        self.conv = nn.Sequential(conv(in_channels, growth), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map N x in_channels x H x W to N x (in_channels + growth) x H x W."""
        return torch.cat([x, self.conv(x)], 1)


class RDB(nn.Module):
    """Residual dense block: densely connected convolutions, a 1x1 convolution (local feature fusion), plus the input."""

    def __init__(self, n_feats: int, n_convs: int, growth: int):
        super().__init__()
        self.convs = nn.Sequential(*[DenseConv(n_feats + n * growth, growth) for n in range(n_convs)])
        self.LFF = conv(n_feats + n_convs * growth, n_feats, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        return self.LFF(self.convs(x)) + x


class RDN(Network):
    """RDN, which subtracts no mean.

    G0: channels of the feature maps. RDNconfig: "A" or "B" of the paper, or "D,C,G" for D blocks of C convolutions with
    growth rate G. RDNkSize: size of the kernels outside of the blocks, as in EDSR-PyTorch; inside it is 3. Raises ValueError
    for an even RDNkSize and a malformed RDNconfig.
    """

    scales = 2, 3, 4, 8

    def __init__(self, scale: int, G0: int = 64, RDNkSize: int = 3, RDNconfig: str = "A"):
        super().__init__()
        self.require_scale(scale)
        n_blocks, n_convs, growth = parse_config(RDNconfig)
        if RDNkSize % 2 == 0:
            raise ValueError(f"RDNkSize {RDNkSize} is even; it must be odd")
        self.scale, self.n_feats = scale, G0
        self.config = dict(scale=scale, G0=G0, RDNkSize=RDNkSize, RDNconfig=format_config(n_blocks, n_convs, growth))
        self.feature_layers = n_blocks // 3, 2 * n_blocks // 3
        self.SFENet1 = ImageConv(3, G0, RDNkSize)
        self.SFENet2 = conv(G0, G0, RDNkSize)
        self.RDBs = nn.ModuleList([RDB(G0, n_convs, growth) for _ in range(n_blocks)])
        self.GFF = nn.Sequential(conv(n_blocks * G0, G0, 1), conv(G0, G0, RDNkSize))
        layers, channels, half = [], G0, RDNkSize // 2
        reach = half  # of the last convolution, in SR pixels; in the loop, in pixels before each upsampling step
        for factor in upsampling_factors(scale):
            layers += [conv(channels, factor * factor * growth, RDNkSize), nn.PixelShuffle(factor)]
            channels, reach = growth, -(-reach // factor) + half
        self.UPNet = nn.Sequential(*layers, ImageConv(growth, 3, RDNkSize))
        # SFENet1, SFENet2 and GFF.1 half a kernel each, every convolution of a block 1, the upsampler `reach`
        self.receptive_field = 3 * half + n_blocks * n_convs + reach

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        head = self.SFENet1(x)
        outputs = [self.SFENet2(head)]
        for block in self.RDBs:
            outputs.append(block(outputs[-1]))
        end = self.GFF(torch.cat(outputs[1:], 1)) + head
        return self.UPNet(end), [outputs[0], *(outputs[layer] for layer in self.feature_layers), end]


def parse_config(config: str) -> tuple[int, int, int]:
    """Return D, C and G of an RDNconfig; raises ValueError."""
    sizes = PUBLISHED.get(config) or tuple(int(part) if part.strip().isdecimal() else 0 for part in str(config).split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"RDNconfig {config}: A, B, or three numbers D,C,G such as 16,8,64")
    return sizes


def format_config(*sizes: int) -> str:
    """Return the RDNconfig of D, C and G: A or B where it is published, else the numbers."""
    return next((name for name, published in PUBLISHED.items() if published == sizes), ",".join(map(str, sizes)))


def read_config(state: State) -> dict:
    """Read the arguments of RDN from names and shapes; raises ValueError where the upsampler has no known scale."""
    n_feats, _, _, kernel_size = state["SFENet1.weight"].shape
    growth = state["RDBs.0.convs.0.conv.0.weight"].shape[0]
    n_blocks, n_convs = count(state, "RDBs.*.LFF.weight"), count(state, "RDBs.0.convs.*.conv.0.weight")
    steps = count(state, "UPNet.*.weight") // 2  # convolutions are number 0, 2, ..., the last of them to the image
    factor = {4: 2, 9: 3}.get(state["UPNet.0.weight"].shape[0] / growth)
    if not steps or not factor or (factor == 3 and steps > 1):
        raise ValueError("UPNet is no upsampler")
    return dict(scale=factor ** steps, G0=n_feats, RDNkSize=kernel_size, RDNconfig=format_config(n_blocks, n_convs, growth))


LAYOUTS = (Layout("EDSR-PyTorch", ("SFENet1.weight", "SFENet2.weight", "RDBs.0.convs.0.conv.0.weight", "RDBs.0.LFF.weight",
                                   "GFF.0.weight", "UPNet.0.weight"), read_config),)
