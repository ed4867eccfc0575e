"""The encoder and codebook of a VQGAN (Esser et al., CVPR 2021), in the layout of taming-transformers' released files.

Five levels of ch x ch_mult[i] channels, each half the size of the one before, are residual blocks of group normalisation,
swish and convolution, with attention at the coarsest. Sizes are read from the file; DCKD uses `f16-1024`: 16 times smaller,
1024 codes.
"""
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from loss.frozen import frozen, new_network, randomise, require_file
from loss.term import Context
from model.common import pad_to_window
from model.layout import count
from model.loading import CheckpointError, build, read_checkpoint
from system.files import file_size

IGNORED = "decoder.", "post_quant_conv.", "loss."
F16_1024 = dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attention=(4,), z_channels=256, embed_dim=256,
                n_embed=1024)
LEVELS = 5


class Normalisation(nn.GroupNorm):
    """The group normalisation that every block uses, in float32: on CPUs its gradient in bfloat16 is six times slower."""

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise N x channels x H x W, and return it in the type of the input."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class ResBlock(nn.Module):
    """Residual block: group normalisation, swish and convolution, twice, plus the input."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.norm1, self.conv1 = Normalisation(before), nn.Conv2d(before, channels, 3, padding=1)
        self.norm2, self.conv2 = Normalisation(channels), nn.Conv2d(channels, channels, 3, padding=1)
        if before != channels:
            self.nin_shortcut = nn.Conv2d(before, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block: N x before x H x W -> N x channels x H x W."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Single-head self-attention over all positions, plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Normalisation(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block on N x channels x H x W."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Convolution with stride 2, padded with zeros at the bottom and right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Downsample N x channels x H x W to N x channels x H/2 x W/2."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attention` is set, and the downsampling."""

    def __init__(self, before: int, channels: int, blocks: int, attention: bool, last: bool):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(channels if index else before, channels) for index in range(blocks))
        self.attn = nn.ModuleList(Attention(channels) for _ in range(blocks if attention else 0))
        if not last:
            self.downsample = Downsample(channels)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers after the first residual block to its output."""
        for index, block in enumerate(self.block):
            x = block(x) if index else x
            x = self.attn[index](x) if self.attn else x
        return self.downsample(x) if hasattr(self, "downsample") else x


class Middle(nn.Module):
    """Residual block, attention and residual block, at the coarsest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = ResBlock(channels, channels), ResBlock(channels, channels)
        self.attn_1 = Attention(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the blocks on N x channels x H x W."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """The encoder's layers under their released names; `VQGAN` applies them."""

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int, attention: list[int], z_channels: int):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(Level(before, width, num_res_blocks, level in attention, level == len(widths) - 1)
                                  for level, (before, width) in enumerate(zip([ch, *widths], widths)))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = Normalisation(widths[-1]), nn.Conv2d(widths[-1], z_channels, 3, padding=1)


class VQGAN(nn.Module):
    """Compute the output of the first residual block of each level, given images N x 3 x H x W in [0, rgb_range].

    The images are scaled to [-1, 1], the range of the training images (DCKD's code uses [0, 1], see the table of
    departures in scripts/README.md), and padded by reflection to multiples of 16, so that the strided convolutions drop no
    row or column.
    """

    title = "VQGAN"

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int, attention: list[int], z_channels: int,
                 embed_dim: int, n_embed: int):
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, attention, z_channels)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.rgb_range = 255

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Scale and pad images and return their five feature maps."""
        x = images.float() * (2 / self.rgb_range) - 1
        return self.feature_maps(pad_to_window(x, 2 ** (len(self.encoder.down) - 1)))

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Compute the five feature maps of an input in [-1, 1] whose sides are multiples of 16."""
        x, levels = self.encoder.conv_in(x.to(self.encoder.conv_in.weight.dtype)), self.encoder.down
        outputs = [levels[0].block[0](x)]
        for finer, level in pairwise(levels):
            outputs.append(level.block[0](finer.finish(outputs[-1])))
        return [x.float() for x in outputs]

    def latent(self, last: torch.Tensor) -> torch.Tensor:
        """Compute z, N x embed_dim x H/16 x W/16, from the last of the five feature maps."""
        x = self.encoder.mid(self.encoder.down[-1].finish(last.to(self.quant_conv.weight.dtype)))
        return self.quant_conv(self.encoder.conv_out(F.silu(self.encoder.norm_out(x)))).float()

    def code_logits(self, z: torch.Tensor) -> torch.Tensor:
        """Compute (N h w) x n_embed logits of the codes from z, positions in the order n, h, w.

        DCKD's probabilities are softmax(max d - d) of the squared distances d = |z|^2 - 2 z e + |e|^2 to the codes e; |z|^2
        and max d are the same for all codes of a position and cancel.
        """
        codes = self.quantize.embedding.weight
        return 2 * z.permute(0, 2, 3, 1).flatten(0, 2) @ codes.T - codes.pow(2).sum(1)


