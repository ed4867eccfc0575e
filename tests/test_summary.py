"""What networks are said to cost, against published counts, real tensors and formulas."""
from types import SimpleNamespace

import pytest
import torch

import option
import summary
from checkpoint import save_model
from model import make_model
from model.carn import CARN_M
from model.edsr import EDSR
from model.rcan import RCAN
from model.san import SAN
from model.swinir import SwinIR
from system.memory import LiveMemory


@pytest.mark.parametrize("template, multiply_adds", [  # G, of 1280 x 720 at x2: CARN's, RDN's and IMDN's papers
    ("CARN", 222.8), ("CARN_M", 91.2), ("RDN_B", 5096.2), ("IMDN", 158.8)])
def test_flops_are_twice_the_published_multiply_adds(template, multiply_adds):
    args = option.parse(["--template", template, "--scale", "2"])
    assert summary.count(make_model(args.model, args))[0] / 2e9 == pytest.approx(multiply_adds, abs=0.06)


@pytest.fixture
def small_output(monkeypatch):
    monkeypatch.setattr(summary, "WIDTH", 96)
    monkeypatch.setattr(summary, "HEIGHT", 64)


def test_attention_is_counted_as_what_it_multiplies(small_output):
    sizes = dict(depths=(1,), n_feats=8, num_heads=(2,), window_size=4, mlp_ratio=2, upsampler="pixelshuffledirect")
    pixels = 48 * 32
    linear = 8 * 8 * (3 + 1 + 2 + 2)
    convolutions = 9 * (3 * 8 + 8 * 8 + 8 * 8 + 8 * 12)
    attention = 2 * 16 * 8  # scores and sums over the 16 positions of a window
    assert summary.count(SwinIR(2, **sizes))[0] == 2 * pixels * (linear + convolutions + attention)


@pytest.mark.parametrize("net", [EDSR(2, 2, 8), RCAN(4, 1, 1, 16, 4), CARN_M(3, 8)], ids=lambda net: type(net).__name__)
def test_memory_is_that_of_the_real_tensors(small_output, net):
    real = LiveMemory()
    with torch.no_grad(), real:
        net(torch.zeros(1, 3, -(-64 // net.scale), -(-96 // net.scale)))
    assert summary.count(net)[1] == real.peak > 4 * 3 * 64 * 96


def test_memory_holds_no_matrix_of_all_pairs(small_output):
    maps = summary.count(SAN(2, 1, 1, 16, 4))[1]
    assert maps < 4 * (24 * 16) * (12 * 8) * 4 + 30 * 16 * 48 * 32


def test_counting_leaves_no_masks_without_numbers(small_output):
    net, lr = SwinIR(2, (2,), 8, (2,), 4).eval(), torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        before = net(lr)
        summary.count(net)
        assert torch.equal(net(lr), before)


def test_several_files_make_a_table(run_main, small_output, tmp_path):
    save_model(EDSR(2, 1, 8), tmp_path / "a.pt")
    save_model(RCAN(4, 1, 1, 8, 4), tmp_path / "b.pt")
    status, out, _ = run_main("summary", f"--ckp_path student={tmp_path / 'a.pt'}+{tmp_path / 'b.pt'}")
    cells = [line.split() for line in out[1:3]]
    assert status == 0 and [row[:3] for row in cells] == [["student", "EDSR", "x2"], ["b.pt", "RCAN", "x4"]]
    assert cells[0][5] == "6" and "the image" in out[2] and "GFLOPs" in out[0]
    count = sum(p.numel() for p in EDSR(2, 1, 8).parameters() if p.requires_grad)
    assert cells[0][3] == f"{count:,}"


def test_a_width_gives_the_slice(run_main, small_output):
    _, out, _ = run_main("summary", "--model RCAN --n_resgroups 1 --n_resblocks 1 --n_feats 32 --width_mult 0.5")
    count = sum(p.numel() for p in RCAN(4, 1, 1, 16).parameters() if p.requires_grad)
    assert out[1].split()[3] == f"{count:,}"


def test_a_network_described_by_flags(run_main, small_output):
    status, out, _ = run_main("summary", "--model RDN --G0 8 --RDNconfig 2,2,4 --scale 3")
    assert status == 0 and out[1].split()[:3] == ["RDN", "RDN", "x3"]


@pytest.mark.parametrize("line, words", [
    ("--ckp_path missing.pt", "missing.pt: no such"), ("--model UNet", "there is no network UNet"),
    ("--model SwinIR --depths 2,2", "2 depths and 4 num_heads")])
def test_a_mistake_gets_one_line_and_status_2(run_main, line, words):
    status, _, err = run_main("summary", line)
    assert status == 2 and len(err) == 1 and words in err[0]


def test_a_gray_network_is_counted():
    assert summary.count(make_model("SwinIR", SimpleNamespace(scale=2, depths=[1], num_heads=[1], n_feats=4, in_chans=1)))
