"""Tiled inference, its memory budget, self-ensemble, and conversion to images."""
from argparse import Namespace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import evaluation
import inference
from model.edsr import EDSR
from model.rcan import RCAN
from model.swinir import SwinIR
from system import memory_budget
from system.errors import UserError
from system.memory import peak_memory


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Nearest(nn.Module):
    """Nearest-neighbour upscaling, which tiles and flips do not change; records its inputs."""
    scale, rgb_range = 2, 255

    def __init__(self, window=1, receptive_field=3):
        super().__init__()
        self.window, self.receptive_field = window, receptive_field
        self.parameter = nn.Parameter(torch.zeros(()))
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def coordinates(height, width, images=1):
    """Make images whose channels are the row, the column and the index of the image of each pixel."""
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
def test_tiles_of_a_network_with_a_receptive_field_equal_the_whole_image(edsr, size, tile):
    lr = 255 * torch.rand(1, 3, *size)
    with torch.no_grad():
        assert torch.allclose(inference.chop(edsr, lr, tile), edsr(lr), rtol=0, atol=0.02)


def test_tiles_with_too_small_an_overlap_do_not(edsr):
    lr = 255 * torch.rand(1, 3, 20, 33)
    with torch.no_grad():
        assert (inference.chop(edsr, lr, tile=7, tile_pad=2) - edsr(lr)).abs().max() > 0.02


@pytest.mark.parametrize("n_resblocks, scale", [(1, 2), (3, 3), (2, 4), (1, 8)])
def test_receptive_field_equals_the_support_of_the_gradient(n_resblocks, scale):
    net = EDSR(scale, n_resblocks, n_feats=4).double()
    lr = (255 * torch.rand(1, 3, 31, 31, dtype=torch.float64)).requires_grad_()
    net(lr)[..., 15 * scale:16 * scale, 15 * scale:16 * scale].sum().backward()
    rows = lr.grad.abs().sum((0, 1, 3)).nonzero()[:, 0]
    assert 15 - rows.min() == rows.max() - 15 == min(net.receptive_field, 15)


def test_tiles_of_a_network_with_global_operations_are_close():
    net = RCAN(2, n_resgroups=2, n_resblocks=2, n_feats=8, reduction=4).eval()
    lr = 20 * coordinates(60, 70).remainder(12)
    with torch.no_grad():
        whole, tiled = net(lr), inference.chop(net, lr, tile=24)
    assert 0 < (whole - tiled).abs().max() < 1


@pytest.mark.parametrize("tile, tile_pad", [(None, None), (5, 0), (5, 2), (16, 3), (1, 1), (100, 9)])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 23), (40, 16)])
@pytest.mark.parametrize("window", [1, 8])
def test_every_output_pixel_comes_from_its_own_input_pixel(monkeypatch, size, tile, tile_pad, window):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
    net, lr = Nearest(window), coordinates(*size)
    assert torch.equal(inference.chop(net, lr, tile, tile_pad), net(lr))


def test_images_of_a_batch_do_not_mix():
    net, lr = Nearest(), coordinates(30, 41, images=3)
    assert torch.equal(inference.chop(net, lr, tile=8), net(lr))


@pytest.mark.parametrize("size", [(19, 37), (24, 24)])
@pytest.mark.parametrize("window, receptive_field", [(1, 3), (8, 5), (1, 0)])
def test_tiles_of_several_images_are_batched_where_they_fit(size, window, receptive_field):
    net, lr = Nearest(window, receptive_field), coordinates(*size, images=5)
    assert torch.equal(inference.chop(net, lr, memory=memory_of(net, 2000)), net(lr))
    inputs = tiles_of(net)[:-1]
    assert max(map(len, inputs)) > 1 and max(len(x) * padded(x, window) for x in inputs) <= 2000


# ---- the memory of tiles

def memory_of(net, pixels):
    """Return the bytes that LR pixels take, and those of half a pixel against rounding."""
    return memory_budget.required_memory(net, torch.device("cpu"), pixels + 0.5)


def tiles_of(net):
    """Return the inputs of a Nearest without the two images with which its memory was measured."""
    assert [x.shape[2] for x in net.inputs[:2]] == [8, memory_budget.PROBE_SIZE]
    return net.inputs[2:]


