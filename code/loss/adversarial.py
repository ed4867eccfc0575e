"""GAN: the student's images against the truth, judged by a discriminator that learns along.

In MCADKD (Ko et al., ICCVW 2025), and as an option in CSD (Wang et al., IJCAI 2021); the kinds are those of EDSR's code (Lim
et al., CVPRW 2017) and LSGAN. With D(x) the discriminator's score of an image, R the truth, S the student's:

           discriminator                                       student
GAN        softplus(-D(R)) + softplus(D(S))                    softplus(-D(S))             Goodfellow et al., NeurIPS 2014
LSGAN      (D(R) - 1)^2 / 2 + D(S)^2 / 2                       (D(S) - 1)^2 / 2            Mao et al., ICCV 2017
RGAN       as GAN, of D(R) - mean D(S) and D(S) - mean D(R)    the same, R and S swapped   Jolicoeur-Martineau, ICLR 2019
WGAN       D(S) - D(R), weights clipped to 0.01                -D(S)                       Arjovsky et al., ICML 2017
WGAN_GP    D(S) - D(R) + 10 (|grad D| - 1)^2 in between        -D(S)                       Gulrajani et al., NeurIPS 2017

each a mean over the batch. Departs from MCADKD's code, which applies the loss's weight twice, and from EDSR's, whose
discriminator normalises over the batch and clips WGAN's weights to 1.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from system.distributed import all_reduce_gradients, all_reduce_mean, global_batch_size, local_shard
from system.state import load_optimizer
from torch import nn
from torch.func import functional_call

from loss.step import Term

WIDTHS = 64, 64, 128, 128, 256, 256, 512, 512
HIDDEN = 1024
CLIP = 0.01  # of WGAN
PENALTY = 10  # of WGAN_GP


def make_discriminator():
    """N x 3 x H x W in [0, 1], of any size -> scores N x 1.

    An own choice, the widths and strides of SRGAN's (Ledig et al., CVPR 2017): 3x3 convolutions with leaky ReLU, every other
    with stride 2, and two linear layers. What reaches these is the mean over the positions, so that any size will do. Each
    image is normalised by itself, over channels and positions, instead of over the batch: the gradient penalty requires it
    (Gulrajani et al.) and several processes need share no statistics. Without any, WGAN's scores vanish or explode.
    """
    layers = [nn.Conv2d(3, WIDTHS[0], 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    for index, (before, width) in enumerate(pairwise(WIDTHS)):
        layers += [nn.Conv2d(before, width, 3, stride=2 - index % 2, padding=1), nn.GroupNorm(1, width, affine=False),
                   nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], HIDDEN),
                         nn.LeakyReLU(0.2, inplace=True), nn.Linear(HIDDEN, 1))


def discriminator_loss(kind, real, fake):
    """Scores -> scalar, without the gradient penalty of WGAN_GP."""
    if kind == "LSGAN":
        return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()
    if kind in ("WGAN", "WGAN_GP"):
        return fake.mean() - real.mean()
    if kind == "RGAN":
        real, fake = real - all_reduce_mean(fake.mean()), fake - all_reduce_mean(real.mean())
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(kind, real, fake):
    """Scores -> scalar; only RGAN looks at those of the real images."""
    if kind == "LSGAN":
        return 0.5 * (fake - 1).square().mean()
    if kind in ("WGAN", "WGAN_GP"):
        return -fake.mean()
    if kind == "RGAN":
        return discriminator_loss("RGAN", fake, real)
    return F.softplus(-fake).mean()


def gradient_penalty(discriminator, real, fake):
    """(|grad D| - 1)^2 at a random point between each real image and its fake one, from torch's generator."""
    part = local_shard(torch.rand(global_batch_size(len(real)), 1, 1, 1)).to(real, non_blocking=True)
    between = (part * real + (1 - part) * fake).requires_grad_()
    gradient, = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class Adversarial(Term):
    """GAN. The discriminator has an Adam of its own (--gan_lr, betas 0.9 and 0.99), whose state is in the term's state_dict.

    After each update of the student it learns, --gan_k times, from what the student made before that update.
    """
    needs = frozenset({"hr"})

    def __init__(self, setting):
        super().__init__(setting)
        self.args = setting.args
        self.discriminator = make_discriminator()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), self.args.gan_lr, betas=(0.9, 0.99), fused=True)

    def trained(self):
        return []

    def forward(self, step):
        weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}  # not to be trained here
        real, fake = None, functional_call(self.discriminator, weights, self.to_input(step.student.sr))
        if self.args.gan_type == "RGAN":
            real = functional_call(self.discriminator, weights, self.to_input(step.hr))
        return generator_loss(self.args.gan_type, real, fake)

    def update(self, step):
        kind, parameters = self.args.gan_type, list(self.discriminator.parameters())
        real, fake = self.to_input(step.hr), self.to_input(step.student.sr.detach())
        for _ in range(self.args.gan_k):
            loss = discriminator_loss(kind, *self.discriminator(torch.cat([real, fake])).chunk(2))
            if kind == "WGAN_GP":
                loss = loss + PENALTY * gradient_penalty(self.discriminator, real, fake)
            loss.backward()
            all_reduce_gradients(parameters)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if kind == "WGAN":
                with torch.no_grad():
                    torch._foreach_clamp_min_(parameters, -CLIP)
                    torch._foreach_clamp_max_(parameters, CLIP)

    def to_input(self, images):
        return images.to(next(self.discriminator.parameters()).dtype) / self.args.rgb_range

    def get_extra_state(self):
        return self.optimizer.state_dict()

    def set_extra_state(self, state):
        load_optimizer(self.optimizer, state)  # its learning rate stays --gan_lr, which a resumed run may change
