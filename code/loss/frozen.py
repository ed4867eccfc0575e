"""Networks that judge images and are never trained: from their released files, or untrained ones for trying things out.

A run holds each once, in `context.shared`; a term keeps it outside of its own modules (`object.__setattr__`), so that it is
in no state_dict and no optimiser. A step runs each image through it once, by `once`. `title` is its name in messages.
"""
import logging
import math
from pathlib import Path

import torch

from model.loading import CheckpointError

log = logging.getLogger("sr")


def frozen(context, name, make):
    """The network `name` of this run: `make(args)` is called once; no gradients, eval mode, on the run's device."""
    if name not in context.shared:
        context.shared[name] = make(context.args).eval().requires_grad_(False)
        context.shared[name].to(context.device, memory_format=torch.channels_last)
    return context.shared[name]


def once(inputs, key, compute):
    """`compute()` of the first term that asks for `key` on these inputs, for all."""
    if key not in inputs.cache:
        inputs.cache[key] = compute()
    return inputs.cache[key]


def require_file(path, name, flag):
    """Raises CheckpointError with what to do where the released file of a network is not there."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; get it with bash scripts/download_teacher.sh {name}, name another "
                              f"place with {flag}, or try things out with --feature_net random")


def randomise(net, seed=0):
    """Untrained weights for a network: normal by He et al.'s rule, from a generator of its own."""
    log.info("--feature_net random: the %s is an untrained one, its terms are for trying things out only", net.title)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            gain = 1 if name.endswith("embedding.weight") else math.sqrt(2)
            state[name] = torch.randn(parameter.shape, generator=generator) * (gain / math.sqrt(parameter[0].numel()))
        else:
            state[name] = torch.full(parameter.shape, float(name.endswith("weight")))  # of a normalisation; else a bias
    net.load_state_dict(state)
    return net


def build(network, **sizes):
    """A new network, whose initial weights take nothing from the run's random numbers."""
    with torch.random.fork_rng(devices=[]):
        return network(**sizes)
