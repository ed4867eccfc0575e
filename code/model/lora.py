"""Low-rank adapters of the convolutions of a pretrained network (--lora_rank), as in DSCLoRA (Chai et al., CVPRW 2025).

To the weight of a convolution, out x in x k x k, the product B A of a rk x (in k) and an (out k) x rk matrix is added; A is
initialised at random, B with zeros. Only A and B are trained. Merged, the network has its own layout and costs nothing more.
DSCLoRA fine-tunes SPAN so, with the spatial affinity of FAKD (the term SA) against a teacher. As in its released code, all
weights and biases of the network remain as they are, and A is initialised like a linear layer; alpha / r is 1.
"""
import copy
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.func import functional_call

from model.common import Network
from system.errors import UserError


class LowRank(nn.Module):
    """The change of the weight of a convolution: the product of two matrices, at first 0."""

    def __init__(self, shape: Iterable[int], rank: int):
        super().__init__()
        self.shape = out_channels, in_channels, height, width = tuple(shape)
        self.A = nn.Parameter(torch.empty(rank * width, in_channels * width))
        self.B = nn.Parameter(torch.zeros(out_channels * height, rank * width))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self) -> torch.Tensor:
        """Compute the product in the shape of the weight."""
        return (self.B @ self.A).view(self.shape)


class LowRankAdapted(nn.Module):
    """A network of which only low-rank adapters of the convolutions are trained.

    Its state_dict holds the network and the adapters; `full_network` is the network with merged weights, which is saved and
    tested. Constant convolutions, such as MeanShift, have no adapter. Raises UserError for a rank above the number of
    channels.
    """

    def __init__(self, net: Network, rank: int):
        super().__init__()
        convs = {f"{name}.weight": module.weight for name, module in net.named_modules()
                 if isinstance(module, nn.Conv2d) and module.weight.requires_grad}
        channels = max((min(weight.shape[:2]) for weight in convs.values()), default=0)
        if rank > channels:
            raise UserError(f"--lora_rank {rank}: the convolutions of {type(net).__name__} have at most {channels} "
                            "channels; give a smaller rank")
        self.net = net.requires_grad_(False)
        self.names = list(convs)
        self.adapters = nn.ModuleList(LowRank(weight.shape, rank) for weight in convs.values())
        self.shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
        self.config, self.scale, self.n_feats = net.config, net.scale, net.n_feats
        self.window, self.receptive_field = net.window, net.receptive_field
        self.feature_channels = net.feature_channels

    @property
    def rgb_range(self) -> float:
        """The maximum of images, as set for the network."""
        return self.net.rgb_range

    def merged_weights(self) -> dict[str, torch.Tensor]:
        """Return {name: weight of a convolution plus its adapter}."""
        with torch.autocast(self.adapters[0].A.device.type, enabled=False):
            return {name: self.net.get_parameter(name) + adapter() for name, adapter in zip(self.names, self.adapters)}

    @property
    def full_network(self) -> Network:
        """A copy of the network with merged weights."""
        net = copy.deepcopy(self.net)
        net.load_state_dict(self.merged_weights(), strict=False)
        return net

    def forward(self, lr: torch.Tensor,
                features: bool = False) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Super-resolve a batch of LR images, as `Network.forward` does."""
        return functional_call(self.net, self.merged_weights(), (lr,), {"features": features})


def merged(net: nn.Module) -> nn.Module:
    """Return the network with merged adapters, which shares no weights with `net`; one without adapters as it is."""
    return net.full_network if isinstance(net, LowRankAdapted) else net


def merged_parameters(net: nn.Module) -> list[torch.Tensor]:
    """Return the parameters in their order in `merged(net)`."""
    if not isinstance(net, LowRankAdapted):
        return list(net.parameters())
    weights = net.merged_weights()
    return [weights.get(name, parameter) for name, parameter in net.net.named_parameters()]
