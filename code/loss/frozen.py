"""Frozen feature networks of the loss: pretrained ones, and untrained ones for experiments without their checkpoints.

Each is built once per run, in `context.shared`. A term does not register it as a submodule (`object.__setattr__`), so that
it is in no state_dict and no optimiser. The feature maps of an image are computed once in a step, by `compute_once`. `title`
is the network's name in messages.
"""
import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from torch import nn

from loss.term import Context, LossInputs
from model.loading import CheckpointError

log = logging.getLogger("sr")


def frozen(context: Context, name: str, make: Callable[[Namespace], nn.Module]) -> nn.Module:
    """Return the run's network `name`, which `make(args)` builds on first use: in eval mode, with frozen weights.

    With --feature_precision bf16 its convolutions hold and compute bfloat16; images, normalisation, codes and the feature
    maps that it returns are float32.
    """
    if name not in context.shared:
        net = make(context.args).eval().requires_grad_(False)
        if context.args.feature_precision == "bf16":
            for layer in net.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.bfloat16()
        context.shared[name] = net.to(context.device, memory_format=torch.channels_last)
    return context.shared[name]


def compute_once(inputs: LossInputs, key: Hashable, compute: Callable) -> object:
    """Return `compute()`, which is called once for each key on these inputs and shared by all terms."""
    if key not in inputs.cache:
        inputs.cache[key] = compute()
    return inputs.cache[key]


def require_file(path: Path | str, name: str, flag: str) -> None:
    """Raise CheckpointError, with ways to get the file, where the released file of a network is missing."""
    try:
        os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; get it with bash scripts/download_teacher.sh {name}, give another "
                              f"file with {flag}, or an untrained network with --feature_net random") from None
    except OSError:
        pass  # read_checkpoint reports the reason


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Initialise a network with He et al.'s normal distribution, from a generator with that seed, and return it."""
    log.info("--feature_net random: the %s is untrained; its terms are for trying out a command, not for results", net.title)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            gain = 1 if name.endswith("embedding.weight") else math.sqrt(2)
            state[name] = torch.randn(parameter.shape, generator=generator) * (gain / math.sqrt(parameter[0].numel()))
        else:
            state[name] = torch.full(parameter.shape, float(name.endswith("weight")))  # normalisation: 1; bias: 0
    net.load_state_dict(state)
    return net


def new_network(network: type[nn.Module], **sizes) -> nn.Module:
    """Build a network without a change to the state of the run's random number generator."""
    with torch.random.fork_rng(devices=[]):
        return network(**sizes)
