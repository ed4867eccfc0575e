"""Layouts of checkpoints: each is recognised by name, and an incomplete one is reported with what is missing."""
import json

import pytest
import torch

from conftest import GOLDEN, esrgan_names, golden_parameters
from model import NETWORKS, CheckpointError, load_model
from model.layout import count, recognise, rename, upsampler_scale

# name of the golden file: network, code base
LAYOUTS = {
    "edsr_x2": ("EDSR", "EDSR-PyTorch"), "fakd_edsr_x4": ("EDSR", "FAKD"), "basicsr_edsr_x4": ("EDSR", "BasicSR"),
    "csd_edsr_x4": ("EDSR", "CSD"), "csd_rcan_x2": ("RCAN", "CSD"), "csd_carn_x2": ("CARN", "CSD"),
    "rcan_x2": ("RCAN", "EDSR-PyTorch"), "fakd_rcan_x4": ("RCAN", "FAKD"), "basicsr_rcan_x2": ("RCAN", "BasicSR"),
    "san_x2": ("SAN", "the authors"), "carn_x2": ("CARN", "the authors"),
    "carn_m_multi_x2": ("CARN_M", "the authors"), "rdn_A_x2": ("RDN", "EDSR-PyTorch"), "imdn_x2": ("IMDN", "the authors"),
    "compact_x2": ("Compact", "Real-ESRGAN"), "span_x2": ("SPAN", "the authors"),
    "swinir_classical_x4": ("SwinIR", "the authors"), "swinir_light_x2": ("SwinIR", "the authors"),
    "nafnet": ("NAFNet", "the authors"), "restormer": ("Restormer", "the authors"), "rrdb_x4": ("RRDB", "BasicSR"),
    "rrdb_x4 ESRGAN": ("RRDB", "ESRGAN"), "rrdb_x4 the first ESRGAN": ("RRDB", "the first ESRGAN"),
}
each_layout = pytest.mark.parametrize("golden_name", LAYOUTS)


def golden_state(name):
    name, _, layout = name.partition(" ")
    state = golden_parameters(json.loads((GOLDEN / f"{name}.json").read_text())["keys"])
    return esrgan_names(state, layout) if layout else state


def layout_of(golden_name):
    network, code_base = LAYOUTS[golden_name]
    return next(layout for layout in NETWORKS[network][1] if layout.name == code_base)


def error_of(tmp_path, state, **override):
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "file.pth", **override)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path / 'file.pth'}: ")


def test_every_layout_has_a_golden_file():
    assert {(name, layout.name) for name, (_, layouts) in NETWORKS.items() for layout in layouts} == set(LAYOUTS.values())


@each_layout
def test_a_state_has_one_layout(golden_name):
    state = golden_state(golden_name)
    found = [(name, recognise(state, layouts)) for name, (_, layouts) in NETWORKS.items()]
    assert [(name, result[2]) for name, result in found if result] == [LAYOUTS[golden_name]]


@each_layout
def test_an_incomplete_checkpoint_is_reported_with_its_layout_and_the_missing_parameter(tmp_path, golden_name):
    network, code_base = LAYOUTS[golden_name]
    state = golden_state(golden_name)
    for key in layout_of(golden_name).required:
        message = error_of(tmp_path, {name: value for name, value in state.items() if name != key})
        assert message == f"nearly {network} in the layout of {code_base}, but {key} is missing"


def test_several_missing_parameters_are_listed(tmp_path):
    state = golden_state("imdn_x2")
    del state["LR_conv.weight"], state["c.0.weight"]
    assert error_of(tmp_path, state).endswith("but c.0.weight and LR_conv.weight are missing")


@each_layout
def test_a_checkpoint_that_lacks_another_parameter_is_reported_with_its_layout(tmp_path, golden_name):
    network, code_base = LAYOUTS[golden_name]
    state = golden_state(golden_name)
    state.pop(next(name for name in state if name.endswith("bias")))
    message = error_of(tmp_path, state, scale=4 if golden_name == "carn_m_multi_x2" else None)
    assert message.startswith(f"looks like {network} {{") and f"in the layout of {code_base}," in message
    native = NETWORKS[network][1][0].name
    assert (f", renamed as in {native}, but" in message) == (code_base != native)


@pytest.mark.parametrize("golden_name, key, shape", [
    ("edsr_x2", "tail.0.0.weight", (5, 16, 3, 3)), ("imdn_x2", "upsampler.0.weight", (7, 16, 3, 3)),
    ("rdn_A_x2", "UPNet.0.weight", ()), ("swinir_light_x2", "conv_first.weight", (0,)),
    ("csd_edsr_x4", "head.weight", ()), ("carn_x2", "b1.b1.body.0.weight", (0, 0, 3, 3))])
def test_shapes_of_no_network_are_reported_with_the_layout(tmp_path, golden_name, key, shape):
    network, code_base = LAYOUTS[golden_name]
    message = error_of(tmp_path, {**golden_state(golden_name), key: torch.zeros(shape)})
    assert message == f"nearly {network} in the layout of {code_base}, but the shapes of its parameters fit no network of " \
                      "this kind"


@pytest.mark.parametrize("names", [
    ["features.0.weight", "classifier.weight"],  # of a classifier
    ["conv_first.weight", "conv_last.weight", "body.0.rdb1.conv1.weight"],  # of another network of BasicSR
    ["head.0.weight", "tail.0.weight"]])
def test_a_checkpoint_that_resembles_no_layout_gets_the_list_of_networks(tmp_path, names):
    message = error_of(tmp_path, {name: torch.zeros(3) for name in names})
    assert message.startswith("not a checkpoint of EDSR, RCAN") and names[0] in message


def test_a_huge_number_in_a_name_is_refused_at_once(tmp_path):
    state = golden_state("edsr_x2")
    message = error_of(tmp_path, {**state, "body.99999999999.body.0.weight": torch.zeros(1)})
    assert message.startswith("nearly EDSR in the layout of EDSR-PyTorch")


# ---- rules

def test_the_first_rule_that_fits_leading_components_applies():
    names = "a.3.b.7.weight", "a.3.c.bias", "a.x.b", "ab.1", "drop.2.bias", "z"
    state = {name: number for number, name in enumerate(names)}
    rules = [("a.*.b.*", "new.*.body.*"), ("a.*", "*"), ("a", "old"), ("drop.*", None)]
    assert rename(state, rules) == {"new.3.body.7.weight": 0, "3.c.bias": 1, "old.x.b": 2, "ab.1": 3, "z": 5}


def test_blocks_are_counted_by_their_largest_number():
    state = dict.fromkeys(("body.0.conv.weight", "body.4.conv.weight", "body.x.conv", "IMDB2.c1", "body.5.convolution", "z"))
    assert [count(state, pattern) for pattern in ("body.*.conv", "body.*", "IMDB*.c1", "tail.*")] == [5, 6, 3, 0]


@pytest.mark.parametrize("rows, scale", [
    ([16], 2), ([36], 3), ([16, 16], 4), ([16, 16, 16], 8), ([], None), ([36, 36], None), ([4], None)])
def test_scale_of_an_upsampler(rows, scale):
    state = {f"up.{2 * n}.weight": torch.empty(size, 4) for n, size in enumerate(rows)}
    if scale:
        assert upsampler_scale(state, "up", 4) == scale
    else:
        with pytest.raises(ValueError, match="no upsampler"):
            upsampler_scale(state, "up", 4)
