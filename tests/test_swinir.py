"""SwinIR against the authors' own outputs, for every upsampler that they released."""
import pytest
import torch

from model import load_model, swinir
from model.swinir import SwinIR

VARIANTS = [
    dict(scale=2), dict(scale=3), dict(scale=4, mlp_ratio=2.75), dict(scale=8), dict(scale=2, in_chans=1),
    dict(scale=3, upsampler="pixelshuffledirect"), dict(scale=4, upsampler="pixelshuffledirect", in_chans=1),
    dict(scale=2, upsampler="nearest+conv"), dict(scale=4, upsampler="nearest+conv"),
    dict(scale=4, upsampler="nearest+conv", resi_connection="3conv"), dict(scale=2, resi_connection="3conv"),
    dict(scale=1, upsampler=""), dict(scale=1, upsampler="", in_chans=1),
    dict(scale=1, upsampler="", in_chans=1, window_size=7, img_range=255), dict(scale=2, window_size=7)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(scale=2, **sizes):
    return SwinIR(scale, **{**dict(depths=(2, 1, 2), n_feats=12, num_heads=(2, 3, 2), window_size=4), **sizes})


def perturbed(net):
    """Perturb the weights so that every module contributes; the initial ones are tiny."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("name", ["swinir_classical_x2", "swinir_classical_x4", "swinir_light_x2"])
def test_agrees_with_the_authors(golden, name):
    path, x, arrays, about = golden(name)
    net = load_model(path)
    net.rgb_range = 1
    with torch.no_grad():
        sr, feature_maps = net(x, features=True)
    assert (sr - arrays["output"]).abs().max() <= 2e-4 * arrays["output"].abs().max()
    assert [x.shape for x in feature_maps] == 4 * [(1, 12, 21, 16)]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == about["params"]
    assert not [name for name in net.state_dict() if name not in about["keys"]]


@pytest.mark.parametrize("scale, classical, student, light", [
    (2, 11.75, 1.088, 0.910), (3, 11.94, 1.272, 0.918), (4, 11.90, 1.235, 0.930)])
def test_has_the_published_number_of_parameters(scale, classical, student, light):
    with torch.device("meta"):
        nets = (SwinIR(scale, 6 * (6,), 180, 6 * (6,)), SwinIR(scale), SwinIR(scale, upsampler="pixelshuffledirect"))
    millions = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]
    assert [round(millions[0], 2), round(millions[1], 3), round(millions[2], 3)] == [classical, student, light]


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
@pytest.mark.parametrize("constants", [True, False])
def test_a_file_of_weights_alone_gives_the_same_network(tmp_path, sizes, constants):
    net = perturbed(small(**sizes))
    state = net.state_dict()
    if constants:  # the authors' files hold them, whatever their size
        state.update({f"layers.0.residual_group.blocks.1.{name}": torch.zeros(4, 4)
                      for name in ("attn.relative_position_index", "attn_mask")})
    torch.save({"params_ema": state, "config": net.config}, tmp_path / "swinir.pth")  # plain types: safe to read
    loaded = load_model(tmp_path / "swinir.pth")
    assert loaded.config == net.config
    x = 255 * torch.rand(2, sizes.get("in_chans", 3), 9, 6)
    with torch.no_grad():
        sr, feature_maps = loaded(x, features=True)
        assert torch.equal(sr, net(x))
    assert sr.shape == (*x.shape[:2], 9 * net.scale, 6 * net.scale)
    assert [x.shape for x in feature_maps] == 4 * [(2, 12, 9, 6)]


def test_feature_maps_are_those_after_thirds_of_the_groups():
    net, outputs = perturbed(small(depths=4 * (1,), num_heads=4 * (2,))), []
    for part in net.layers:
        part.register_forward_hook(lambda _, __, out: outputs.append(out.permute(0, 3, 1, 2)))
    net.conv_after_body.register_forward_hook(lambda _, __, out: outputs.append(out))
    _, feature_maps = net(255 * torch.rand(1, 3, 8, 8), features=True)
    assert torch.equal(feature_maps[1], outputs[0])
    assert torch.equal(feature_maps[2], outputs[1])
    assert torch.equal(feature_maps[3], outputs[4] + feature_maps[0])  # with the long skip connection


def test_restoration_adds_to_its_input_and_the_means_cancel():
    net = small(1, upsampler="")
    torch.nn.init.zeros_(net.conv_last.weight)
    torch.nn.init.zeros_(net.conv_last.bias)
    x = 255 * torch.rand(1, 3, 8, 8)
    assert torch.allclose(net(x), x, atol=1e-3)


def test_img_range_applies_inside_the_network_only():
    net = perturbed(small(1, upsampler="", in_chans=1))
    wide = small(1, upsampler="", in_chans=1, img_range=255).eval()
    wide.load_state_dict(net.state_dict())
    seen = []
    for each in (net, wide):
        each.conv_first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        each(torch.full((1, 1, 4, 4), 51.0))
    assert torch.allclose(seen[0], torch.tensor(0.2))
    assert torch.allclose(seen[1], torch.tensor(51.0))


@pytest.mark.parametrize("height, width, window", [(12, 8, 4), (4, 4, 4), (7, 21, 7), (16, 8, 8)])
def test_mask_separates_positions_that_are_adjacent_through_the_shift_only(height, width, window):
    shift = window // 2
    mask = swinir.shift_mask(height, width, window, shift, torch.device("cpu"))
    assert mask.shape == (height // window * (width // window), 1, window ** 2, window ** 2)

    def place(number, position):  # in the rolled image, and where that was before
        row = number // (width // window) * window + position // window
        column = number % (width // window) * window + position % window
        return (row, column), ((row + shift) % height, (column + shift) % width)

    for number in range(len(mask)):
        for i in range(window ** 2):
            (row_i, column_i), (true_row_i, true_column_i) = place(number, i)
            for j in range(0, window ** 2, 3):
                (row_j, column_j), (true_row_j, true_column_j) = place(number, j)
                together = (row_i - row_j, column_i - column_j) == (true_row_i - true_row_j, true_column_i - true_column_j)
                assert mask[number, 0, i, j] == (0 if together else -100)


def test_windows_are_partitioned_and_reversed():
    x = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    windows = swinir.to_windows(x, 4)
    assert torch.equal(windows[1].view(4, 4, 3), x[0, :4, 4:8])
    assert torch.equal(windows[6 + 3].view(4, 4, 3), x[1, 4:, :4])
    assert torch.equal(swinir.from_windows(windows, 4, 8, 12), x)


def test_training_and_inference_compute_the_same():
    net, x = perturbed(small()), 255 * torch.rand(2, 3, 12, 8)
    swinir.shift_mask.cache_clear()
    with torch.inference_mode():
        fused = net(x).clone()
    trained = net(x)
    trained.mean().backward()  # with the mask that was computed in inference mode
    assert torch.allclose(trained.detach(), fused, rtol=1e-4, atol=1e-4 * float(fused.abs().max()))


def test_images_of_a_batch_and_their_memory_format_do_not_matter():
    net, x = perturbed(small()), 255 * torch.rand(3, 3, 12, 8)
    with torch.no_grad():
        together = net(x)
        tolerance = 1e-4 * float(together.abs().max())
        assert torch.allclose(together, torch.cat([net(one[None]) for one in x]), atol=tolerance)
        assert torch.allclose(together, net(x.to(memory_format=torch.channels_last)), atol=tolerance)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("sizes", [VARIANTS[0], VARIANTS[5], VARIANTS[8], VARIANTS[11]], ids=str)
def test_image_stays_in_float32_under_autocast(sizes, grad):
    net, x = small(**sizes).eval(), 255 * torch.rand(1, 3, 8, 8)
    ends, kinds = [net.conv_first, net.conv_last if hasattr(net, "conv_last") else net.upsample[0]], []
    for part in (*ends, net.layers[0].conv):
        part.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x)
    assert low.dtype == torch.float32
    assert kinds == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.allclose(low, net(x), atol=2.5)  # 1 % of the range: the body is computed with 8 significant bits


@pytest.mark.parametrize("sizes", [VARIANTS[0], VARIANTS[6], VARIANTS[9], VARIANTS[11]], ids=str)
def test_every_parameter_gets_a_gradient(sizes):
    net = perturbed(small(**sizes))
    net(255 * torch.rand(2, sizes.get("in_chans", 3), 8, 8)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max()] == []


@pytest.mark.parametrize("sizes, words", [
    (dict(depths=(2, 2)), "2 depths and 3 num_heads"), (dict(n_feats=10), "10 channels"),
    (dict(scale=3, upsampler="nearest+conv"), "nearest"), (dict(upsampler=""), "scale 2"),
    (dict(resi_connection="2conv"), "2conv")])
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        small(**sizes)
