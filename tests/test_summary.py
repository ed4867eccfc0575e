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
from model.imdn import IMDN
from model.rcan import RCAN
from model.san import SAN
from model.swinir import SwinIR
from option_types import OutputSize, parse_output_size, parse_seconds
from system import flops, memory_budget
from system.memory import LiveMemory


@pytest.mark.parametrize("template, multiply_adds", [  # G, of 1280 x 720 at x2: CARN's, RDN's and IMDN's papers
    ("CARN", 222.8), ("CARN_M", 91.2), ("RDN_B", 5096.2), ("IMDN", 158.8)])
def test_flops_are_twice_the_published_multiply_adds(template, multiply_adds):
    args = option.parse(["--template", template, "--scale", "2"])
    assert summary.count(make_model(args.model, args)).flops / 2e9 == pytest.approx(multiply_adds, abs=0.06)


SMALL = OutputSize(96, 64)
CPU = torch.device("cpu")


def test_attention_is_counted_as_what_it_multiplies():
    sizes = dict(depths=(1,), n_feats=8, num_heads=(2,), window_size=4, mlp_ratio=2, upsampler="pixelshuffledirect")
    pixels = 48 * 32
    linear = 8 * 8 * (3 + 1 + 2 + 2)
    convolutions = 9 * (3 * 8 + 8 * 8 + 8 * 8 + 8 * 12)
    attention = 2 * 16 * 8  # scores and sums over the 16 positions of a window
    assert summary.count(SwinIR(2, **sizes), SMALL).flops == 2 * pixels * (linear + convolutions + attention)


