"""SAN: Second-Order Attention Network for Single Image Super-Resolution (Dai et al., CVPR 2019)."""
import torch
from torch import nn
from torch.nn import functional as F

from model.common import ImageConv, MeanShift, Network, Upsampler, conv, squeeze_and_excite
from model.layout import Layout, State, count, upsampler_scale

COVARIANCE_SIDE = 1000  # longer sides of a feature map are cropped to their centre, as in the authors' code
NONLOCAL_REDUCTION = 8  # of channels in the non-local block: its default inner width, and its unused attention


def covariance(x: torch.Tensor) -> torch.Tensor:
    """Compute the covariance of channels over the HW positions, divided by HW: N x C x H x W -> N x C x C."""
    x = x.flatten(2)
    x = x - x.mean(2, keepdim=True)
    return x @ x.transpose(-2, -1) / x.shape[2]


def square_root(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Compute the square roots of N x C x C symmetric positive semidefinite matrices by Newton-Schulz iteration.

    Source: Li et al., CVPR 2018.
    """
    # the iteration converges for norms below 1; the lower bound avoids 0 / 0 for the covariance of a single position
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-12)[:, None, None]
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    root = matrix / trace
    step = (3 * identity - root) / 2
    root, inverse = root @ step, step.expand_as(root)
    for _ in range(iterations - 2):
        step = (3 * identity - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    return root @ (3 * identity - inverse @ root) / 2 * trace.sqrt()


class SecondOrderAttention(nn.Module):
    """Second-order channel attention.

    Each channel is multiplied by a factor in [0, 1] that is computed from the row means of the square root of the channels'
    covariance.
    """

    def __init__(self, n_feats: int, reduction: int):
        super().__init__()
        self.conv_du = squeeze_and_excite(n_feats, reduction)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rescale the channels of N x n_feats x H x W."""
        excess = [side - COVARIANCE_SIDE for side in x.shape[2:]]
        top, left = ((number + abs(number)) // 4 for number in excess)  # max(number, 0) // 2, of symbolic sizes too
        middle = x[:, :, top:top + COVARIANCE_SIDE, left:left + COVARIANCE_SIDE]
        with torch.autocast(x.device.type, enabled=False):  # the iteration amplifies rounding errors
            middle = middle.to(torch.promote_types(x.dtype, torch.float32))
            pooled = square_root(covariance(middle)).mean(1)[..., None, None]
        return x * self.conv_du(pooled.to(x.dtype))


class NonLocal(nn.Module):
    """Non-local attention within each quadrant of the image, plus the input (Wang et al., CVPR 2018).

    Keys and values are max-pooled 2 x 2, as in the authors' code; the paper does not mention it. Autocast leaves the block
    in float32: the scores before the softmax are not scaled and grow with the range of the image.
    """

    def __init__(self, n_feats: int, n_inner: int):
        super().__init__()
        self.theta = conv(n_feats, n_inner, 1)
        self.phi = nn.Sequential(conv(n_feats, n_inner, 1))
        self.g = nn.Sequential(conv(n_feats, n_inner, 1))
        self.W = conv(n_inner, n_feats, 1)
        nn.init.zeros_(self.W.weight)
        nn.init.zeros_(self.W.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        heights, widths = ([part for part in (side // 2, side - side // 2) if part] for side in x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W.weight.dtype)
            inner = torch.cat([self.theta(x), self.phi(x), self.g(x)], 1)
            rows = [torch.cat([attend(quadrant) for quadrant in row.split(widths, 3)], 3) for row in inner.split(heights, 2)]
            return x + self.W(torch.cat(rows, 2))


def attend(inner: torch.Tensor) -> torch.Tensor:
    """Compute softmax attention over the positions: queries, keys and values N x 3E x H x W -> N x E x H x W."""
    n, channels, height, width = inner.shape
    query, key, value = inner.split(channels // 3, 1)
    pool = min(2, height), min(2, width)  # a quadrant may be narrower than 2; the authors' code fails on such images
    out = F.scaled_dot_product_attention(
        to_tokens(query), to_tokens(F.max_pool2d(key, pool)), to_tokens(F.max_pool2d(value, pool)), scale=1.0)
    return out[:, 0, :, :channels // 3].transpose(-2, -1).reshape(n, channels // 3, height, width)


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    """Rearrange N x E x H x W as N x 1 x HW x E, with E zero-padded to a multiple of 8.

    The memory-efficient attention kernels, which do not store the matrix of scores, require this form. Zeros do not change
    the scores.
    """
    return F.pad(x.flatten(2).transpose(-2, -1), (0, -x.shape[1] % 8)).contiguous()[:, None]


class NonLocalBlock(nn.Module):
    """The non-local block with the parameters that the released checkpoints hold."""

    def __init__(self, n_feats: int, n_inner: int):
        super().__init__()
        self.soca = SecondOrderAttention(n_feats, NONLOCAL_REDUCTION)  # unused: see SAN
        self.non_local = NonLocal(n_feats, n_inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        return self.non_local(x)


class ResidualBlock(nn.Module):
    """Residual block: convolution, ReLU, convolution, plus the input."""

    def __init__(self, n_feats: int):
        super().__init__()
        self.conv_first = nn.Sequential(conv(n_feats, n_feats), nn.ReLU(inplace=True), conv(n_feats, n_feats))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x n_feats x H x W."""
        return x + self.conv_first(x)


class AttentionGroup(nn.Module):
    """Local-source residual attention group."""

    def __init__(self, n_resblocks: int, n_feats: int, reduction: int):
        super().__init__()
        self.rcab = nn.Sequential(*[ResidualBlock(n_feats) for _ in range(n_resblocks)])
        self.soca = SecondOrderAttention(n_feats, reduction)
        self.conv_last = conv(n_feats, n_feats)
        self.gamma = nn.Parameter(torch.zeros(1))  # unused: see SAN

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the group on N x n_feats x H x W."""
        return x + self.conv_last(self.soca(self.rcab(x)))


class SAN(Network):
    """SAN; its receptive field is the whole image, over which covariances pool and which is divided into quadrants.

    n_inner: channels inside the non-local block; n_feats // 8 in the authors' checkpoints, n_feats // 4 in FAKD's. Raises
    ValueError for sizes that leave no channels.

    Three kinds of parameters are unused and get no gradient: `conv_last` of the network, `gamma` of each group, and `soca`
    of the non-local block. The authors' checkpoints hold them and the published numbers of parameters include them.
    """

    def __init__(self, scale: int, n_resgroups: int = 6, n_resblocks: int = 10, n_feats: int = 64, reduction: int = 16,
                 n_inner: int | None = None):
        super().__init__()
        n_inner = n_feats // NONLOCAL_REDUCTION if n_inner is None else n_inner
        if reduction > n_feats or n_feats < NONLOCAL_REDUCTION or n_inner < 1:
            raise ValueError(f"reduction {max(reduction, NONLOCAL_REDUCTION)} of {n_feats} channels leaves none")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_resgroups=n_resgroups, n_resblocks=n_resblocks, n_feats=n_feats,
                           reduction=reduction, n_inner=n_inner)
        self.feature_layers = -(-n_resgroups // 3), -(-2 * n_resgroups // 3)  # 7 and 14 of 20, 2 and 4 of 6, as in FAKD
        self.sub_mean = MeanShift(-1)
        self.head = nn.Sequential(ImageConv(3, n_feats))
        self.non_local = NonLocalBlock(n_feats, n_inner)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.RG = nn.ModuleList([AttentionGroup(n_resblocks, n_feats, reduction) for _ in range(n_resgroups)])
        self.conv_last = conv(n_feats, n_feats)
        self.tail = nn.Sequential(Upsampler(scale, n_feats), ImageConv(n_feats, 3))
        self.add_mean = MeanShift(1)

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        head = self.head(self.sub_mean(x))
        x = source = self.non_local(head)
        middle = []
        for done, group in enumerate(self.RG, start=1):
            x = group(x) + self.gamma * source
            if features:
                middle += [x] * self.feature_layers.count(done)
        x = self.non_local(x)
        sr = self.add_mean(self.tail(x + head))
        return sr, [head, *middle, x]  # f3 excludes the long skip connection, as in FAKD's code


def read_config(state: State) -> dict:
    """Read the arguments of SAN from names and shapes."""
    n_feats = state["head.0.weight"].shape[0]
    return dict(scale=upsampler_scale(state, "tail.0", n_feats), n_resgroups=count(state, "RG.*.conv_last.weight"),
                n_resblocks=count(state, "RG.0.rcab.*.conv_first.0.weight"), n_feats=n_feats,
                reduction=n_feats // state["RG.0.soca.conv_du.0.weight"].shape[0],
                n_inner=state["non_local.non_local.theta.weight"].shape[0])


LAYOUTS = (Layout("the authors", ("head.0.weight", "non_local.non_local.theta.weight", "RG.0.rcab.0.conv_first.0.weight",
                                  "RG.0.soca.conv_du.0.weight", "tail.0.0.weight", "tail.1.weight"), read_config),)
