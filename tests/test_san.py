"""SAN against the authors' own output, and its modules against direct implementations of their formulas."""
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import load_model, san
from model.san import SAN, NonLocal, SecondOrderAttention

UNUSED = ("conv_last.", ".gamma", "non_local.soca.")  # the first of the network only: see SAN


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(scale=2, **sizes):
    return SAN(scale, **{**dict(n_resgroups=2, n_resblocks=1, n_feats=16, reduction=4), **sizes})


def test_agrees_with_the_authors(golden):
    path, x, arrays, about = golden("san_x2")
    net = load_model(path)
    with torch.no_grad():
        sr, feature_maps = net(x, features=True)
    assert (sr - arrays["output"]).abs().max() <= 2e-4 * arrays["output"].abs().max()
    assert [x.shape for x in feature_maps] == 4 * [(2, 16, 12, 10)]
    # the 24 of the mean shifts are trained in the authors' code
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == about["params"] - 24
    # f3 excludes the long skip connection
    assert torch.equal(sr, net.add_mean(net.tail(feature_maps[3] + feature_maps[0])))


@pytest.mark.parametrize("scale, groups, blocks, millions", [
    (2, 20, 10, 15.71), (4, 20, 10, 15.86), (2, 6, 10, 4.848), (4, 6, 10, 4.996)])
def test_has_the_published_number_of_parameters(scale, groups, blocks, millions):
    with torch.device("meta"):
        net = SAN(scale, groups, blocks)
    digits = 2 if groups == 20 else 3
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, digits) == millions


def test_feature_layers_are_those_of_fakd():
    with torch.device("meta"):
        assert [SAN(2, groups, 1).feature_layers for groups in (20, 6, 1)] == [(7, 14), (2, 4), (1, 1)]


def test_feature_maps_1_and_2_are_the_inputs_of_the_next_groups():
    net, inputs_of_groups = small(n_resgroups=6), []
    nn.init.constant_(net.gamma, 0.1)
    for group in net.RG:
        group.register_forward_hook(lambda _, inputs, __: inputs_of_groups.append(inputs[0]))
    _, feature_maps = net(255 * torch.rand(1, 3, 6, 6), features=True)
    assert torch.equal(feature_maps[1], inputs_of_groups[2])
    assert torch.equal(feature_maps[2], inputs_of_groups[4])


def test_covariance_is_the_product_with_the_centring_matrix():
    x = torch.randn(2, 5, 4, 7, dtype=torch.float64) * 9 + 100
    m = 4 * 7
    centring = (torch.eye(m, dtype=torch.float64) - 1 / m) / m
    expected = x.flatten(2) @ centring @ x.flatten(2).mT
    assert torch.allclose(san.covariance(x), expected, rtol=1e-10, atol=1e-10)
    # a large mean costs no digits in float32
    shifted = san.covariance((x + 1000).float()).double()
    assert torch.allclose(shifted, expected, rtol=1e-3, atol=1e-3)


def test_square_root_iterates_five_times_on_each_eigenvalue():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    values = torch.tensor([9, 4, 1, 0.5, 0.01, 0], dtype=torch.float64)
    matrix = basis @ values.diag() @ basis.T
    root, inverse = values / values.sum(), torch.ones(6, dtype=torch.float64)
    for _ in range(5):
        step = (3 - root * inverse) / 2
        root, inverse = root * step, inverse * step
    expected = basis @ (root * values.sum().sqrt()).diag() @ basis.T
    assert torch.allclose(san.square_root(matrix[None])[0], expected, atol=1e-12)
    exact = basis @ values.sqrt().diag() @ basis.T
    assert torch.allclose(san.square_root(matrix[None], 25)[0], exact, atol=1e-9)


def test_covariance_is_that_of_the_centre_crop_of_a_large_image(monkeypatch):
    attention, x = SecondOrderAttention(8, 2), torch.randn(2, 8, 7, 12)
    nn.init.constant_(attention.conv_du[0].bias, 1.0)  # past the ReLU
    with torch.no_grad():
        whole = attention(x)
        monkeypatch.setattr(san, "COVARIANCE_SIDE", 5)
        middle = x[:, :, 1:6, 3:8]
        assert torch.allclose(attention(x) / x, (attention(middle) / middle)[..., :1, :1], atol=1e-5)
        assert not torch.allclose(attention(x), whole, atol=1e-4)