def read_config(state: dict[str, torch.Tensor]) -> dict:
    """Read the arguments of a VQGAN from names and shapes; raises KeyError for a missing name."""
    ch = state["encoder.conv_in.weight"].shape[0]
    levels, blocks = count(state, "encoder.down.*"), count(state, "encoder.down.0.block.*")
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    return dict(ch=ch, ch_mult=[width // ch for width in widths], num_res_blocks=blocks,
                attention=[level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in state],
                z_channels=state["encoder.conv_out.weight"].shape[0], embed_dim=state["quant_conv.weight"].shape[0],
                n_embed=state["quantize.embedding.weight"].shape[0])


class Placeholder:
    """Replace every class that a Lightning checkpoint names beside its weights: none is imported, no code is run."""

    def __new__(cls, *_) -> OrderedDict:
        """Return a dict, which PyTorch's restricted unpickler fills with the attributes of the object."""
        return OrderedDict()


def read_lightning(path: Path | str) -> dict[str, torch.Tensor]:
    """Read a checkpoint that also holds the callbacks of its training, objects of classes that are not installed.

    Raises CheckpointError.
    """
    try:
        file_size(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file can cause any exception; read_checkpoint then reports the reason
        names = []
    try:
        with torch.serialization.safe_globals([(Placeholder, name) for name in names]):
            return read_checkpoint(path)[1]
    except CheckpointError as error:
        raise CheckpointError(f"{error}; of the released folder's files, ckpts/last.ckpt is needed, not configs/model.yaml"
                              ) from None


def load_vqgan(path: Path | str) -> VQGAN:
    """Load a VQGAN; raises CheckpointError."""
    state = read_lightning(path)
    try:
        sizes = read_config(state)
    except KeyError as error:
        raise CheckpointError(f"{path}: not a VQGAN: no {error.args[0]}") from None
    except (ArithmeticError, IndexError, ValueError):
        raise CheckpointError(f"{path}: not a VQGAN: its tensors have other shapes") from None
    if len(sizes["ch_mult"]) != LEVELS:
        raise CheckpointError(f"{path}: not a VQGAN that is supported: {len(sizes['ch_mult'])} levels, not {LEVELS}")
    return build(partial(new_network, VQGAN, **sizes), state, VQGAN.title, f"{path}: not a VQGAN: ", IGNORED)


def make_vqgan(args: SimpleNamespace) -> VQGAN:
    """Load the VQGAN of --vqgan_path, or build an untrained one; raises CheckpointError."""
    if args.feature_net == "random":
        net = randomise(new_network(VQGAN, **F16_1024))
    else:
        require_file(args.vqgan_path, "vqgan_f16_1024", "--vqgan_path")
        net = load_vqgan(args.vqgan_path)
    net.rgb_range = args.rgb_range
    return net


def shared_vqgan(context: Context) -> VQGAN:
    """Return the VQGAN that all terms of a run share; raises CheckpointError."""
    return frozen(context, "vqgan", make_vqgan)
