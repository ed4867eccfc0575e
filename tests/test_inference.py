"""Upscaling in tiles and over orientations, and the way back to an image."""
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import inference
from model.edsr import EDSR
from model.rcan import RCAN


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Nearest(nn.Module):
    """Repeats each pixel, whatever the tiles and orientations; keeps its inputs."""
    scale = 2

    def __init__(self, window=1, receptive_field=3):
        super().__init__()
        self.window, self.receptive_field = window, receptive_field
        self.parameter = nn.Parameter(torch.zeros(()))
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def places(height, width, images=1):
    """Images whose channels hold the row, the column and the number of the image of each pixel."""
    rows = torch.arange(height).view(1, 1, -1, 1).expand(images, 1, height, width)
    columns = torch.arange(width).expand(images, 1, height, width)
    return torch.cat([rows, columns, torch.arange(images).view(-1, 1, 1, 1).expand_as(rows)], 1).float()


@pytest.fixture(scope="module")
def edsr():
    torch.manual_seed(0)
    return EDSR(2, n_resblocks=2, n_feats=8).eval()


# ---- tiles

@pytest.mark.parametrize("tile", [1, 3, 7, 16, 40, None])
@pytest.mark.parametrize("size", [(20, 33), (9, 40), (5, 4)])
def test_tiles_of_a_finite_network_make_the_whole_image(edsr, size, tile):
    lr = 255 * torch.rand(1, 3, *size)
    with torch.no_grad():
        assert torch.allclose(inference.chop(edsr, lr, tile), edsr(lr), rtol=0, atol=0.02)


def test_tiles_with_too_small_a_halo_do_not(edsr):
    lr = 255 * torch.rand(1, 3, 20, 33)
    with torch.no_grad():
        assert (inference.chop(edsr, lr, tile=7, halo=2) - edsr(lr)).abs().max() > 0.02


@pytest.mark.parametrize("n_resblocks, scale", [(1, 2), (3, 3), (2, 4), (1, 8)])
def test_receptive_field_is_what_the_network_sees(n_resblocks, scale):
    net = EDSR(scale, n_resblocks, n_feats=4).double()
    lr = (255 * torch.rand(1, 3, 31, 31, dtype=torch.float64)).requires_grad_()
    net(lr)[..., 15 * scale:16 * scale, 15 * scale:16 * scale].sum().backward()
    rows = lr.grad.abs().sum((0, 1, 3)).nonzero()[:, 0]
    assert 15 - rows.min() == rows.max() - 15 == min(net.receptive_field, 15)


def test_tiles_of_a_network_that_sees_everything_come_close():
    net = RCAN(2, n_resgroups=2, n_resblocks=2, n_feats=8, reduction=4).eval()
    lr = 20 * places(60, 70).remainder(12)
    with torch.no_grad():
        whole, tiled = net(lr), inference.chop(net, lr, tile=24)
    assert 0 < (whole - tiled).abs().max() < 1


@pytest.mark.parametrize("tile, halo, batch", [(None, None, None), (5, 0, None), (5, 2, 1), (16, 3, 4), (1, 1, 7),
                                               (100, 9, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 23), (40, 16)])
@pytest.mark.parametrize("window", [1, 8])
def test_every_pixel_is_written_from_its_own_place(monkeypatch, size, tile, halo, batch, window):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
    net, lr = Nearest(window), places(*size)
    assert torch.equal(inference.chop(net, lr, tile, halo, batch), net(lr))


def test_images_of_a_batch_keep_apart():
    net, lr = Nearest(), places(30, 41, images=3)
    assert torch.equal(inference.chop(net, lr, tile=8), net(lr))


@pytest.mark.parametrize("size, window, receptive_field", [
    ((1500, 900), 1, 3), ((1500, 900), 1, 36), ((1500, 900), 8, None), ((1003, 17), 8, None), ((300, 2000), 1, 100)])
def test_what_is_computed_at_once_is_bounded(size, window, receptive_field):
    net = Nearest(window, receptive_field)
    inference.chop(net, torch.zeros(1, 3, *size))
    side = max(inference.WINDOW, 4 * (receptive_field or 0))
    assert max(max(x.shape[2:]) for x in net.inputs) <= side + window - 1
    assert max(x.shape[0] * x.shape[2] * x.shape[3] for x in net.inputs) <= (side + window - 1)**2


@pytest.mark.parametrize("size", [(100, 61), (64, 64), (7, 130)])
def test_tiles_start_on_the_grid_of_windows(size):
    net = Nearest(window=8)
    inference.chop(net, places(*size), tile=17, halo=5)
    starts = torch.cat([x[:, :2, 0, 0] for x in net.inputs])
    assert len(starts) > 3
    assert not starts.remainder(8).any()


@pytest.mark.parametrize("window", [1, 8])
def test_a_tile_has_its_halo_unless_the_image_ends(window):
    net = Nearest(window)
    inference.chop(net, places(70, 90), tile=20, halo=6)
    columns = sorted({(int(x[1, 0, 0]), int(x[1, 0, -1])) for batch in net.inputs for x in batch})
    assert columns[0][0] == 0
    assert columns[-1][1] == 89
    assert all(last - first + 1 >= 12 for (_, last), (first, _) in pairwise(columns))


def test_tiles_need_no_gradient(edsr):
    assert not inference.chop(edsr, torch.rand(1, 3, 9, 9), tile=4).requires_grad


# ---- orientations

def test_self_ensemble_is_the_mean_over_8_orientations(edsr):
    lr = 255 * torch.rand(1, 3, 9, 14)
    with torch.no_grad():
        results = []
        for mirrored in (False, True):
            for turns in range(4):
                sr = edsr((lr.flip(3) if mirrored else lr).rot90(turns, (2, 3)).contiguous()).rot90(-turns, (2, 3))
                results.append(sr.flip(3) if mirrored else sr)
        mean = sum(results) / 8
        assert (results[0] - mean).abs().max() > 0.1
        assert torch.allclose(inference.ensemble(edsr, lr), mean, rtol=0, atol=1e-3)


def test_self_ensemble_leaves_an_equivariant_function_alone():
    net, lr = Nearest(), places(9, 14)
    assert torch.equal(inference.ensemble(net, lr), net(lr))


@pytest.mark.parametrize("chop_tiles", [False, True])
@pytest.mark.parametrize("self_ensemble", [False, True])
def test_upscale_does_what_the_flags_say(monkeypatch, chop_tiles, self_ensemble):
    monkeypatch.setattr(inference, "WINDOW", 12)
    net, lr = Nearest(), places(20, 30)
    assert torch.equal(inference.upscale(net, lr, chop_tiles, self_ensemble), net(lr))
    inputs = net.inputs[:-1]
    assert (max(x.shape[2] for x in inputs) <= 12) == chop_tiles
    assert len(inputs) == 8**self_ensemble or chop_tiles
    assert any(x[0, 0, 0, 0] > x[0, 0, -1, 0] for x in inputs) == self_ensemble


# ---- images

@pytest.mark.parametrize("rgb_range", [255, 1])
def test_to_image_clamps_and_rounds(rgb_range):
    values = torch.tensor([-7, -0.4, 0.4, 0.6, 127.4, 127.6, 254.6, 255.4, 300])
    sr = (values * (rgb_range / 255)).view(1, 3, 1, 3)
    image = inference.to_image(sr, rgb_range)
    assert image.dtype == np.uint8
    assert image.shape == (1, 3, 3)
    assert image.transpose(2, 0, 1).ravel().tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255]