@pytest.mark.parametrize("height, width", [(8, 8), (9, 7), (13, 10), (4, 5)])
def test_non_local_block_is_softmax_attention_over_each_quadrant(height, width):
    block = NonLocal(16, 3).double()
    nn.init.normal_(block.W.weight)
    x = torch.randn(2, 16, height, width, dtype=torch.float64, requires_grad=True)
    expected = torch.empty_like(x)
    for rows in (slice(None, height // 2), slice(height // 2, None)):
        for columns in (slice(None, width // 2), slice(width // 2, None)):
            part = x[:, :, rows, columns]
            key, value = (nn.functional.max_pool2d(conv(part), 2).flatten(2) for conv in (block.phi, block.g))
            weights = (block.theta(part).flatten(2).mT @ key).softmax(-1)
            expected[:, :, rows, columns] = part + block.W((value @ weights.mT).view(2, 3, *part.shape[2:]))
    assert torch.allclose(block(x), expected, atol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (block(x), expected)]
    assert torch.allclose(*gradients, atol=1e-8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("n_inner", [8, 2])
def test_non_local_block_does_not_store_the_matrix_of_scores(layout, n_inner):
    block = NonLocal(16, n_inner)
    x = torch.randn(2, 16, 9, 8).to(memory_format=layout).requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises an error for inputs that this kernel does not support
        block(x).sum().backward()
    assert san.to_tokens(x[:, :n_inner]).shape == (2, 1, 72, 8)  # GPU kernels do not support a width of 2


def test_second_order_parts_stay_in_float32_under_autocast():
    block, attention, x = NonLocal(16, 4), SecondOrderAttention(16, 4), 50 * torch.randn(1, 16, 8, 8)
    nn.init.normal_(block.W.weight)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = block(x), attention(x)
    with torch.no_grad():
        assert torch.equal(low[0], block(x))
        assert torch.allclose(low[1], attention(x), rtol=0.02, atol=0.02 * 50)
        assert san.square_root(san.covariance(x)).isfinite().all()


@pytest.mark.parametrize("height, width", [(1, 1), (1, 6), (3, 2), (7, 5)])
def test_any_size_has_an_output_and_finite_gradients(height, width):
    net = small(3)
    nn.init.normal_(net.non_local.non_local.W.weight)
    sr, feature_maps = net(255 * torch.rand(2, 3, height, width), features=True)
    assert sr.shape == (2, 3, 3 * height, 3 * width)
    assert [x.shape for x in feature_maps] == 4 * [(2, 16, height, width)]
    sr.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_every_parameter_but_the_unused_ones_gets_a_gradient():
    net = small()
    nn.init.normal_(net.non_local.non_local.W.weight)
    nn.init.constant_(net.gamma, 0.1)
    net(255 * torch.rand(2, 3, 8, 8)).square().mean().backward()
    unused = {name for name, p in net.named_parameters()
              if p.requires_grad and (p.grad is None or not p.grad.abs().max())}
    assert unused == {name for name, _ in net.named_parameters()
                    if name.startswith(UNUSED[0]) or any(part in name for part in UNUSED[1:])}


@pytest.mark.parametrize("sizes", [
    dict(scale=2), dict(scale=3, n_resgroups=3), dict(scale=4, n_resblocks=2), dict(scale=8, n_feats=24, reduction=8),
    dict(scale=2, n_inner=4)])  # the last: n_feats // 4, as FAKD's
def test_a_file_of_weights_alone_gives_the_same_network(tmp_path, sizes):
    net = small(**sizes).eval()
    path, x = tmp_path / "san.pt", 255 * torch.rand(1, 3, 6, 5)
    torch.save(net.state_dict(), path)
    loaded = load_model(path)
    assert type(loaded) is SAN
    assert loaded.config == net.config
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


def test_sizes_that_leave_no_channels_are_refused():
    for sizes in (dict(n_feats=4, reduction=2), dict(n_feats=8, reduction=16), dict(n_inner=0)):
        with pytest.raises(ValueError, match="leaves none"):
            small(**sizes)
