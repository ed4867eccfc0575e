"""The frozen networks: their layouts, their numbers, what a wrong file gets, and that nothing trains them."""
import collections
import pickle
import re

import pytest
import torch
import torch.nn.functional as F

import loss
import option
from conftest import golden_parameters
from loss import frozen, vgg, vqgan
from model.loading import CheckpointError
from system.errors import UserError

CONVOLUTIONS = 0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34  # torchvision's vgg19


def flags(line=""):
    return option.parse(["--feature_net", "random", *line.split()])


@pytest.fixture(scope="module")
def net():
    return vgg.make_vgg(flags()).requires_grad_(False)


@pytest.fixture(scope="module")
def vgg_state(net):
    """All that torchvision's file holds, by name; what follows relu5_1 in small."""
    state = dict(net.state_dict())
    for index in CONVOLUTIONS[13:]:
        state |= {f"features.{index}.weight": torch.ones(2, 2, 3, 3), f"features.{index}.bias": torch.ones(2)}
    return state | {f"classifier.{index}.{kind}": torch.ones(2) for index in (0, 3, 6) for kind in ("weight", "bias")}


@pytest.fixture
def vqgan_state(golden):
    return golden_parameters(golden("vqgan")[3]["keys"])


# ---- VGG-19

def test_layout_of_VGG_is_torchvisions(net):
    assert sorted(net.state_dict()) == sorted(f"features.{index}.{kind}" for index in CONVOLUTIONS[:13]
                                              for kind in ("weight", "bias"))
    shapes = [tuple(net.features[index].weight.shape[:2]) for index in CONVOLUTIONS[:13]]
    assert shapes == [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), *[(256, 256)] * 3, (512, 256), *[(512, 512)] * 4]


def test_VGG_of_a_file_gives_the_maps_of_its_normalised_input(vgg_state, tmp_path):
    torch.save(vgg_state, tmp_path / "vgg.pth")
    images = torch.rand(2, 3, 21, 33)
    x = torch.stack([(images[:, k] - mean) / std for k, (mean, std) in
                     enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)))], 1)
    expected = []
    for count, index in enumerate(CONVOLUTIONS[:13]):
        if count in (2, 4, 8, 12):
            x = F.max_pool2d(x, 2)
        x = F.conv2d(x, vgg_state[f"features.{index}.weight"], vgg_state[f"features.{index}.bias"], padding=1).relu()
        if count in (0, 2, 4, 8, 12):  # relu1_1 .. relu5_1
            expected.append(x)
    for rgb_range in (255, 1):
        net = vgg.make_vgg(option.parse(["--vgg_path", str(tmp_path / "vgg.pth"), "--rgb_range", str(rgb_range)]))
        found = net(images * rgb_range)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("features.28.bias"), "not a VGG-19: no features.28.bias"),
    (lambda state: state.update({"features.0.weight": torch.ones(32, 3, 3, 3)}), "features.0.weight is .32, 3, 3, 3., not"),
    (lambda state: state.update({"features.1.weight": torch.ones(64)}), "unknown features.1.weight"),  # with batch norm
])
def test_VGG_file_of_another_shape_is_refused(vgg_state, tmp_path, change, words):
    state = dict(vgg_state)
    change(state)
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=f"vgg.pth: .*{words}"):
        vgg.make_vgg(option.parse(["--vgg_path", str(tmp_path / "vgg.pth")]))


@pytest.mark.parametrize("make, flag, name", [(vgg.make_vgg, "--vgg_path", "vgg19"),
                                              (vqgan.make_vqgan, "--vqgan_path", "vqgan_f16_1024")])
def test_absent_file_names_path_command_and_flags(make, flag, name, tmp_path):
    with pytest.raises(CheckpointError) as error:
        make(option.parse([flag, str(tmp_path / "none.pth")]))
    for words in (str(tmp_path / "none.pth"), f"bash scripts/download_teacher.sh {name}", flag, "--feature_net random"):
        assert words in str(error.value)


def test_patches_too_small_for_VGG_are_refused():
    with pytest.raises(UserError, match="--patch_size 12"):
        vgg.make_vgg(flags("--patch_size 12"))


# ---- VQGAN