@pytest.mark.parametrize("net", [EDSR(2, 2, 8), RCAN(4, 1, 1, 16, 4), CARN_M(3, 8)], ids=lambda net: type(net).__name__)
def test_memory_is_that_of_the_real_tensors(net):
    real = LiveMemory()
    with torch.no_grad(), real:
        net(torch.zeros(1, 3, -(-64 // net.scale), -(-96 // net.scale)))
    assert summary.count(net, SMALL).feature_maps == real.peak > 4 * 3 * 64 * 96


def test_memory_holds_no_matrix_of_all_pairs():
    maps = summary.count(SAN(2, 1, 1, 16, 4), SMALL).feature_maps
    assert maps < 4 * (24 * 16) * (12 * 8) * 4 + 30 * 16 * 48 * 32


def test_counting_leaves_no_masks_without_numbers():
    net, lr = SwinIR(2, (2,), 8, (2,), 4).eval(), torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        before = net(lr)
        summary.count(net, SMALL)
        assert torch.equal(net(lr), before)


def test_several_files_make_a_table(run_main, tmp_path):
    save_model(EDSR(2, 1, 8), tmp_path / "a.pt")
    save_model(RCAN(4, 1, 1, 8, 4), tmp_path / "b.pt")
    status, out, _ = run_main("summary", f"--ckp_path student={tmp_path / 'a.pt'}+{tmp_path / 'b.pt'} --output_size 96x64")
    cells = [line.split() for line in out[1:3]]
    assert status == 0 and [row[:3] for row in cells] == [["student", "EDSR", "x2"], ["b.pt", "RCAN", "x4"]]
    assert cells[0][6] == "6" and "the image" in out[2] and "GFLOPs" in out[0]
    count = sum(p.numel() for p in EDSR(2, 1, 8).parameters() if p.requires_grad)
    assert cells[0][3] == f"{count:,}"


def test_a_width_gives_the_slice(run_main):
    _, out, _ = run_main("summary", "--model RCAN --n_resgroups 1 --n_resblocks 1 --n_feats 32 --width_mult 0.5 "
                               "--output_size 96x64")
    count = sum(p.numel() for p in RCAN(4, 1, 1, 16).parameters() if p.requires_grad)
    assert out[1].split()[3] == f"{count:,}"


def test_a_network_described_by_flags(run_main):
    status, out, _ = run_main("summary", "--model RDN --G0 8 --RDNconfig 2,2,4 --scale 3 --output_size 96x64")
    assert status == 0 and out[1].split()[:3] == ["RDN", "RDN", "x3"]


@pytest.mark.parametrize("line, words", [
    ("--ckp_path missing.pt", "missing.pt: no such"), ("--model UNet", "there is no network UNet"),
    ("--model SwinIR --depths 2,2", "2 depths and 4 num_heads"),
    *((f"--budget={time}", "is not a time in ms or s") for time in ("20", "0ms", "-1s", "2min", "1e3ms", "ms", "nans")),
    *((f"--output_size {size}", "is not a") for size in ("1280", "1280x", "0x720", "1280x720x3", "99999x1", "axb")),
    *((f"--budget 1s {flag}", flag.split()[0]) for flag in (
        "--ckp_path a.pt", "--template RCAN", "--n_feats 8", "--model EDSR", "--published FAKD/RCAN/x4",
        "--width_mult 0.5"))])
def test_a_mistake_gets_one_line_and_status_2(run_main, line, words):
    status, _, err = run_main("summary", line)
    assert status == 2 and len(err) == 1 and words in err[0]


def test_a_gray_network_is_counted():
    assert summary.count(make_model("SwinIR", SimpleNamespace(scale=2, depths=[1], num_heads=[1], n_feats=4, in_chans=1)))


@pytest.mark.parametrize("net", [IMDN(2, 16, 2), CARN_M(3, 8), SwinIR(2, (2,), 8, (2,), 4)],
                         ids=lambda net: type(net).__name__)
def test_activations_are_the_outputs_of_convolutions_and_linear_layers(net):
    outputs = []
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output.numel()))
    cost = summary.count(net, SMALL)
    counted, _ = sum(outputs), outputs.clear()
    with torch.no_grad():
        net(torch.zeros(1, 3, *summary.lr_size(net, SMALL)))
    assert cost.activations == counted == sum(outputs) > 0


def measurement(line, net, **kwargs):
    return summary.measure(net, CPU, option.parse(line.split(), training=False), **kwargs)


@pytest.mark.parametrize("line", ["", "--precision bf16", "--chop --chop_mem 0.001", "--self_ensemble"])
def test_time_and_memory_are_measured_as_a_test_runs(monkeypatch, line):
    passes = []

    class Recording(EDSR):
        def forward(self, x):
            assert not torch.is_grad_enabled() and not self.training
            assert self.head[0].weight.is_contiguous(memory_format=torch.channels_last)
            passes.append((tuple(x.shape), torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
            return super().forward(x)

    monkeypatch.setattr(summary, "PASSES", 2)
    found = measurement(f"--output_size 151x100 {line}", Recording(2, 1, 8))
    assert found.seconds > 0 and found.memory > 4 * 3 * 100 * 150
    assert {dtype for _, dtype in passes} == {torch.bfloat16 if "bf16" in line else None}
    sizes = [shape[2:] for shape, _ in passes if shape[2:] != (memory_budget.PROBE_SIZE,) * 2 and min(shape[2:]) > 8]
    if "chop" in line:
        assert max(height * width for height, width in sizes) < 50 * 76
    else:
        assert set(sizes) == {(50, 76), (76, 50)} if "ensemble" in line else {(50, 76)}
        assert len(sizes) == 3 * (8 if "ensemble" in line else 1)  # the warm-up and PASSES


def test_a_slow_network_runs_once(monkeypatch):
    monkeypatch.setattr(summary, "MAX_SECONDS", 0)
    net, passes = EDSR(2, 1, 8), []
    net.register_forward_pre_hook(lambda module, inputs: passes.append(inputs))
    assert measurement("--output_size 96x64", net).seconds > 0 and len(passes) == 1


def test_a_network_beyond_the_budget_is_not_run_on_the_whole_image(monkeypatch):
    monkeypatch.setattr(flops, "run_time", lambda run, device: 0.1 + run().numel() / (3 * 320 * 160))  # seconds
    monkeypatch.setattr(memory_budget, "PROBE_SIZE", 1000)
    net, sizes = EDSR(2, 1, 8), []
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[3]))
    assert measurement("--output_size 320x160", net, budget=0.54) is None  # it takes 1.1 s
    assert sizes == [10, 10, 20, 20]
    assert measurement("--output_size 320x160", net, budget=0.56) and set(sizes) == {10, 20, 160}
    sizes.clear()
    assert measurement("--output_size 320x160", net, budget=0.05) is None and sizes == [10, 10]


def test_a_network_that_needs_too_much_memory_is_not_run(run_main, monkeypatch):
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: 1e6)
    line = "--model EDSR --n_resblocks 1 --n_feats 8 --output_size 640x360 --time"
    monkeypatch.setattr(summary, "load", lambda args: [("EDSR", EDSR(2, 1, 8))])
    _, out, _ = run_main("summary", line)
    assert next(line for line in out if line.startswith("EDSR")).split()[-2:] == ["-", "-"]
    _, out, _ = run_main("summary", f"{line} --chop --chop_mem 0.01")
    assert "-" not in next(line for line in out if line.startswith("EDSR")).split()[-2:]


