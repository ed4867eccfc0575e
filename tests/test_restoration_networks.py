"""NAFNet, Restormer and RRDB against the authors' outputs: padding, local pooling, sizes read from files, refusals."""
from types import SimpleNamespace

import pytest
import torch

import inference
from checkpoint import save_model
from conftest import esrgan_names
from model import CheckpointError, inherit, load_model, make_model, slim
from model.nafnet import NAFNet, local_mean
from model.restormer import Restormer, TransposedAttention, attend, expansion_factor
from model.roles import make_teachers
from model.rrdb import RRDB
from option_types import OutputSize
from summary import count
from system import memory_budget
from system.errors import UserError

NAFNET = dict(n_feats=8, enc_blk_nums=[1, 2], middle_blk_num=2, dec_blk_nums=[2, 1])
RESTORMER = dict(n_feats=8, num_blocks=[2, 1, 1, 3], num_refinement_blocks=2, heads=[1, 2, 2, 4])


def parameters(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def randomise(net):
    """Draw the weights that are zero in a new NAFNet, whose blocks then compute the identity."""
    for name, parameter in net.named_parameters():
        if name.endswith(("beta", "gamma")):
            torch.nn.init.normal_(parameter)
    return net


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the authors' outputs

@pytest.mark.parametrize("name, tolerance, features", [
    ("nafnet", 1e-5, [16] * 4), ("restormer", 1e-5, [24, 24, 48, 48]), ("rrdb_x4", 2e-4, [16] * 4)])
def test_agreement_with_the_authors(golden, name, tolerance, features):
    path, x, arrays, about = golden(name)
    net = load_model(path)
    net.rgb_range = 1
    with torch.no_grad():
        sr, feature_maps = net(x, features=True)
        net.rgb_range = 255
        assert torch.allclose(net(x * 255), sr * 255, rtol=1e-4, atol=0.01)
        channels_last = net((x * 255).contiguous(memory_format=torch.channels_last)) / 255
    expected = arrays["output"]
    assert max((one - expected).abs().max() for one in (sr, channels_last)) <= tolerance * expected.abs().max()
    assert [list(one.shape) for one in feature_maps] == [[len(x), channels, *x.shape[2:]] for channels in features]
    assert parameters(net) == about["params"]


def test_restormer_pads_by_reflection(golden):
    path, x, arrays, _ = golden("restormer")
    net = load_model(path)
    net.rgb_range = 1
    with torch.no_grad():
        assert (net(x[..., :27, :37]) - arrays["output_27x37"]).abs().max() <= 1e-5 * arrays["output_27x37"].abs().max()


def test_local_pooling_agrees_with_the_authors_and_is_for_evaluation_only(golden):
    path, x, arrays, _ = golden("nafnet")
    net = load_model(path, tlc_size=24)
    assert net.config["tlc_size"] == 24
    net.rgb_range = 1
    with torch.no_grad():
        assert (net(x) - arrays["output_local"]).abs().max() <= 1e-5 * arrays["output_local"].abs().max()
        assert (net.train()(x) - arrays["output"]).abs().max() <= 1e-5 * arrays["output"].abs().max()


@pytest.mark.parametrize("height, width", [(9, 14), (4, 20), (3, 3)])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_local_means(height, width, size):
    x = torch.rand(2, 3, height, width)
    sides = min(size, height), min(size, width)
    means = torch.nn.functional.avg_pool2d(x, sides, 1)
    rows, columns = (((torch.arange(length) - (side - 1) // 2).clamp(0, length - side))
                     for length, side in zip((height, width), sides))
    assert torch.allclose(local_mean(x, size), means[:, :, rows][..., columns], atol=1e-6)


@pytest.mark.parametrize("norm", ["WithBias", "BiasFree"])
def test_normalisation_is_that_of_the_formula(norm):
    net = Restormer(**RESTORMER, LayerNorm_type=norm)
    layer, x = net.latent[0].norm1, torch.randn(2, 64, 3, 5) + 1
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    centred = x - x.mean(1, keepdim=True)
    deviation = (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    weight, bias = (getattr(layer.body, key, torch.zeros(64))[:, None, None] for key in ("weight", "bias"))
    expected = (x if norm == "BiasFree" else centred) / deviation * weight + bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_attention_is_that_of_the_formula_in_half_precision_too():
    query, key, value = (torch.randn(2, 12, 8, 6) for _ in range(3))
    temperature, projection = torch.rand(3, 1, 1) + 0.5, torch.randn(12, 12, 1, 1)
    heads = [x.unflatten(1, (3, 4)).flatten(3) for x in (query, key, value)]
    normalised = [torch.nn.functional.normalize(x, dim=3) for x in heads[:2]]
    out = ((normalised[0] @ normalised[1].mT) * temperature).softmax(3) @ heads[2]
    expected = torch.nn.functional.conv2d(out.flatten(1, 2).unflatten(2, (8, 6)), projection)
    assert torch.allclose(attend(query, key, value, temperature, projection), expected, atol=1e-5)
    large = [100 * x.half() for x in (query, key)]  # their products overflow in float16
    assert torch.allclose(attend(*large, value, temperature, projection), expected, atol=2e-2)


# ---- sizes, and their recognition

NETS = [*(RRDB(scale, n_feats=8, num_block=blocks, num_grow_ch=4) for scale, blocks in ((1, 1), (2, 3), (4, 2))),
        NAFNet(**NAFNET), NAFNet(n_feats=4, enc_blk_nums=[1], dec_blk_nums=[3]), Restormer(**RESTORMER),
        Restormer(**{**RESTORMER, "n_feats": 16, "heads": [2, 1, 4, 2]}, LayerNorm_type="BiasFree"),
        Restormer(**RESTORMER, ffn_expansion_factor=2), Restormer(**RESTORMER, ffn_expansion_factor=3.125)]


@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{type(net).__name__} {list(net.config.values())}")
@pytest.mark.parametrize("wrapper", ["params", "params_ema"])
def test_sizes_are_read_from_a_released_file(tmp_path, net, wrapper):
    torch.save({wrapper: net.state_dict()}, tmp_path / "released.pth")
    save_model(net, tmp_path / "own.pt")
    x = torch.rand(1, 3, 9, 7) * 255
    for file in ("released.pth", "own.pt"):
        loaded = load_model(tmp_path / file)
        assert type(loaded) is type(net)
        assert {**loaded.config, "ffn_expansion_factor": 0} == {**net.config, "ffn_expansion_factor": 0}
        with torch.no_grad():
            assert torch.equal(loaded(x), net.eval()(x))


@pytest.mark.parametrize("channels", [8, 24, 32, 48, 64])
@pytest.mark.parametrize("factor", [1, 2, 2.66, 3.5])
def test_the_expansion_factor_gives_the_hidden_channels_of_all_levels(channels, factor):
    widths = [channels * 2**level for level in range(4)]
    hidden = [int(width * factor) for width in widths]
    found = expansion_factor(widths, hidden)
    assert [int(width * found) for width in widths] == hidden and len(str(found)) <= len(str(float(factor)))
    with pytest.raises(ValueError, match="no multiple"):
        expansion_factor(widths, [*hidden[:-1], hidden[-1] * 2])


def test_tlc_size_is_kept_in_a_file_and_is_given_to_teachers(tmp_path):
    net = randomise(NAFNet(**NAFNET))
    save_model(net, tmp_path / "a.pt")
    other = load_model(tmp_path / "a.pt", tlc_size=8)
    x = 255 * torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        assert not torch.allclose(other(x), net.eval()(x), atol=1e-3)
        save_model(other, tmp_path / "b.pt")
        assert torch.equal(load_model(tmp_path / "b.pt")(x), other(x))
        args = SimpleNamespace(teacher=[str(tmp_path / "a.pt")], scale=1, tlc_size=8, rgb_range=255)
        assert torch.equal(make_teachers(args)[0](x), other(x))


@pytest.mark.parametrize("layout", ["ESRGAN", "the first ESRGAN"])
def test_the_layouts_of_esrgan(golden, tmp_path, layout):
    path, x, arrays, _ = golden("rrdb_x4")
    torch.save(esrgan_names(torch.load(path, weights_only=True), layout), tmp_path / "old.pth")
    net = load_model(tmp_path / "old.pth")
    net.rgb_range = 1
    with torch.no_grad():
        assert (net(x) - arrays["output"]).abs().max() <= 2e-4 * arrays["output"].abs().max()


# ---- what these networks support

def test_nafnet_pads_with_zeros_that_the_channel_attention_pools():
    net = randomise(NAFNet(**NAFNET)).eval()
    x = 255 * torch.rand(1, 3, 10, 7)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 2))
    with torch.no_grad():
        assert torch.equal(net(x), net(padded)[..., :10, :7])


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_receptive_field_of_rrdb_is_exact(scale):
    net = RRDB(scale, n_feats=4, num_block=1, num_grow_ch=2).double().requires_grad_(False)
    for p in net.parameters():
        p.fill_(1 / p[0].numel() if p.ndim > 1 else 0)
    reach, window = net.receptive_field, net.window
    found = 0
    for offset in range(window):
        centre = (reach // window + 2) * window + offset
        lr = torch.zeros(1, 3, *2 * [2 * centre + 2 * window], dtype=torch.float64)
        lr[..., centre, centre] = 255
        affected = torch.nonzero(net(lr)[0, 0]) // scale - centre
        found = max(found, -affected.min().item(), affected.max().item())
    assert found == reach


def test_the_tiles_of_a_deep_rrdb_overlap_by_less_than_its_receptive_field():
    net = RRDB(4, n_feats=4, num_block=23, num_grow_ch=2).eval()
    assert net.receptive_field == 349 and memory_budget.default_memory(net, torch.device("cpu")) == 1e9
    lr = 255 * torch.rand(1, 3, 100, 8)
    sizes = []
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    with torch.no_grad():
        assert torch.allclose(inference.chop(net, lr, tile=20), net(lr), atol=0.05)
    assert sizes[0] == (84, 8)


def test_tiles_of_rrdb_agree_with_the_whole_image():
    net = RRDB(2, n_feats=4, num_block=1, num_grow_ch=2).eval()
    lr = 255 * torch.rand(1, 3, 101, 90)
    with torch.no_grad():
        assert torch.allclose(inference.chop(net, lr, tile=20), net(lr), atol=1e-3)


@pytest.mark.parametrize("network, sizes, words", [
    (NAFNet, dict(scale=2), "there is no NAFNet for scale 2, only for 1"),
    (NAFNet, dict(enc_blk_nums=[1, 1]), "2 enc_blk_nums and 4 dec_blk_nums"),
    (Restormer, dict(scale=4), "there is no Restormer for scale 4, only for 1"),
    (Restormer, dict(heads=[1, 2]), "4 num_blocks and 2 heads: it has 4 levels"),
    (Restormer, dict(heads=[1, 2, 5, 8]), r"not divisible by \[1, 2, 5, 8\] heads"),
    (Restormer, dict(n_feats=9, heads=[1, 1, 1, 1]), "9 channels, doubled at each level, are odd"),
    (Restormer, dict(LayerNorm_type="None"), "LayerNorm_type None is none of WithBias, BiasFree"),
    (RRDB, dict(scale=3), "there is no RRDB for scale 3, only for 1, 2, 4")])
def test_sizes_that_do_not_fit(network, sizes, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        network(**sizes)
    with pytest.raises(UserError, match=f"{network.__name__}: .*{words}"):
        make_model(network.__name__, SimpleNamespace(**{"scale": 1, **sizes}))


@pytest.mark.parametrize("net, key, shape", [
    (RRDB(4, 8, 1, 4), "conv_first.weight", (8, 1, 3, 3)), (RRDB(4, 8, 1, 4), "conv_first.weight", (8,)),
    (Restormer(**RESTORMER), "latent.0.ffn.project_out.weight", (64, 500, 1, 1)),
    (NAFNet(**NAFNET), "intro.weight", ())])
def test_shapes_of_no_network_are_refused(tmp_path, net, key, shape):
    torch.save({**net.state_dict(), key: torch.zeros(shape)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"nearly {type(net).__name__} .*but the shapes"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize("net", [NAFNet(**NAFNET), Restormer(**RESTORMER)], ids=["NAFNet", "Restormer"])
def test_networks_that_cannot_be_sliced_are_refused_in_one_line(net):
    with pytest.raises(UserError, match="cannot be sliced, since its blocks divide their channels"):
        slim(net, 0.5)


@pytest.mark.parametrize("teacher, student", [
    (NAFNet(**{**NAFNET, "enc_blk_nums": [1, 4]}), NAFNet(**NAFNET)),
    (Restormer(**RESTORMER), Restormer(**{**RESTORMER, "num_blocks": [1, 1, 1, 2]})),
    (RRDB(4, 8, 3, 4), RRDB(4, 4, 2, 2))], ids=["NAFNet", "Restormer", "RRDB"])
def test_students_inherit_evenly_spaced_blocks(teacher, student):
    inherit(student, drawn(teacher))
    values = {value for parameter in teacher.parameters() for value in parameter.flatten().tolist()}
    assert all(set(parameter.flatten().tolist()) <= values for parameter in student.parameters())


def drawn(net):
    """The network with random weights that are all different."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


def test_a_narrower_nafnet_inherits_the_first_channels_of_both_factors_of_a_gate():
    teacher, student = drawn(NAFNet(**{**NAFNET, "n_feats": 8})), NAFNet(**{**NAFNET, "n_feats": 4})
    inherit(student, teacher)
    block, source = student.encoders[1][0], teacher.encoders[1][0]  # of 8 and 16 channels
    both = [*range(8), *range(16, 24)]
    for layer in ("conv1", "conv4"):
        assert torch.equal(getattr(block, layer).weight, getattr(source, layer).weight[both][:, :8])
    assert torch.equal(block.conv2.weight, source.conv2.weight[both])
    assert torch.equal(block.conv3.weight, source.conv3.weight[:8, :8])
    assert torch.equal(student.ups[0][0].weight, teacher.ups[0][0].weight[:32, :16])


def test_a_narrower_restormer_inherits_the_first_channels_of_each_head_and_part():
    teacher, student = drawn(Restormer(**{**RESTORMER, "n_feats": 8})), Restormer(**{**RESTORMER, "n_feats": 4})
    inherit(student, teacher)
    block, source = student.encoder_level2[0], teacher.encoder_level2[0]  # of 8 and 16 channels, 2 heads
    heads = [*range(4), *range(8, 12)]
    rows = [16 * part + row for part in range(3) for row in heads]
    hidden = int(8 * 2.66), int(16 * 2.66)
    gates = [*range(hidden[0]), *range(hidden[1], hidden[1] + hidden[0])]
    assert torch.equal(block.attn.qkv.weight, source.attn.qkv.weight[rows][:, :8])
    assert torch.equal(block.attn.qkv_dwconv.weight, source.attn.qkv_dwconv.weight[rows])
    assert torch.equal(block.attn.project_out.weight, source.attn.project_out.weight[:8, heads])
    assert torch.equal(block.ffn.project_in.weight, source.ffn.project_in.weight[gates][:, :8])
    assert torch.equal(block.ffn.project_out.weight, source.ffn.project_out.weight[:8, :hidden[0]])
    joined = [*range(4), *range(8, 12)]  # of 4 and 8 channels each of decoder and encoder
    block, source = student.refinement[0], teacher.refinement[0]
    assert torch.equal(block.norm1.body.bias, source.norm1.body.bias[joined])
    assert torch.equal(block.ffn.project_out.weight, source.ffn.project_out.weight[joined, :hidden[0]])
    assert torch.equal(student.output.weight, teacher.output.weight[:, joined])
    assert torch.equal(student.reduce_chan_level2.weight, teacher.reduce_chan_level2.weight[:8, [*range(8), *range(16, 24)]])


def test_a_nafnet_inherits_the_channels_with_the_largest_norm_and_a_restormer_is_refused():
    teacher, student = drawn(NAFNet(**NAFNET)), NAFNet(**{**NAFNET, "n_feats": 4, "enc_blk_nums": [1, 1]})
    first, second = torch.tensor([1, 2, 6]), torch.tensor([9, 10, 14])  # of both factors of the gate of the first block
    with torch.no_grad():
        for index in (first, second):
            teacher.encoders[0][0].conv1.weight[index] *= 100
    inherit(student, teacher, "norm")
    rows = student.encoders[0][0].conv1.weight
    assert (rows.abs().mean((1, 2, 3)) > 10).nonzero().flatten().tolist() in [[*part, *(4 + p for p in part)] for part in (
        [0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3])]
    values = {value for parameter in teacher.parameters() for value in parameter.flatten().tolist()}
    assert all(set(parameter.flatten().tolist()) <= values for parameter in student.parameters())
    with pytest.raises(UserError, match=r"Restormer cannot be followed through .*; give --init_from_teacher first"):
        inherit(Restormer(**RESTORMER), Restormer(**RESTORMER), "norm")


@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{type(net).__name__} {list(net.config.values())}")
def test_gradient_reaches_every_parameter(net):
    net = randomise(type(net)(**net.config))
    net(torch.rand(2, 3, 8, 8) * 255).abs().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("net", [NAFNet(**NAFNET), Restormer(**RESTORMER)], ids=["NAFNet", "Restormer"])
def test_flops_are_those_of_the_layers(net):
    """Restormer's attention: products of queries and keys, of projection and attention matrix, and of that and values."""
    expected = 0

    def add(module, inputs, output):
        nonlocal expected
        if isinstance(module, torch.nn.Conv2d):
            expected += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, TransposedAttention):
            (_, channels, height, width), heads = output.shape, len(module.temperature)
            expected += 2 * channels**2 * (height * width * (1 + 1 / heads) + channels / heads)

    hooks = [module.register_forward_hook(add) for module in net.modules()]
    net(torch.rand(1, 3, 16, 24))
    for hook in hooks:
        hook.remove()
    assert count(net, OutputSize(24, 16)).flops == expected