def test_VQGAN_agrees_with_the_authors(golden):
    path, x, arrays, _ = golden("vqgan")
    net = vqgan.load_vqgan(path).eval()
    with torch.no_grad():
        maps = net.feature_maps(x)
        z = net.latent(maps[-1])
        found = {**{f"feature{index}": one for index, one in enumerate(maps)}, "z": z,
                 "code_probability": net.code_logits(z).softmax(1)}
    for name, expected in arrays.items():
        one = found[name][:, :expected.shape[1]]
        assert (one - expected).abs().max() <= 2e-4 * expected.abs().max(), name


def test_sizes_of_the_released_network(golden, vqgan_state):
    assert vqgan.read_config(vqgan_state) == dict(ch=32, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, attention=[4],
                                                z_channels=32, embed_dim=32, n_embed=24)
    net = frozen.new_network(vqgan.VQGAN, **vqgan.F16_1024)
    released = vqgan.read_config(net.state_dict())
    assert {**released, "ch_mult": tuple(released["ch_mult"]), "attention": tuple(released["attention"])} == vqgan.F16_1024
    assert sorted(net.state_dict()) == sorted(golden("vqgan")[3]["keys"])


@pytest.mark.parametrize("rgb_range", [255, 1])
def test_VQGAN_is_fed_minus_one_to_one_and_padded_by_reflection(golden, rgb_range):
    net = vqgan.load_vqgan(golden("vqgan")[0])
    net.rgb_range = rgb_range
    x = torch.rand(1, 3, 20, 32)
    with torch.no_grad():
        found, expected = net(x * rgb_range), net.feature_maps(F.pad(2 * x - 1, (0, 0, 0, 12), mode="reflect"))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_code_probabilities_are_the_softmax_of_max_d_minus_d(golden):
    net = vqgan.load_vqgan(golden("vqgan")[0])
    z = torch.randn(2, 32, 3, 4)
    rows = torch.stack([z[n, :, i, j] for n in range(2) for i in range(3) for j in range(4)])
    d = torch.cdist(rows, net.quantize.embedding.weight) ** 2
    expected = (d.max(1, keepdim=True)[0] - d).softmax(1)
    assert torch.allclose(net.code_logits(z).softmax(1), expected, atol=1e-5)


class Callback(dict):
    """What a Lightning file holds beside weights; it must never be made."""

    def __init__(self, *_):
        super().__init__()

    def __reduce__(self):
        return Callback, ("x",), None, None, iter([("a", 1)])

    def __setstate__(self, _):
        raise AssertionError


def test_lightning_file_is_read_without_its_classes(vqgan_state, tmp_path, monkeypatch):
    beside = {"loss.discriminator.weight": torch.ones(2), "decoder.conv_in.weight": torch.ones(2),
              "post_quant_conv.weight": torch.ones(2)}
    torch.save({"epoch": 3, "callbacks": {Callback: {"best": torch.ones(1)}, "one": Callback()},
                "state_dict": {**vqgan_state, **beside}}, tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    monkeypatch.setattr(Callback, "__init__", lambda *_: 1 / 0)
    before = torch.serialization.get_safe_globals()
    net = vqgan.load_vqgan(tmp_path / "last.ckpt")
    assert all(torch.equal(value, vqgan_state[name]) for name, value in net.state_dict().items())
    assert set(torch.serialization.get_safe_globals()) == set(before)


class Bad:
    def __reduce__(self):
        import os  # noqa: PLC0415
        return os.system, ("true",)


def test_file_that_would_run_code_is_refused(vqgan_state, tmp_path):
    torch.save({"state_dict": vqgan_state, "x": Bad()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last.ckpt: .*holds code beside weights.*ckpts/last.ckpt is needed"):
        vqgan.load_vqgan(tmp_path / "last.ckpt")


def test_the_other_released_file_is_refused(tmp_path):
    (tmp_path / "model.yaml").write_text("model:\n  base_learning_rate: 4.5e-06\n")
    with pytest.raises(CheckpointError, match=r"model.yaml: .*ckpts/last.ckpt is needed, not configs/model.yaml"):
        vqgan.load_vqgan(tmp_path / "model.yaml")


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("quant_conv.weight"), "no quant_conv.weight"),
    (lambda state: state.pop("encoder.mid.attn_1.k.bias"), "no encoder.mid.attn_1.k.bias"),
    (lambda state: state.update({"quantize.embedding.weight": torch.ones(24, 16)}), "embedding.weight is .*24, 16.*24, 32"),
    (lambda state: state.update({"encoder.extra": torch.ones(1)}), "unknown encoder.extra"),
    (lambda state: state.update({"encoder.conv_in.weight": torch.ones(20, 3, 3, 3)}), "32"),
    (lambda state: state.update({"encoder.down.5.block.0.conv1.weight": torch.ones(32, 32, 3, 3)}), "6 levels, not 5"),
    (lambda state: state.clear() or state.update({"head.weight": torch.ones(1)}), "no encoder.conv_in.weight"),
])
def test_VQGAN_file_of_another_shape_is_refused(vqgan_state, tmp_path, change, words):
    change(vqgan_state)
    torch.save({"state_dict": vqgan_state}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=f"last.ckpt: not a VQGAN.*{words}"):
        vqgan.load_vqgan(tmp_path / "last.ckpt")