@pytest.fixture
def presets(monkeypatch):
    sizes = dict(model="EDSR", n_resblocks=1, res_scale=1.0)
    presets = {"FAKD": dict(lr=1e-3), "small": dict(sizes, n_feats=4), "large": dict(sizes, n_feats=16),
               "huge": dict(sizes, n_feats=64), "again": dict(sizes, n_feats=4),
               "multi": dict(model="CARN_M", n_feats=8, group=1, multi_scale="2+3")}
    monkeypatch.setattr(option, "TEMPLATES", presets)
    monkeypatch.setattr(summary, "TEMPLATES", presets)


def test_a_budget_lists_the_presets_within_it_the_largest_first(run_main, monkeypatch, presets):
    seconds = {4: 0.001, 8: 0.0015, 16: 0.019, 64: 0.021}
    monkeypatch.setattr(summary, "measure", lambda net, device, args, budget: summary.Measurement(
        seconds[net.config["n_feats"]], 5e6))
    status, out, _ = run_main("summary", "--budget 20ms --scale 2 --output_size 96x64")
    rows = [line for line in out if " x2 " in line and "Presets" not in line]
    assert status == 0 and [row.split("  ")[0] for row in rows] == ["large", "multi", "small, again"]
    assert rows[0].split()[-2:] == ["19.0", "5"] and any("at most 20ms" in line for line in out)
    _, out, _ = run_main("summary", "--budget 20ms --scale 4 --output_size 96x64")
    assert len([line for line in out if " x4 " in line and "Presets" not in line]) == 2
    status, out, _ = run_main("summary", "--budget 0.5ms --scale 4 --output_size 96x64")
    assert status == 0 and "no preset at x4 upscales to 96x64 in 0.5ms on this machine" in out


def test_presets_without_the_scale_are_left_out(monkeypatch):
    built = []
    monkeypatch.setattr(summary, "load", lambda args: built.append(args.template) or [("", None)])
    monkeypatch.setattr(summary, "measure", lambda *args: None)
    for scale in (8, 2):
        summary.within_budget(option.parse(["--budget", "1s", "--scale", f"{scale}"], training=False), CPU)
    at_8 = built[:built.index("EDSR", 1)]
    assert set(built) - set(at_8) == {"CARN_multi", "CARN_M"} and "FAKD" not in built


@pytest.mark.parametrize("string, seconds", [
    ("20ms", 0.02), ("0.5s", 0.5), ("1.5 ms", 0.0015), ("90s", 90), ("999999.999s", 1e6)])
def test_a_time_is_read_and_written(string, seconds):
    parsed = parse_seconds(string)
    assert parsed == pytest.approx(seconds) and parse_seconds(str(parsed)) == pytest.approx(seconds)
    assert str(parse_output_size("96 x 64")) == "96x64"
