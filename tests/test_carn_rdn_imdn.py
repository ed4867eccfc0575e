"""CARN, CARN-M, RDN and IMDN against the authors' outputs, and sizes."""
import json

import pytest
import torch

from conftest import GOLDEN
from model import CheckpointError, carn, imdn, inherit, load_model, rdn, save_header
from model.carn import CARN, CARN_M
from model.imdn import IMDN
from model.layout import recognise
from model.rdn import RDN
from system.errors import UserError

LAYOUTS = {"carn": carn.LAYOUTS, "carn_m": carn.LAYOUTS_M, "rdn": rdn.LAYOUTS, "imdn": imdn.LAYOUTS}
OWN = {"carn_x2": "carn", "carn_m_multi_x2": "carn_m", "carn_m_multi_x4": "carn_m", "rdn_A_x2": "rdn", "imdn_x2": "imdn",
       "csd_carn_x2": "carn"}
NETWORK = {"CARN": CARN, "CARN_M": CARN_M, "RDN": RDN, "IMDN": IMDN}
MULTI = (2, 3, 4)
SMALL = [  # name, arguments
    *[(name, dict(scale=scale, n_feats=8)) for name in ("CARN", "CARN_M") for scale in (2, 3, 4, 8)],
    ("CARN", dict(scale=2, n_feats=8, multi_scale=MULTI)), ("CARN_M", dict(scale=4, n_feats=8, multi_scale=MULTI)),
    ("CARN_M", dict(scale=3, n_feats=8, group=2)), ("CARN", dict(scale=3, n_feats=8, multi_scale=(3,))),
    *[("RDN", dict(scale=scale, G0=8, RDNconfig="4,2,6")) for scale in (2, 3, 4, 8)],
    ("RDN", dict(scale=2, G0=6, RDNkSize=5, RDNconfig="1,3,4")), ("RDN", dict(scale=4, G0=6, RDNkSize=5, RDNconfig="2,2,4")),
    *[("IMDN", dict(scale=scale, n_feats=16)) for scale in (2, 3, 4, 8)],
    ("IMDN", dict(scale=2, n_feats=18, n_modules=4)),
]
each_small = pytest.mark.parametrize(("name", "sizes"), SMALL, ids=[f"{name}-{sizes}" for name, sizes in SMALL])


def keys_of(name):
    return json.loads((GOLDEN / f"{name}.json").read_text()).get("keys", {})


def empty_state(keys):
    return {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}


