"""SAN: Second-Order Attention Network for Single Image Super-Resolution (Dai et al., CVPR 2019)."""
import torch
from torch import nn
from torch.nn import functional as F

from model.common import (
    ImageConv,
    MeanShift,
    Network,
    Upsampler,
    conv,
    count,
    squeeze_and_excite,
    upsampler_scale,
    with_default_means,
)

COVARIANCE_SIDE = 1000  # a longer side is cut to its middle for the covariance, as in the authors' code
NONLOCAL_REDUCTION = 8  # of the unused attention in the non-local block, and of its inner width by default


def covariance(x):
    """N x C x H x W -> N x C x C: of the channels over the positions, divided by their number M = H W."""
    x = x.flatten(2)
    x = x - x.mean(2, keepdim=True)
    return x @ x.mT / x.shape[2]


def square_root(matrix, iterations=5):
    """N x C x C, symmetric and positive -> its square root by Newton-Schulz (Li et al., CVPR 2018)."""
    # the iteration converges for a norm below 1; the floor is for an image of a single position, which varies in nothing
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
    """Scales each channel by a sigmoid of what the square root of the channels' covariance says, row by row."""

    def __init__(self, n_feats, reduction):
        super().__init__()
        self.conv_du = squeeze_and_excite(n_feats, reduction)

    def forward(self, x):
        middle = x
        for dim in (2, 3):
            if x.shape[dim] > COVARIANCE_SIDE:
                middle = middle.narrow(dim, (x.shape[dim] - COVARIANCE_SIDE) // 2, COVARIANCE_SIDE)
        with torch.autocast(x.device.type, enabled=False):  # the iteration squares its rounding errors
            middle = middle.to(torch.promote_types(x.dtype, torch.float32))
            pooled = square_root(covariance(middle)).mean(1)[..., None, None]
        return x * self.conv_du(pooled.to(x.dtype))


class NonLocal(nn.Module):
    """Adds to each position what a softmax over its quadrant's positions gathers (Wang et al., CVPR 2018).

    What is gathered is max-pooled 2 x 2 first, as in the authors' code; the paper does not say so. In float32 under any
    autocast: the products that are exponentiated are not scaled, and grow with the image's range.
    """

    def __init__(self, n_feats, n_inner):
        super().__init__()
        self.theta = conv(n_feats, n_inner, 1)
        self.phi = nn.Sequential(conv(n_feats, n_inner, 1))
        self.g = nn.Sequential(conv(n_feats, n_inner, 1))
        self.W = conv(n_inner, n_feats, 1)
        nn.init.zeros_(self.W.weight)
        nn.init.zeros_(self.W.bias)

    def forward(self, x):
        heights, widths = ([part for part in (side // 2, side - side // 2) if part] for side in x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W.weight.dtype)
            inner = torch.cat([self.theta(x), self.phi(x), self.g(x)], 1)
            rows = [torch.cat([gather(quadrant) for quadrant in row.split(widths, 3)], 3) for row in inner.split(heights, 2)]
            return x + self.W(torch.cat(rows, 2))


def gather(inner):
    """Queries, keys and values N x 3E x H x W -> N x E x H x W."""
    n, channels, height, width = inner.shape
    query, key, value = inner.split(channels // 3, 1)
    pool = min(2, height), min(2, width)  # images of less than 4 pixels, which the authors' code cannot take, have no 2 x 2
    out = F.scaled_dot_product_attention(
        rows_of(query), rows_of(F.max_pool2d(key, pool)), rows_of(F.max_pool2d(value, pool)), scale=1.0)
    return out[:, 0, :, :channels // 3].mT.reshape(n, channels // 3, height, width)


def rows_of(x):
    """N x E x H x W -> N x 1 x HW x E; E up to a multiple of 8 with zeros, which change no product.

    In that form, and no other, the kernels that never hold the matrix of all pairs of positions take it.
    """
    return F.pad(x.flatten(2).mT, (0, -x.shape[1] % 8)).contiguous()[:, None]


class NonLocalBlock(nn.Module):
    def __init__(self, n_feats, n_inner):
        super().__init__()
        self.soca = SecondOrderAttention(n_feats, NONLOCAL_REDUCTION)  # unused: see SAN
        self.non_local = NonLocal(n_feats, n_inner)

    def forward(self, x):
        return self.non_local(x)


class ResidualBlock(nn.Module):
    def __init__(self, n_feats):
        super().__init__()
        self.conv_first = nn.Sequential(conv(n_feats, n_feats), nn.ReLU(inplace=True), conv(n_feats, n_feats))

    def forward(self, x):
        return x + self.conv_first(x)


class AttentionGroup(nn.Module):
    """Local-source residual attention group."""

    def __init__(self, n_resblocks, n_feats, reduction):
        super().__init__()
        self.rcab = nn.Sequential(*[ResidualBlock(n_feats) for _ in range(n_resblocks)])
        self.soca = SecondOrderAttention(n_feats, reduction)
        self.conv_last = conv(n_feats, n_feats)
        self.gamma = nn.Parameter(torch.zeros(1))  # unused: see SAN

    def forward(self, x):
        return x + self.conv_last(self.soca(self.rcab(x)))


class SAN(Network):
    """Its receptive field is the whole image: covariances pool over it, and quadrants depend on where its middle is.

    Four parts do nothing and get no gradient: `conv_last` here, `gamma` of each group, and the attention `soca` of the
    non-local block. The authors' files hold them, and the published counts include them, so they are parameters here too.

    n_inner: width of the non-local block; n_feats // 8 in the authors' release, n_feats // 4 in FAKD's.
    """

    def __init__(self, scale, n_resgroups=6, n_resblocks=10, n_feats=64, reduction=16, n_inner=None):
        super().__init__()
        n_inner = n_feats // NONLOCAL_REDUCTION if n_inner is None else n_inner
        if reduction > n_feats or n_feats < NONLOCAL_REDUCTION or n_inner < 1:
            raise ValueError(f"reduction {max(reduction, NONLOCAL_REDUCTION)} of {n_feats} channels leaves none")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_resgroups=n_resgroups, n_resblocks=n_resblocks, n_feats=n_feats,
                           reduction=reduction, n_inner=n_inner)
        self.feature_layers = -(-n_resgroups // 3), -(-2 * n_resgroups // 3)  # 7 and 14 of 20, 2 and 4 of 6, as in FAKD
        self.sub_mean = MeanShift(-1, trainable=True)
        self.head = nn.Sequential(ImageConv(3, n_feats))
        self.non_local = NonLocalBlock(n_feats, n_inner)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.RG = nn.ModuleList([AttentionGroup(n_resblocks, n_feats, reduction) for _ in range(n_resgroups)])
        self.conv_last = conv(n_feats, n_feats)
        self.tail = nn.Sequential(Upsampler(scale, n_feats), ImageConv(n_feats, 3))
        self.add_mean = MeanShift(1, trainable=True)

    def super_resolve(self, x, features):
        head = self.head(self.sub_mean(x))
        x = source = self.non_local(head)
        middle = []
        for done, group in enumerate(self.RG, start=1):
            x = group(x) + self.gamma * source
            if features:
                middle += [x] * self.feature_layers.count(done)
        x = self.non_local(x)
        sr = self.add_mean(self.tail(x + head))
        return sr, [head, *middle, x]  # map 3 is without the long skip, as in FAKD's code


def recognise(state):
    """(config, state) of a SAN as the authors or FAKD released it, else None."""
    squeeze, theta = (state.get(f"{name}.weight") for name in ("RG.0.soca.conv_du.0", "non_local.non_local.theta"))
    if squeeze is None or theta is None or not {"head.0.weight", "RG.0.rcab.0.conv_first.0.weight"} <= state.keys():
        return None
    n_feats = state["head.0.weight"].shape[0]
    scale = upsampler_scale(state, "tail.0.", n_feats)
    config = dict(scale=scale, n_resgroups=count(state, "RG.*.conv_last.weight"),
                  n_resblocks=count(state, "RG.0.rcab.*.conv_first.0.weight"), n_feats=n_feats,
                  reduction=n_feats // squeeze.shape[0], n_inner=theta.shape[0])
    return (config, with_default_means(state)) if scale else None
