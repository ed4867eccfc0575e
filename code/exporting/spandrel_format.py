"""Weights in the names and ranges by which spandrel (github.com/chaiNNer-org/spandrel) detects and computes networks.

spandrel 0.4 takes images in [0, 1] and reads all sizes from names and shapes, so that only networks of the settings that it
assumes can be written; chaiNNer, ComfyUI and others open the files by it.
"""
import importlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from exporting.safetensors_format import in_precision, save
from model import load_model
from model.common import Network
from model.swinir import relative_position_index, shift_mask
from system.errors import UserError, reason_of
from system.files import atomic_save

SUFFIXES = ".pth", ".safetensors"
State = dict[str, torch.Tensor]
SLOPES = {"relu": 0.0, "leakyrelu": 0.1}
MASK_SIDE = 64  # of the images for which SwinIR's masks are stored, as in the released files

log = logging.getLogger("sr")


def write(net: Network, path: Path, precision: str, metadata: dict[str, str]) -> list[Path]:
    """Write the weights as .safetensors, or as .pth by torch.save; raises UserError for a network that spandrel lacks."""
    name = metadata["network"]
    if name not in CONVERSIONS:
        raise UserError(f"--format spandrel: spandrel has no {name}, but {', '.join(CONVERSIONS)}; give --format onnx")
    if net.rgb_range != 1:
        raise UserError(f"--rgb_range {net.rgb_range:g}: spandrel takes images in [0, 1]; leave it out")
    try:
        state = CONVERSIONS[name](net)
    except ValueError as error:
        raise UserError(f"--format spandrel: {name} with {error}; give --format onnx") from None
    if path.suffix == ".safetensors":
        save(state, path, precision, {key: value for key, value in metadata.items() if key not in ("network", "config")})
    else:
        atomic_save(in_precision(state, precision), path)
    return [path]


def runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the network as spandrel loads it; where spandrel cannot be imported, as this project does, which is logged."""
    try:
        spandrel = importlib.import_module("spandrel")
    except Exception as error:  # it may be missing, or its torchvision be of another PyTorch
        log.info("spandrel cannot be imported (%s): the file is checked by this project's own reader", reason_of(error))
        net = load_model(path)
        net.rgb_range = 1
        return net
    net = spandrel.ModelLoader("cpu").load_from_file(path).model.eval()
    return lambda x: net(x.clone())  # some of its networks change their input


def from_compact(net: Network) -> State:
    """Return the state of Compact; each activation is a PReLU."""
    state, act_type = net.state_dict(), net.config["act_type"]
    if act_type in SLOPES:
        state |= {f"body.{2 * number + 1}.weight": torch.full((net.n_feats,), SLOPES[act_type])
                  for number in range(net.config["n_convs"] + 1)}
    return state


def from_span(net: Network) -> State:
    """Return the state of SPAN, each 3x3 convolution in the form for training: in its branches, and fused (eval_conv)."""
    if net.config["img_range"] != 255:
        raise ValueError(f"img_range {net.config['img_range']:g} cannot be stored, only 255")
    state = net.state_dict()
    names = [name.removesuffix(".weight") for name, weight in state.items() if weight.shape[2:] == (3, 3)]
    for name in names:
        if not name.startswith("upsampler."):
            weight, bias = state.pop(f"{name}.weight"), state.pop(f"{name}.bias")
            state |= {f"{name}.{part}": tensor for part, tensor in branches(weight, bias).items()}
    return state


def branches(weight: torch.Tensor, bias: torch.Tensor) -> State:
    """Return the parameters of a Conv3XC whose kernel is that of a 3x3 convolution.

    The first half of each 1x1 convolution is the identity, the other half and the skip connection are zero.
    """
    n_out, n_in = weight.shape[:2]
    middle = weight.new_zeros(2 * n_out, 2 * n_in, 3, 3)
    middle[:n_out, :n_in] = weight
    identity_in, identity_out = torch.eye(2 * n_in, n_in), torch.eye(n_out, 2 * n_out)
    return {"sk.weight": weight.new_zeros(n_out, n_in, 1, 1), "sk.bias": torch.zeros(n_out),
            "conv.0.weight": identity_in[..., None, None], "conv.0.bias": torch.zeros(2 * n_in),
            "conv.1.weight": middle, "conv.1.bias": torch.cat([bias, torch.zeros(n_out)]),
            "conv.2.weight": identity_out[..., None, None], "conv.2.bias": torch.zeros(n_out),
            "eval_conv.weight": weight, "eval_conv.bias": bias}


def from_swinir(net: Network) -> State:
    """Return the state of SwinIR with its constants: the index of each window, and the masks of an image of MASK_SIDE."""
    window, img_range = net.window, net.config["img_range"]
    assumed = 255 if window == 7 else 1
    if img_range != assumed:
        raise ValueError(f"img_range {img_range:g} and window_size {window} cannot be stored, only img_range {assumed}")
    state, side = net.state_dict(), max(2, MASK_SIDE // window) * window
    for name, block in net.named_modules():
        if hasattr(block, "shift"):
            state[f"{name}.attn.relative_position_index"] = relative_position_index(window)
            if block.shift:
                state[f"{name}.attn_mask"] = shift_mask(side, side, window, block.shift, torch.device("cpu"))[:, 0].clone()
    return state


def from_rcan(net: Network) -> State:
    """Return the state of RCAN."""
    if net.scale == 1:
        raise ValueError("scale 1 cannot be stored")
    return net.state_dict()


def from_nafnet(net: Network) -> State:
    """Return the state of NAFNet."""
    if net.config["tlc_size"]:
        raise ValueError(f"tlc_size {net.config['tlc_size']} cannot be stored, only 0")
    return net.state_dict()


def from_rrdb(net: Network) -> State:
    """Return the state of RRDB."""
    if net.config["num_grow_ch"] != 32:
        raise ValueError(f"num_grow_ch {net.config['num_grow_ch']} cannot be stored, only 32")
    return net.state_dict()


CONVERSIONS = {"Compact": from_compact, "NAFNet": from_nafnet, "RCAN": from_rcan, "RRDB": from_rrdb, "SPAN": from_span,
               "SwinIR": from_swinir}