# ---- untrained ones, and that nothing trains them

def test_random_networks_are_the_same_each_time_say_so_and_draw_nothing(net, monkeypatch):
    said = []
    monkeypatch.setattr(frozen.log, "info", lambda text, *words: said.append(text % words))
    monkeypatch.setattr(vqgan, "F16_1024", {**vqgan.F16_1024, "ch": 32, "n_embed": 8})
    state = torch.get_rng_state()
    again, first, second = vgg.make_vgg(flags()), vqgan.make_vqgan(flags()), vqgan.make_vqgan(flags())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert [re.match("--feature_net random: the (.*) is untrained", one)[1] for one in said] == ["VGG-19", "VQGAN",
                                                                                                       "VQGAN"]
    assert all(x.std() > 0.05 for x in first(255 * torch.rand(1, 3, 32, 32)))


def test_the_networks_are_built_once_and_are_no_part_of_the_loss(monkeypatch):
    monkeypatch.setattr(vqgan, "F16_1024", {**vqgan.F16_1024, "ch": 32, "n_embed": 8})
    built = collections.Counter()
    for title in ("VGG19", "VQGAN"):
        module = vgg if title == "VGG19" else vqgan
        network = getattr(module, title)
        monkeypatch.setattr(module, title, lambda network=network, title=title, **sizes: built.update([title])
                            or network(**sizes))
    args = flags("--neg_num 3 --batch_size 4")
    setting = loss.Context(args, torch.nn.Conv2d(3, 3, 1), [])
    criterion = loss.build_loss("CSD+VGG+DCR+DMM", setting)
    assert built == {"VGG19": 1, "VQGAN": 1}
    assert set(criterion.state_dict()) == {"terms.DCR.history.weight", "terms.DCR.history.bias"}
    assert criterion.trainable_parameters() == []
    for net in setting.shared.values():
        assert not net.training and not any(p.requires_grad for p in net.parameters())


# ---- reduced precision

@pytest.mark.parametrize("shared, make_sizes", [(vgg.shared_vgg, {}), (vqgan.shared_vqgan, dict(
    ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attention=(4,), z_channels=8, embed_dim=8, n_embed=16))])
def test_bf16_features_and_their_gradients_are_close_to_those_in_float32(monkeypatch, shared, make_sizes):
    monkeypatch.setattr(vqgan, "F16_1024", make_sizes)
    torch.manual_seed(0)
    images, found = 255 * torch.rand(2, 3, 32, 32), {}
    for precision in ("single", "bf16"):
        net = shared(loss.Context(flags(f"--feature_precision {precision}"), None, []))
        x = images.clone().requires_grad_()
        maps = net(x)
        if shared is vqgan.shared_vqgan:
            maps.append(net.code_logits(net.latent(maps[-1])))
            assert net.quantize.embedding.weight.dtype == torch.float32
        sum((weights * y).mean() for weights, y in zip((0.3, 0.1, 0.5, 0.7, 0.2, 0.4), maps)).backward()
        found[precision] = [y.detach() for y in maps] + [x.grad]
    assert {layer.weight.dtype for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)} == {torch.bfloat16}
    for single, bf16 in zip(found["single"], found["bf16"], strict=True):
        assert bf16.dtype == torch.float32 and not torch.equal(single, bf16)
        # rounding changes the signs before some ReLUs, and with them single values of the gradient
        assert (single - bf16).norm() < (0.2 if bf16.shape == images.shape else 0.05) * single.norm()