def padded(x, window):
    return -(-x.shape[2] // window) * window * -(-x.shape[3] // window) * window


@pytest.mark.parametrize("size, window, receptive_field", [
    ((1500, 900), 1, 3), ((1500, 900), 1, 36), ((1500, 900), 8, None), ((1003, 17), 8, None), ((300, 2000), 1, 40)])
@pytest.mark.parametrize("pixels", [15000, 40000, 10**7])
def test_the_pixels_of_a_forward_pass_are_bounded(size, window, receptive_field, pixels):
    net = Nearest(window, receptive_field)
    inference.chop(net, torch.zeros(1, 3, *size), memory=memory_of(net, pixels))
    areas = [len(x) * padded(x, window) for x in tiles_of(net)]
    assert pixels / 4 < max(areas) <= pixels or len(areas) == 1
    assert (len(areas) == 1) == (-(-size[0] // window) * -(-size[1] // window) * window**2 <= pixels)


def test_more_memory_means_fewer_pixels_computed(edsr):
    computed, lr = [], torch.zeros(1, 3, 200, 150)
    for pixels in (700, 1500, 4000, 10000, 20000, 40000):
        net = Nearest(receptive_field=8)
        inference.chop(net, lr, memory=memory_of(net, pixels))
        computed.append(sum(x.shape[0] * x.shape[2] * x.shape[3] for x in tiles_of(net)))
    assert computed == sorted(computed, reverse=True)
    assert computed[0] > 1.5 * computed[2] and computed[-1] == 200 * 150


@pytest.mark.parametrize("pixels", [1000, 1500, 4000, 10000])
@pytest.mark.parametrize("size", [(61, 97), (20, 33), (120, 7)])
def test_the_result_of_a_network_with_a_receptive_field_does_not_depend_on_the_memory(edsr, size, pixels):
    lr = 255 * torch.rand(1, 3, *size)
    with torch.no_grad():
        assert torch.allclose(inference.chop(edsr, lr, memory=memory_of(edsr, pixels)), edsr(lr), rtol=0, atol=0.02)


@pytest.mark.parametrize("make", [lambda: EDSR(2, n_resblocks=2, n_feats=8),
                                  lambda: RCAN(4, n_resgroups=2, n_resblocks=2, n_feats=8, reduction=4),
                                  lambda: SwinIR(2, depths=(2, 2), n_feats=8, num_heads=(2, 2))])
@pytest.mark.parametrize("pixels", [15000, 30000])
def test_the_peak_memory_of_tiles_is_within_the_budget(make, pixels):
    net, lr = make().eval(), torch.rand(1, 3, 250, 180)
    memory = memory_of(net, pixels)
    sr, peak = peak_memory(lambda: inference.chop(net, lr, memory=memory), torch.device("cpu"))
    assert memory / 4 < peak - sr.nbytes < memory


def test_memory_is_measured_once_per_network_and_precision(edsr):
    net, lr = Nearest(), torch.rand(1, 3, 50, 50)
    for _ in range(2):
        inference.chop(net, lr)
    assert len(tiles_of(net)) == 2
    small = Nearest()
    inference.chop(small, lr[..., :9, :9])
    assert len(small.inputs) == 1
    single = memory_budget.bytes_per_pixel(edsr, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert memory_budget.bytes_per_pixel(edsr, torch.device("cpu")) < single  # feature maps are bf16, the image is not
    assert memory_budget.bytes_per_pixel(edsr, torch.device("cpu")) == single


def test_memory_per_pixel_excludes_the_weights():
    taken = []
    for n_resblocks in (1, 40):
        with torch.autocast("cpu", torch.bfloat16):
            taken.append(memory_budget.bytes_per_pixel(EDSR(2, n_resblocks, n_feats=32).eval(), torch.device("cpu")))
    assert taken[1] <= 1.3 * taken[0]


def test_memory_too_small_for_any_tile_is_reported(edsr):
    with pytest.raises(UserError, match=r"--chop_mem 1e-05: the smallest tiles .* take about 0\.\d+ GB"):
        inference.chop(edsr, torch.rand(1, 3, 50, 50), memory=1e4)


def test_the_default_memory_is_at_most_half_of_the_free_memory_or_fixed_for_networks_with_global_operations(monkeypatch):
    cpu = torch.device("cpu")
    for free, expected in ((6e9, 1e9), (1e9, 5e8)):
        monkeypatch.setattr(memory_budget, "free_memory", lambda device, free=free: free)
        assert memory_budget.default_memory(Nearest(), cpu) == expected
        assert memory_budget.default_memory(Nearest(), torch.device("cuda")) == free / 2
        assert memory_budget.default_memory(Nearest(receptive_field=None), cpu) == 1e9
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: 0)
    assert inference.chop(Nearest(), torch.rand(1, 3, 50, 50)).shape == (1, 3, 100, 100)


MEMINFO = "MemTotal: 8000 kB\nMemFree: 1000 kB\nMemAvailable:    4000 kB\n"


@pytest.mark.parametrize("files, free", [
    ({}, 4096000), ({"max": "max", "current": "1000"}, 4096000), ({"max": "3000000", "current": "1000000"}, 2300000),
    ({"max": "3000000", "current": "3500000"}, 0), ({"max": "9000000", "current": "1000000"}, 4096000)])
def test_free_memory_is_bounded_by_the_system_and_the_container(monkeypatch, tmp_path, files, free):
    for name, text in {**files, **({"stat": "anon 5\ninactive_file 300000\nactive_file 7\n"} if files else {})}.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(memory_budget, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_budget, "CGROUP", tmp_path)
    assert memory_budget.free_memory(torch.device("cpu")) == free


def test_free_memory_of_a_gpu_includes_the_reserve_of_the_allocator(monkeypatch):
    for name, value in (("mem_get_info", (7000, 9000)), ("memory_reserved", 500), ("memory_allocated", 200)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory_budget.free_memory(torch.device("cuda")) == 7300


def test_free_memory_is_half_of_the_installed_memory_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_budget, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_budget.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    assert memory_budget.free_memory(torch.device("cpu")) == 2048000


def test_malloc_retains_memory_only_while_tiles_are_computed(monkeypatch):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))

        def malloc_trim(self, pad):
            calls.append("trim")

    class Recording(Nearest):
        def forward(self, x):
            calls.append("forward")
            return super().forward(x)

    monkeypatch.setattr(memory_budget.ctypes, "CDLL", lambda name: Library())
    inference.chop(Recording(), torch.rand(1, 3, 9, 9))
    assert calls == [*memory_budget.RETAIN.items(), "forward", *memory_budget.RELEASE.items(), "trim"]
    monkeypatch.setattr(memory_budget.ctypes, "CDLL", lambda name: object())  # another C library
    assert inference.chop(Nearest(), torch.rand(1, 3, 9, 9)).shape == (1, 3, 18, 18)


def test_running_out_of_memory_makes_tiles_smaller(caplog):
    class Tight(Nearest):
        def forward(self, x):
            if x.shape[2] * x.shape[3] > 5000:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    caplog.set_level("INFO", "sr")
    net, lr = Tight(), coordinates(150, 130)
    assert torch.equal(inference.chop(net, lr), coordinates(150, 130).repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert len(caplog.messages) >= 2 and all("out of memory" in line for line in caplog.messages)
    with pytest.raises(torch.OutOfMemoryError):
        inference.chop(Tight(receptive_field=40), lr)


# ---- the grid of tiles

@pytest.mark.parametrize("size", [(100, 61), (64, 64), (7, 130)])
def test_tiles_start_at_multiples_of_the_window(size):
    net = Nearest(window=8)
    inference.chop(net, coordinates(*size), tile=17, tile_pad=5)
    starts = torch.cat([x[:, :2, 0, 0] for x in net.inputs])
    assert len(starts) > 3
    assert not starts.remainder(8).any()


@pytest.mark.parametrize("window", [1, 8])
def test_tiles_overlap_by_twice_the_padding(window):
    net = Nearest(window)
    inference.chop(net, coordinates(70, 90), tile=20, tile_pad=6)
    columns = sorted({(int(x[1, 0, 0]), int(x[1, 0, -1])) for batch in net.inputs for x in batch})
    assert columns[0][0] == 0
    assert columns[-1][1] == 89
    assert all(last - first + 1 >= 12 for (_, last), (first, _) in pairwise(columns))


def test_tiles_are_computed_without_gradients(edsr):
    assert not inference.chop(edsr, torch.rand(1, 3, 9, 9), tile=4).requires_grad


# ---- self-ensemble

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
    net, lr = Nearest(), coordinates(9, 14)
    assert torch.equal(inference.ensemble(net, lr), net(lr))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("self_ensemble", [False, True])
def test_upscale_combines_tiles_and_self_ensemble(tiled, self_ensemble):
    net, lr = Nearest(), coordinates(20, 30)
    memory = memory_of(net, 150)
    assert torch.equal(inference.upscale(net, lr, tiled, self_ensemble, memory), net(lr))
    inputs = tiles_of(net)[:-1]
    assert (max(x.shape[2] * x.shape[3] for x in inputs) <= 150) == tiled
    assert len(inputs) == 8**self_ensemble or tiled
    assert any(x[0, 0, 0, 0] > x[0, 0, -1, 0] for x in inputs) == self_ensemble


@pytest.mark.parametrize("chop", [False, True])
@pytest.mark.parametrize("self_ensemble", [False, True])
def test_every_forward_pass_of_a_test_is_in_channels_last_and_retains_memory(monkeypatch, chop, self_ensemble):
    passes, options = [], []

    class Recording(EDSR):
        def forward(self, x):
            weight = self.head[0].weight
            assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
            assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            assert options == list(memory_budget.RETAIN.values())
            passes.append(x)
            return super().forward(x)

    library = SimpleNamespace(mallopt=lambda option, value: options.append(value), malloc_trim=lambda pad: options.clear())
    monkeypatch.setattr(memory_budget.ctypes, "CDLL", lambda name: library)
    net, image = Recording(2, n_resblocks=1, n_feats=8).eval(), np.arange(9 * 14 * 3, dtype=np.uint8).reshape(9, 14, 3)
    args = Namespace(chop=chop, chop_mem=None, self_ensemble=self_ensemble, precision="single")
    with torch.no_grad():
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        whole = EDSR.forward(net, x)
    sr = evaluation.by_network(net, torch.device("cpu"), args)(image)
    assert len(passes) == 8**self_ensemble and not options
    assert self_ensemble or np.abs(sr.astype(int) - inference.to_image(whole)).max() <= 1


@pytest.mark.parametrize("chop_mem", [None, 2e-4])
def test_the_peak_memory_of_an_image_is_a_few_times_its_size(chop_mem):
    net, image = Nearest(), (np.arange(400 * 300 * 3) % 251).astype(np.uint8).reshape(400, 300, 3)
    args = Namespace(chop=True, chop_mem=chop_mem, self_ensemble=False, precision="single")
    upscale = evaluation.by_network(net, torch.device("cpu"), args)
    sr, peak = peak_memory(lambda: upscale(image), torch.device("cpu"))
    assert np.array_equal(sr, image.repeat(2, 0).repeat(2, 1)) and sr.flags.c_contiguous
    areas = [x.shape[2] * x.shape[3] for x in tiles_of(net)]
    most = chop_mem and chop_mem * 1e9 / memory_budget.required_memory(net, torch.device("cpu"), 1)
    assert max(areas) <= most if chop_mem else len(areas) == 1
    assert not chop_mem or peak < 9 * sr.nbytes  # float32 output: 4, input and the inputs that Nearest records: 2


# ---- images

@pytest.mark.parametrize("rgb_range", [255, 1])
def test_to_image_clamps_and_rounds(rgb_range):
    values = torch.tensor([-7, -0.4, 0.4, 0.6, 127.4, 127.6, 254.6, 255.4, 300])
    sr = (values * (rgb_range / 255)).view(1, 3, 1, 3)
    image = inference.to_image(sr, rgb_range)
    assert image.dtype == np.uint8
    assert image.shape == (1, 3, 3)
    assert image.transpose(2, 0, 1).ravel().tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255]


def test_retained_memory_is_released_by_the_outermost_context_only(monkeypatch):
    calls = []
    libc = SimpleNamespace(mallopt=lambda *option: calls.append(option), malloc_trim=lambda _: calls.append("trim"))
    monkeypatch.setattr(memory_budget.ctypes, "CDLL", lambda _: libc)
    with memory_budget.retain_freed_memory(torch.device("cpu")):
        with memory_budget.retain_freed_memory(torch.device("cpu")):
            pass
        assert calls == list(memory_budget.RETAIN.items())
    assert calls == [*memory_budget.RETAIN.items(), *memory_budget.RELEASE.items(), "trim"]
    with pytest.raises(KeyError), memory_budget.retain_freed_memory(torch.device("cpu")):
        raise KeyError
    assert calls[-1] == "trim" and not memory_budget._retaining
