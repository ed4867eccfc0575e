"""GAN: adversarial loss with a discriminator that is trained alternately.

Used by MCADKD (Ko et al., ICCVW 2025), and an option of CSD (Wang et al., IJCAI 2021); the kinds are those of EDSR's code
(Lim et al., CVPRW 2017) and LSGAN. D(x) is the discriminator's score of an image (srgan) or of each pixel (unet, that of
MCADKD), R the ground truth, S the student's output:

           discriminator                                       student
GAN        softplus(-D(R)) + softplus(D(S))                    softplus(-D(S))             Goodfellow et al., NeurIPS 2014
LSGAN      (D(R) - 1)^2 / 2 + D(S)^2 / 2                       (D(S) - 1)^2 / 2            Mao et al., ICCV 2017
RGAN       as GAN, of D(R) - mean D(S) and D(S) - mean D(R)    the same, R and S swapped   Jolicoeur-Martineau, ICLR 2019
WGAN       D(S) - D(R), weights clipped to 0.01                -D(S)                       Arjovsky et al., ICML 2017
WGAN_GP    D(S) - D(R) + 10 (|grad D| - 1)^2 in between        -D(S)                       Gulrajani et al., NeurIPS 2017

each a mean over the batch and the pixels. Departs from MCADKD's code, see the table of departures in scripts/README.md, and
from EDSR's, whose discriminator normalises over the batch and clips WGAN's weights to 1.
"""
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from loss.term import Context, LossInputs, Term
from system.distributed import all_reduce_gradients, all_reduce_mean, global_batch_size, local_shard
from system.errors import UserError
from system.state import load_optimizer

WIDTHS = 64, 64, 128, 128, 256, 256, 512, 512
HIDDEN = 1024
UNET_WIDTH, UNET_SIDE = 64, 8  # channels; smallest side of an image
POWER_ITERATIONS = 15  # of the spectral norms of a new discriminator, as many as torch.nn.utils.parametrizations makes
CLIP = 0.01  # of WGAN
PENALTY = 10  # of WGAN_GP


def make_discriminator() -> nn.Sequential:
    """Build a discriminator: N x 3 x H x W in [0, 1], of any size -> scores N x 1.

    Widths and strides are SRGAN's (Ledig et al., CVPR 2017): 3x3 convolutions with leaky ReLU, every other with stride 2,
    then, as an addition, global average pooling for inputs of any size, and two linear layers. Each image is normalised over
    its own channels and positions, not over the batch: the gradient penalty requires that (Gulrajani et al.), and several
    processes then share no statistics. Without normalisation WGAN's scores vanish or explode.
    """
    layers = [nn.Conv2d(3, WIDTHS[0], 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    for index, (before, width) in enumerate(pairwise(WIDTHS)):
        layers += [nn.Conv2d(before, width, 3, stride=2 - index % 2, padding=1), nn.GroupNorm(1, width, affine=False),
                   nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], HIDDEN),
                         nn.LeakyReLU(0.2, inplace=True), nn.Linear(HIDDEN, 1))


class UNetDiscriminator(nn.Module):
    """UNetDiscriminatorSN of Real-ESRGAN (Wang et al., ICCVW 2021), MCADKD's: a U-Net with spectral normalisation.

    Images N x 3 x H x W in [0, 1], whose sides are 8 pixels or more -> scores N x 1 x H x W. Parameters have the authors'
    names. In training mode each forward pass is one power iteration of the spectral norms, which are constant otherwise.
    """

    def __init__(self, width: int = UNET_WIDTH):
        super().__init__()
        widths = width, 2 * width, 4 * width, 8 * width
        self.conv0 = nn.Conv2d(3, width, 3, padding=1)
        for number, pair in enumerate(pairwise(widths), 1):
            self.add_module(f"conv{number}", normalised(nn.Conv2d(*pair, 4, stride=2, padding=1, bias=False)))
        for number, pair in enumerate((*pairwise(reversed(widths)), (width, width), (width, width)), 4):
            self.add_module(f"conv{number}", normalised(nn.Conv2d(*pair, 3, padding=1, bias=False)))
        self.conv9 = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the scores of the pixels."""
        x = F.leaky_relu(self.conv0(x), 0.2)
        skipped = []
        for layer in (self.conv1, self.conv2, self.conv3):
            skipped.append(x)
            x = F.leaky_relu(layer(x), 0.2)
        for layer in (self.conv4, self.conv5, self.conv6):
            skip = skipped.pop()
            x = F.interpolate(x, skip.shape[2:], mode="bilinear")  # twice the size where the sides are multiples of 8
            x = F.leaky_relu(layer(x), 0.2) + skip
        for layer in (self.conv7, self.conv8):
            x = F.leaky_relu(layer(x), 0.2)
        return self.conv9(x)


def normalised(layer: nn.Module) -> nn.Module:
    """Divide a layer's weight by an estimate of its largest singular value (Miyato et al., ICLR 2018)."""
    return nn.utils.spectral_norm(layer)