def parameters(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", OWN)
def test_agrees_with_the_authors(golden, name):
    path, x, arrays, about = golden(name)
    net = load_model(path, scale=about["config"]["scale"])
    net.rgb_range = about["input_range"][1]
    with torch.no_grad():
        sr, feature_maps = net(x, features=True)
        net.rgb_range, factor = 255, 255 / net.rgb_range
        assert torch.allclose(net(x * factor), sr * factor, rtol=1e-4, atol=0.05)
    expected = arrays["width_1" if name.startswith("csd") else "output"]
    assert (sr - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert [list(one.shape) for one in feature_maps] == [[len(x), net.n_feats, *x.shape[2:]]] * 4
    assert parameters(net) == about["params"]


@pytest.mark.parametrize(("make", "published"), [
    (lambda: CARN(2), 964_163), (lambda: CARN(3), 1_148_803), (lambda: CARN(4), 1_111_875),
    (lambda: CARN(2, multi_scale=True), 1_591_939), (lambda: CARN_M(2, multi_scale=True), 414_787),
    (lambda: IMDN(2), 694_404), (lambda: IMDN(3), 703_059), (lambda: IMDN(4), 715_176), (lambda: RDN(2), 5_541_795)])
def test_parameter_counts(make, published):
    assert parameters(make()) == published


@pytest.mark.parametrize(("scale", "millions"), [(2, 22.12), (3, 22.31), (4, 22.27)])
def test_parameter_count_of_rdn_b(scale, millions):
    with torch.device("meta"):
        assert round(parameters(RDN(scale, RDNconfig="B")) / 1e6, 2) == millions


@each_small
def test_sizes_are_read_from_the_state_dict(tmp_path, name, sizes):
    network = NETWORK[name]
    net = network(**sizes)
    config, state, _ = recognise(net.state_dict(), LAYOUTS[name.lower()])
    assert {"scale": sizes["scale"], **config} == net.config
    assert state.keys() == net.state_dict().keys()
    without_means = {f"module.{key}": value for key, value in net.state_dict().items() if "shifter" not in key}
    torch.save({"params": without_means}, tmp_path / "a.pt")
    torch.save({**save_header(net), "params": net.state_dict()}, tmp_path / "b.pt")
    again = load_model(tmp_path / "a.pt", scale=sizes["scale"]), load_model(tmp_path / "b.pt")
    assert [(type(one), one.config) for one in again] == [(network, net.config)] * 2
    x = torch.rand(1, 3, 9, 7) * 255
    with torch.no_grad():
        assert net(x).shape == (1, 3, 9 * net.scale, 7 * net.scale)
        assert all(torch.equal(one(x), net(x)) for one in again)


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_other_networks_are_not_recognised(name):
    state = empty_state(keys_of(name))
    assert [kind for kind, layouts in LAYOUTS.items() if recognise(state, layouts)] == ([OWN[name]] if name in OWN else [])


@pytest.mark.parametrize("name", ["carn_x2", "carn_m_multi_x2", "rdn_A_x2", "imdn_x2"])
def test_incomplete_states_raise_no_error(name):
    state = empty_state(keys_of(name))
    for left_out in state:
        recognise({key: value for key, value in state.items() if key != left_out}, LAYOUTS[OWN[name]])


def test_error_for_an_incomplete_file_names_file_and_parameter(golden, tmp_path):
    path, *_ = golden("imdn_x2")
    state = torch.load(path)
    del state["IMDB3.c4.bias"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"broken\.pth.*no IMDB3\.c4\.bias"):
        load_model(tmp_path / "broken.pth")


def test_csds_carn_is_not_ahns_and_its_files_say_which(golden, tmp_path):
    path, x, arrays, _ = golden("csd_carn_x2")
    net = load_model(path)
    torch.save({**save_header(net), "params": net.state_dict()}, tmp_path / "own.pt")
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    for file in (path, tmp_path / "own.pt", tmp_path / "bare.pt"):
        loaded = load_model(file)
        assert loaded.config["carn_variant"] == "CSD" and torch.equal(loaded(x), net(x))
        with pytest.raises(CheckpointError, match="holds CARN with carn_variant CSD, not Ahn"):
            load_model(file, carn_variant="Ahn")
    ahn = CARN(2)
    ahn.load_state_dict({name: net.state_dict().get(name, value) for name, value in ahn.state_dict().items()})
    with torch.no_grad():
        assert (ahn(x) - arrays["width_1"]).abs().max() > 0.05 * arrays["width_1"].abs().max()
    with pytest.raises(UserError, match="the student's carn_variant is Ahn, the teacher's CSD"):
        inherit(CARN(2, n_feats=8), net)
    with pytest.raises(CheckpointError, match="holds CARN with carn_variant Ahn, not CSD"):
        load_model(golden("carn_x2")[0], carn_variant="CSD")


def test_file_of_several_scales_needs_one(golden):
    path, *_ = golden("carn_m_multi_x2")
    with pytest.raises(CheckpointError, match=r"x2, x3, x4: choose one with --scale"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"x2, x3, x4: not for x8"):
        load_model(path, scale=8)
    nets = [load_model(path, scale=scale) for scale in MULTI]
    assert [net.scale for net in nets] == [2, 3, 4]
    assert len({tuple(net.state_dict()) for net in nets}) == 1


def test_file_of_this_project_with_several_scales(tmp_path):
    net = CARN_M(3, n_feats=8, multi_scale=MULTI)
    torch.save({**save_header(net), "params": net.state_dict()}, tmp_path / "own.pt")
    assert [load_model(tmp_path / "own.pt", scale=scale).scale for scale in (None, 4)] == [3, 4]


def test_another_scale_than_the_files_is_refused(golden):
    path, *_ = golden("carn_x2")
    with pytest.raises(CheckpointError, match="scale 2, not 3"):
        load_model(path, scale=3)


@pytest.mark.parametrize("make", [
    lambda: CARN(8, multi_scale=MULTI), lambda: CARN(2, carn_variant="M"),
    lambda: CARN_M(2, n_feats=6), lambda: RDN(2, RDNconfig="C"),
    lambda: RDN(2, RDNconfig="16,0,64"), lambda: RDN(2, RDNkSize=4), lambda: IMDN(2, n_feats=8)])
def test_impossible_sizes(make):
    with pytest.raises(ValueError, match=r"scale 8|6 .* 4 groups|D,C,G|even|16 or more|Ahn, CSD"):
        make()


def positive(net):
    """Set averaging kernels and no biases, with which no contributions cancel: outputs beyond the receptive field are 0."""
    net = net.double().requires_grad_(False)
    for p in net.parameters():
        p.fill_(1 / p[0].numel() if p.ndim > 1 else 0)
    return net


@pytest.mark.parametrize(("name", "sizes"), [one for one in SMALL if one[0] != "IMDN"])
def test_receptive_field_is_exact(name, sizes):
    net = positive(NETWORK[name](**sizes))
    reach = net.receptive_field
    centre = reach + 2
    lr = torch.zeros(1, 3, 2 * centre + 1, 2 * centre + 1, dtype=torch.float64)
    lr[..., centre, centre] = 255
    affected = torch.nonzero(net(lr)[0, 0]) // net.scale - centre  # in LR pixels from the white one
    assert affected.amin(0).tolist() == [-reach] * 2
    assert affected.amax(0).tolist() == [reach] * 2


def test_receptive_field_of_imdn_is_the_image():
    assert IMDN(2).receptive_field is None
    net = with_active_attention(IMDN(2, n_feats=16, n_modules=1)).double().requires_grad_(False)
    lr = torch.rand(1, 3, 24, 24, dtype=torch.float64) * 255
    changed = lr.clone()
    changed[..., 0, 0] = 255 - changed[..., 0, 0]
    assert (net(lr) - net(changed))[..., -1, -1].any()


def with_active_attention(net):
    """Keep the one or two hidden channels of a small IMDN's attention above 0, where ReLU passes gradients."""
    for key, p in net.named_parameters():
        if key.endswith("conv_du.0.bias"):
            p.data.fill_(9)
    return net


@each_small
def test_gradient_reaches_every_parameter(name, sizes):
    torch.manual_seed(0)
    net = with_active_attention(NETWORK[name](**sizes))
    sr, feature_maps = net(torch.rand(2, 3, 8, 8) * 255, features=True)
    sr.abs().mean().backward()
    unused = [f"upsample.up{scale}." for scale in MULTI if scale != net.scale]
    for key, p in net.named_parameters():
        if p.requires_grad and not key.startswith(tuple(unused)):
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
    assert all(x.requires_grad for x in feature_maps)


def test_gradients_of_imdn_are_finite_for_constant_images():
    net = IMDN(2, n_feats=16)
    net(torch.zeros(1, 3, 1, 1)).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", NETWORK)
def test_the_image_stays_float32_under_autocast(name):
    torch.manual_seed(0)
    net = NETWORK[name](**next(sizes for kind, sizes in SMALL if kind == name))
    lr = torch.rand(1, 3, 16, 16) * 255
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sr, feature_maps = net(lr, features=True)
    assert sr.dtype == torch.float32
    # f0 of RDN comes from its second convolution; f3 of CARN includes no long skip connection
    assert [feature_maps[0].dtype, feature_maps[3].dtype] == [{"RDN": torch.bfloat16}.get(name, torch.float32),
                                              torch.bfloat16 if "CARN" in name else torch.float32]
    with torch.no_grad():
        assert torch.allclose(sr, net(lr), atol=0.02 * 255)
