"""Compact and SPAN against the authors' outputs: sizes, forms of files, receptive field, inherited weights."""
import pytest
import torch

import inference
from model import CheckpointError, fuse, inherit, load_model, save_header
from model.compact import Compact
from model.span import SPAN
from system.errors import UserError

SMALL = [*[dict(scale=scale, n_feats=8, n_convs=3) for scale in (2, 3, 4, 8)],
         dict(scale=2, n_feats=4, n_convs=1), dict(scale=2, n_feats=6, n_convs=5, act_type="relu"),
         dict(scale=3, n_feats=4, n_convs=2, act_type="leakyrelu")]
each_small = pytest.mark.parametrize("sizes", SMALL, ids=str)


def parameters(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def positive(net):
    """Set averaging kernels and no biases, with which no contributions cancel: outputs beyond the receptive field are 0."""
    net = net.double().requires_grad_(False)
    for p in net.parameters():
        p.fill_(1 / p[0].numel() if p.ndim > 1 else 0)
    return net


@pytest.mark.parametrize("name", ["compact_x2", "compact_x4"])
def test_compact_agrees_with_the_authors(golden, name):
    path, x, arrays, about = golden(name)
    net = load_model(path)
    net.rgb_range = 1
    with torch.no_grad():
        sr, feature_maps = net(x, features=True)
        net.rgb_range = 255
        assert torch.allclose(net(x * 255), sr * 255, rtol=1e-4, atol=0.01)
    assert (sr - arrays["output"]).abs().max() <= 1e-5 * arrays["output"].abs().max()
    assert [list(one.shape) for one in feature_maps] == [[len(x), 24, *x.shape[2:]]] * 4
    assert parameters(net) == about["params"]


@pytest.mark.parametrize("sizes, published", [
    (dict(scale=4, n_convs=32), 1_213_296), (dict(scale=4), 621_424)])  # realesr-general-x4v3, realesr-animevideov3
def test_parameter_counts(sizes, published):
    assert parameters(Compact(**sizes)) == published


@each_small
@pytest.mark.parametrize("wrapper", ["params", "params_ema"])
def test_sizes_are_read_from_a_released_file(tmp_path, sizes, wrapper):
    net = Compact(**sizes)
    torch.save({wrapper: net.state_dict()}, tmp_path / "released.pth")
    torch.save({**save_header(net), "params": net.state_dict()}, tmp_path / "own.pt")
    act_type = sizes.get("act_type")
    again = load_model(tmp_path / "released.pth", act_type=act_type), load_model(tmp_path / "own.pt")
    assert [(type(one), one.config) for one in again] == [(Compact, net.config)] * 2
    assert load_model(tmp_path / "released.pth").config["act_type"] == ("relu" if act_type else "prelu")
    x = torch.rand(1, 3, 9, 7) * 255
    with torch.no_grad():
        assert all(torch.equal(one(x), net(x)) for one in again)


def test_another_activation_than_the_files_is_refused(tmp_path):
    torch.save(Compact(2, n_feats=4, n_convs=1).state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"Compact .*relu.* but unknown body\.1\.weight"):
        load_model(tmp_path / "a.pth", act_type="relu")
    with pytest.raises(ValueError, match="act_type gelu is none of prelu"):
        Compact(2, act_type="gelu")


@pytest.mark.parametrize("key, shape", [("body.0.weight", (4, 1, 3, 3)), ("body.4.weight", (7, 4, 3, 3))])
def test_shapes_of_no_compact_are_refused(tmp_path, key, shape):
    torch.save({**Compact(2, n_feats=4, n_convs=1).state_dict(), key: torch.zeros(shape)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="nearly Compact in the layout of Real-ESRGAN, but the shapes"):
        load_model(tmp_path / "a.pth")


@each_small
def test_receptive_field_is_exact(sizes):
    net = positive(Compact(**sizes))
    reach = net.receptive_field
    centre = reach + 2
    lr = torch.zeros(1, 3, 2 * centre + 1, 2 * centre + 1, dtype=torch.float64)
    lr[..., centre, centre] = 255
    affected = torch.nonzero(net(lr)[0, 0]) // net.scale - centre
    assert affected.amin(0).tolist() == [-reach] * 2 and affected.amax(0).tolist() == [reach] * 2


@each_small
def test_gradient_reaches_every_parameter(sizes):
    torch.manual_seed(0)
    net = Compact(**sizes)
    net(torch.rand(2, 3, 8, 8) * 255).abs().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_a_shallower_student_inherits_evenly_spaced_convolutions():
    teacher, student = Compact(2, n_feats=8, n_convs=5), Compact(2, n_feats=4, n_convs=3)
    inherit(student, teacher)
    for block, source in ((1, 1), (2, 3), (3, 5)):
        assert torch.equal(student.body[2 * block].weight, teacher.body[2 * source].weight[:4, :4])
        assert torch.equal(student.body[2 * block + 1].weight, teacher.body[2 * source + 1].weight[:4])
    assert torch.equal(student.body[8].weight, teacher.body[12].weight[:, :4])
    with pytest.raises(UserError, match="the student's act_type is relu, the teacher's prelu"):
        inherit(Compact(2, n_feats=4, act_type="relu"), teacher)


# ---- SPAN

def span_files(golden, name, tmp_path):
    """The authors' file, without the fused kernels, with them alone, and with them named as convolutions."""
    path, x, arrays, about = golden(name)
    state = torch.load(path, weights_only=True)
    fused = fuse(load_model(path)).state_dict()
    branches = [key.removesuffix("sk.weight") for key in state if key.endswith("sk.weight")]
    authors = {}
    for key, value in fused.items():
        prefix, _, kind = key.rpartition(".")
        authors[f"{prefix}.eval_conv.{kind}" if f"{prefix}." in branches else key] = value
    states = dict(authors=state, branches={key: value for key, value in state.items() if "eval_conv" not in key},
                  eval_conv=authors, convolutions=fused)
    for form, tensors in states.items():
        torch.save({"params": {}, "params_ema": tensors}, tmp_path / f"{form}.pth")
    return {form: tmp_path / f"{form}.pth" for form in states}, x, arrays, about


@pytest.mark.parametrize("name", ["span_x2", "span_x4"])
def test_every_form_of_span_agrees_with_the_authors(golden, tmp_path, name):
    files, x, arrays, about = span_files(golden, name, tmp_path)
    for form, path in files.items():
        net = load_model(path)
        net.rgb_range = 1
        training = form in ("authors", "branches")
        assert net.config == dict(scale=int(name[-1]), n_feats=24, img_range=255,
                                  reparameterise="Conv3XC" if training else "none")
        assert parameters(net) == about["params" if training else "params_fused"]
        with torch.no_grad():
            for one in (net, fuse(net), net.train()):
                sr, feature_maps = one(x, features=True)
                for expected in (arrays["output"], arrays["output_train_mode"]):
                    assert (sr - expected).abs().max() <= 1e-5 * expected.abs().max()
                assert [list(f.shape) for f in feature_maps] == [[len(x), 24, *x.shape[2:]]] * 4
            net.rgb_range = 255
            assert torch.allclose(net(x * 255), sr * 255, rtol=1e-4, atol=0.01)


@pytest.mark.parametrize("name", ["span_x2", "span_x4"])
def test_span_agrees_where_every_tensor_counts(golden, tmp_path, name):
    path, x, arrays, _ = golden(name)
    state = torch.load(path, weights_only=True)
    for key, value in state.items():
        if key.startswith("block_") and key.endswith((".conv.1.weight", ".sk.weight")):
            value *= 1.5
    torch.save(state, tmp_path / "gain.pth")
    net, expected = load_model(tmp_path / "gain.pth"), arrays["output_gain_1.5"]
    net.rgb_range = 1
    with torch.no_grad():
        for one in (net, fuse(net)):
            assert (one(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["span_x2", "span_x4"])
def test_fused_kernels_are_the_authors(golden, name):
    path, _, arrays, _ = golden(name)
    fused = fuse(load_model(path)).state_dict()
    for key in ("conv_1.", "block_1.c2_r."):
        for kind in ("weight", "bias"):
            assert torch.allclose(fused[key + kind], arrays[f"{key}eval_conv.{kind}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes, millions", [  # the paper, with fused convolutions, and its team's network of NTIRE
    (dict(scale=2, n_feats=52), "0.481"), (dict(scale=4, n_feats=52), "0.498"), (dict(scale=2), "0.411"),
    (dict(scale=4), "0.426"), (dict(scale=4, n_feats=28), "0.151")])
def test_parameter_counts_of_span(sizes, millions):
    assert f"{parameters(SPAN(**sizes, reparameterise='none')) / 1e6:.3f}" == millions


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["Conv3XC", "none"])
def test_receptive_field_of_span_is_exact(scale, form):
    net = SPAN(scale, n_feats=2, reparameterise=form).double().requires_grad_(False)
    for p in net.parameters():
        p.fill_(1 if p.ndim > 1 else 0)
    reach = net.receptive_field
    centre = reach + 2
    lr = (255 * net.mean).repeat(1, 1, 2 * centre + 1, 2 * centre + 1)  # 0 after the subtraction of the mean
    lr[..., centre, centre] = 255
    affected = torch.nonzero(net(lr)[0, 0]) // scale - centre
    assert affected.amin(0).tolist() == [-reach] * 2 and affected.amax(0).tolist() == [reach] * 2


@pytest.mark.parametrize("make", [lambda: Compact(2, n_feats=4, n_convs=3), lambda: SPAN(2, n_feats=4)])
def test_tiles_equal_the_whole_image(make):
    torch.manual_seed(0)
    net = make().double().eval()
    lr = 255 * torch.rand(1, 3, 61, 75, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(inference.chop(net, lr, tile=9), net(lr), rtol=1e-10, atol=1e-9)


def test_another_maximum_inside_span_can_be_given(golden):
    path, x, *_ = golden("span_x2")
    net = load_model(path, img_range=1)
    assert net.config["img_range"] == 1 and not torch.allclose(net(x), load_model(path)(x))


@pytest.mark.parametrize("key, message", [
    ("conv_1.sk.weight", "looks like SPAN .*no conv_1.sk.weight"),
    ("conv_cat.bias", "nearly SPAN .*conv_cat.bias is missing"),
    ("block_6.c3_r.conv.1.weight", "looks like SPAN .*no block_6.c3_r.conv.1.weight")])
def test_an_incomplete_span_is_refused(golden, tmp_path, key, message):
    state = torch.load(golden("span_x2")[0], weights_only=True)
    del state[key]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a.pth")
