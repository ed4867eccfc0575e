"""The optimiser and the learning rate of each iteration."""
import math
from argparse import Namespace
from collections.abc import Iterable

import torch
from torch import nn

from muon import Muon
from option_types import Iterations


def make_optimizer(args: Namespace, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimiser of --optimizer with its flags."""
    shared = dict(lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "ADAM":
        return torch.optim.Adam(parameters, betas=args.betas, eps=args.epsilon, fused=True, **shared)
    if args.optimizer == "ADAMW":  # Loshchilov and Hutter, ICLR 2019: decoupled weight decay
        return torch.optim.AdamW(parameters, betas=args.betas, eps=args.epsilon, fused=True, **shared)
    if args.optimizer == "MUON":
        return Muon(parameters, betas=args.betas, eps=args.epsilon, **shared)
    if args.optimizer == "SGD":
        return torch.optim.SGD(parameters, momentum=args.momentum, fused=True, **shared)
    return torch.optim.RMSprop(parameters, momentum=args.momentum, eps=args.epsilon, **shared)


def learning_rate(args: Namespace, iteration: int) -> float:
    """Return the learning rate of an iteration in 0 .. epochs x test_every - 1.

    Over the first --warmup iterations it rises linearly to its full value, in the last of them; cosine decay begins after,
    and not before --decay_from.
    """
    if iteration < args.warmup:
        return _after_warmup(args, iteration) * (iteration + 1) / args.warmup
    return _after_warmup(args, iteration)


def _after_warmup(args, iteration):
    if args.decay == "cosine":
        start = max(args.warmup, args.decay_from)
        part = (iteration - start) / (args.epochs * args.test_every - start) if iteration > start else 0
        return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * part))
    # epochs are counted from 1, and --decay 150 acts in the 150th already: EDSR-PyTorch steps its scheduler before an epoch
    reached = iteration if isinstance(args.decay, Iterations) else iteration // args.test_every + 1
    return args.lr * args.gamma ** sum(reached >= step for step in args.decay)