def discriminator_loss(kind: str, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Compute the discriminator's loss from its scores, without the gradient penalty of WGAN_GP."""
    if kind == "LSGAN":
        return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()
    if kind in ("WGAN", "WGAN_GP"):
        return fake.mean() - real.mean()
    if kind == "RGAN":
        real, fake = real - all_reduce_mean(fake.mean()), fake - all_reduce_mean(real.mean())
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(kind: str, real: torch.Tensor | None, fake: torch.Tensor) -> torch.Tensor:
    """Compute the student's loss from the discriminator's scores; only RGAN needs those of real images."""
    if kind == "LSGAN":
        return 0.5 * (fake - 1).square().mean()
    if kind in ("WGAN", "WGAN_GP"):
        return -fake.mean()
    if kind == "RGAN":
        return discriminator_loss("RGAN", fake, real)
    return F.softplus(-fake).mean()


def gradient_penalty(discriminator: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Compute the mean of (|grad D| - 1)^2 at a random point between each real image and its fake one."""
    part = local_shard(torch.rand(global_batch_size(len(real)), 1, 1, 1)).to(real, non_blocking=True)
    between = (part * real + (1 - part) * fake).requires_grad_()
    scores = discriminator(between)
    gradient, = torch.autograd.grad(scores.sum() / scores[0].numel(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class Adversarial(Term):
    """GAN: the generator's loss. In each iteration the discriminator is updated `steps` times.

    kind: one of the table above. net: `srgan` or `unet`. The discriminator is trained on the outputs that the student had
    before its update, with Adam of learning rate `lr` and betas 0.9 and 0.99, whose state is in the term's state_dict.
    order: `after`, the discriminator is updated after the student; `before`, it is updated in the forward pass on the
    original batch, with half of its loss, as in MCADKD's code. Images are in [0, rgb_range].
    """

    needs = frozenset({"hr"})

    def __init__(self, kind: str = "GAN", steps: int = 1, lr: float = 1e-4, rgb_range: float = 255, net: str = "srgan",
                 order: str = "after"):
        super().__init__()
        self.kind, self.steps, self.rgb_range, self.order = kind, steps, rgb_range, order
        self.discriminator = DISCRIMINATORS[net]()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr, betas=(0.9, 0.99), fused=True)
        if order == "after" and net == "unet":  # without power iterations the first scores would be about 1e16
            with torch.no_grad():
                for _ in range(POWER_ITERATIONS):
                    self.discriminator(torch.zeros(1, 3, UNET_SIDE, UNET_SIDE))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield nothing: the discriminator has an optimiser of its own."""
        return iter(())

    def forward(self, inputs: LossInputs) -> torch.Tensor:
        """Compute the student's loss from the scores of the discriminator, whose weights are constants here."""
        if self.order == "before" and inputs.view == "original":
            self.update_discriminator(inputs, 0.5)
        self.discriminator.eval()  # without an iteration of the spectral norms
        constants = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        real, fake = None, functional_call(self.discriminator, constants, self.to_input(inputs.student.sr))
        if self.kind == "RGAN":
            real = functional_call(self.discriminator, constants, self.to_input(inputs.hr))
        return generator_loss(self.kind, real, fake)

    def update(self, inputs: LossInputs) -> None:
        """Update the discriminator after the student."""
        if self.order == "after":
            self.update_discriminator(inputs)

    def update_discriminator(self, inputs: LossInputs, weight: float = 1) -> None:
        """Update the discriminator `steps` times on HR and the student's output, with `weight` times its loss."""
        self.discriminator.train()
        parameters = list(self.discriminator.parameters())
        real, fake = self.to_input(inputs.hr), self.to_input(inputs.student.sr.detach())
        for _ in range(self.steps):
            loss = discriminator_loss(self.kind, *self.scores(real, fake))
            if self.kind == "WGAN_GP":
                loss = loss + PENALTY * gradient_penalty(self.discriminator, real, fake)
            (weight * loss).backward()
            all_reduce_gradients(parameters)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.kind == "WGAN":
                with torch.no_grad():
                    torch._foreach_clamp_min_(parameters, -CLIP)
                    torch._foreach_clamp_max_(parameters, CLIP)

    def scores(self, real: torch.Tensor, fake: torch.Tensor) -> Sequence[torch.Tensor]:
        """Compute the scores of real and fake images, separately for the U-Net: two power iterations, as published."""
        if isinstance(self.discriminator, UNetDiscriminator):
            return self.discriminator(real), self.discriminator(fake)
        return self.discriminator(torch.cat([real, fake])).chunk(2)

    def to_input(self, images: torch.Tensor) -> torch.Tensor:
        """Scale images to [0, 1]."""
        return images.to(next(self.discriminator.parameters()).dtype) / self.rgb_range

    def get_extra_state(self) -> dict:
        """Return the state of the discriminator's optimiser, for state_dict."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        """Load the state of the discriminator's optimiser; the learning rate remains that of the constructor."""
        load_optimizer(self.optimizer, state)


DISCRIMINATORS = {"srgan": make_discriminator, "unet": UNetDiscriminator}
TERMS = {"GAN": Adversarial}


def build_term(name: str, context: Context) -> Term:
    """Build a term of this family from the flags; raises UserError for images that the discriminator cannot score."""
    args = context.args
    if args.gan_update == "before" and args.split_batch > 1:
        raise UserError(f"GAN: --gan_update before needs the outputs of the whole batch at once, but --split_batch "
                        f"{args.split_batch} divides it: give --gan_update after or --split_batch 1")
    if args.gan_net == "unet":
        side = min([args.patch_size, *(view.side for view in context.views if view.has_hr)])
        if side < UNET_SIDE:
            raise UserError(f"GAN: --gan_net unet needs images of {UNET_SIDE} pixels or more, those of --patch_size "
                            f"{args.patch_size} and its views have {side}")
    return Adversarial(args.gan_type, args.gan_k, args.gan_lr, args.rgb_range, args.gan_net, args.gan_update)
