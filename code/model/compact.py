"""Compact: SRVGGNetCompact of Real-ESRGAN (Wang et al., ICCVW 2021), a plain network for fast super-resolution."""
import math

import torch
from torch import nn

from model.common import Network
from model.layout import Layout, State, count
from model.reparameterisation import conv3x3

ACTIVATIONS = {
    "prelu": nn.PReLU,
    "relu": lambda n_feats: nn.ReLU(inplace=True),
    "leakyrelu": lambda n_feats: nn.LeakyReLU(0.1, inplace=True),
}


class Compact(Network):
    """3x3 convolutions at LR size, an activation after each; a sub-pixel convolution; plus the nearest upsampled input.

    n_convs: convolutions between the first and the last. act_type: prelu (one slope per channel), relu or leakyrelu.
    reparameterise: the block of model/reparameterisation.py that each convolution is for training, or `none`. Raises
    ValueError for another word.
    """

    native_range = 1

    def __init__(self, scale: int, n_feats: int = 64, n_convs: int = 16, act_type: str = "prelu",
                 reparameterise: str = "none"):
        super().__init__()
        if act_type not in ACTIVATIONS:
            raise ValueError(f"act_type {act_type} is none of {', '.join(ACTIVATIONS)}")
        self.scale, self.n_feats = scale, n_feats
        self.config = dict(scale=scale, n_feats=n_feats, n_convs=n_convs, act_type=act_type,
                           reparameterise=reparameterise)
        self.receptive_field = n_convs + 2
        self.kept = 0, n_convs // 3, 2 * n_convs // 3, n_convs  # convolutions after the first, at the four feature maps
        layers = [conv3x3(3, n_feats, reparameterise, image=True),
                  *(conv3x3(n_feats, n_feats, reparameterise) for _ in range(n_convs))]
        self.body = nn.ModuleList([module for layer in layers for module in (layer, ACTIVATIONS[act_type](n_feats))])
        self.body.append(conv3x3(n_feats, 3 * scale * scale, reparameterise, image=True))

    def super_resolve(self, x: torch.Tensor, features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the SR image and the feature maps, as `Network.super_resolve` describes."""
        *layers, last = self.body
        feature_maps, y = {}, x
        for number, (layer, activation) in enumerate(zip(layers[::2], layers[1::2])):
            y = activation(layer(y))
            if features:
                feature_maps[number] = y
        sr = nn.functional.pixel_shuffle(last(y), self.scale)
        sr = sr + nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")
        return sr, [feature_maps[number] for number in self.kept] if features else []

    def block_name(self, name: str) -> str:
        """Return a parameter's name with the convolutions and activations of the body numbered as blocks."""
        _, number, rest = name.split(".", 2)
        block, is_activation = divmod(int(number), 2)
        kind = "activation" if is_activation else "conv"
        place = {0: "head", self.config["n_convs"] + 1: "tail"}.get(block, f"blocks.{block - 1}")
        return f"{place}.{kind}.{rest}"


def read_config(state: State) -> dict:
    """Read the arguments of Compact from names and shapes, which do not tell relu and leakyrelu apart.

    Raises ValueError where the scale is not an integer or the first convolution takes no RGB images.
    """
    n_feats, in_channels = state["body.0.weight"].shape[:2]
    n_convs = count(state, "body.*") // 2 - 1
    channels = state[f"body.{2 * n_convs + 2}.weight"].shape[0]
    scale = math.isqrt(channels // 3)
    if in_channels != 3 or scale < 1 or channels != 3 * scale * scale:
        raise ValueError(f"{in_channels} channels before the first convolution, {channels} after the last")
    return dict(scale=scale, n_feats=n_feats, n_convs=n_convs, act_type="prelu" if "body.1.weight" in state else "relu",
                reparameterise="none")


LAYOUTS = (Layout("Real-ESRGAN", ("body.0.weight", "body.2.weight", "body.4.weight"), read_config),)
