"""Channel slices: against CSD's own outputs, over the networks, and as students that share their teacher's weights."""
import pytest
import torch
from test_training import SIZES, assert_same_weights, flags  # noqa: F401 - a fixture

from checkpoint import save_model
from error import UserError
from model import NETWORKS, inherit, load_model, slim
from model.slicing import narrow_twin

NETS = {
    "EDSR": dict(n_resblocks=2, n_feats=16),
    "RCAN": dict(n_resgroups=2, n_resblocks=1, n_feats=16, reduction=4),
    "SAN": dict(n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4),
    "SwinIR": dict(depths=[2], n_feats=16, num_heads=[2], window_size=4),
    "CARN": dict(n_feats=16),
    "RDN": dict(G0=16, RDNconfig="2,2,8"),
    "IMDN": dict(n_feats=64, n_modules=2),
}


def without_sizes(flags):  # noqa: F811
    """The flags of a tiny run without the network that they describe."""
    for name, value in {"model": "RCAN", **SIZES}.items():
        flags = flags.replace(f"--{name} {value} ", "")
    return flags


def build(name):
    torch.manual_seed(0)
    return NETWORKS[name][0](2, **NETS[name]).eval()


@pytest.mark.parametrize("width", [1, 0.5, 0.25])
@pytest.mark.parametrize("name", ["csd_edsr_x2", "csd_edsr_x4"])
def test_a_slice_agrees_with_the_authors(golden, name, width):
    path, x, arrays, about = golden(name)
    net = load_model(path, res_scale=about["config"]["res_scale"])
    expected = arrays[f"width_{width:g}"]
    copied = load_model(path, res_scale=about["config"]["res_scale"], width_mult=width)
    with torch.no_grad():
        for student in (slim(net, width), copied):
            assert (student(x) - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_every_network_can_be_sliced(name):
    net = build(name)
    x = torch.rand(1, 3, 12, 8) * 255
    student = slim(net, 0.5)
    sr, maps = student(x, features=True)
    assert sr.shape == (1, 3, 24, 16) and all(f.shape[1] == student.n_feats for f in maps)
    copy = inherit(narrow_twin(net, 0.5), net)
    assert torch.allclose(copy(x), sr, atol=1e-3)
    assert sum(p.numel() for p in copy.parameters()) < sum(p.numel() for p in net.parameters())


def test_a_slice_shares_storage_and_its_gradient_reaches_only_its_channels():
    net = build("EDSR")
    student = slim(net, 0.25)
    student(torch.rand(1, 3, 8, 8)).sum().backward()
    grad = net.body[0].body[0].weight.grad
    assert grad[:4, :4].any() and not grad[4:].any() and not grad[:, 4:].any()
    assert {id(p) for p in student.parameters()} == {id(p) for p in net.parameters()}


def test_a_copied_slice_shares_nothing():
    net = build("EDSR")
    copy = inherit(narrow_twin(net, 0.5), net)
    before = net.head[0].weight.clone()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(net.head[0].weight, before)


@pytest.mark.parametrize("width, words", [(0.01, "leaves 0.16 channels"), (0.3, "whole number"), (1.5, "at most 1")])
def test_a_width_that_leaves_no_whole_channels_is_refused(width, words):
    with pytest.raises(UserError, match=words):
        slim(build("EDSR"), width)


def test_inheriting_from_another_kind_or_a_smaller_network_is_refused():
    with pytest.raises(UserError, match="EDSR is no channel slice of that RCAN"):
        inherit(build("EDSR"), build("RCAN"))
    with pytest.raises(UserError, match="no channel slice"):
        inherit(build("EDSR"), narrow_twin(build("EDSR"), 0.5))


def test_self_distillation_trains_both_widths_of_one_checkpoint(run_main, flags, tmp_path, tiny_data):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "teacher.pt")
    line = without_sizes(flags) + f"--teacher {tmp_path / 'teacher.pt'} --width_mult 0.5 "
    line += "--loss 1*DS+1*T_DS --lr 1e-3 --test_every 4 "
    assert run_main("train", line + "--epochs 2 --ema 0.9")[0] == 0
    before, after = load_model(tmp_path / "teacher.pt"), load_model(tmp_path / "run" / "model" / "model_raw.pt")
    change = (after.body[0].body[0].weight - before.body[0].body[0].weight).abs()
    assert change[:8, :8].max() > 0 and change[8:, 8:].max() > 0
    path = tmp_path / "run" / "model" / "model_latest.pt"
    scores = {}
    for width in ("1", "0.5"):
        status, out, _ = run_main("test", f"--ckp_path {path} --width_mult {width} --dir_data {tiny_data} --data_test tiny")
        assert status == 0
        scores[width] = out[-1].split()[2]
    trained = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].split(",")[4]
    assert float(scores["0.5"]) == pytest.approx(float(trained), abs=6e-4) and scores["1"] != scores["0.5"]


def test_a_slice_and_its_average_resume_exactly(run_main, flags, tmp_path):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "teacher.pt")
    line = without_sizes(flags) + f"--teacher {tmp_path / 'teacher.pt'} --width_mult 0.5 "
    line += "--loss 1*DS+1*T_DS --ema 0.9 --test_every 3 "
    assert run_main("train", line + f"--epochs 2 --ckp_dir {tmp_path / 'whole'}")[0] == 0
    assert run_main("train", line + "--epochs 1")[0] == 0
    assert run_main("train", line + "--epochs 2 --resume 1")[0] == 0
    for name in ("model_latest.pt", "model_raw.pt"):
        assert_same_weights(*(tmp_path / run / "model" / name for run in ("whole", "run")))


def test_a_student_may_start_from_its_teachers_channels(run_main, flags, tmp_path):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "teacher.pt")
    line = f"--model EDSR --n_resblocks 2 --n_feats 8 --teacher {tmp_path / 'teacher.pt'} "
    status, _, _ = run_main("train", without_sizes(flags) + line +
                            "--init_from_teacher --loss 1*DS --lr 1e-30 --epochs 1 --test_every 1")
    student = load_model(tmp_path / "run" / "model" / "model_latest.pt")
    assert status == 0
    assert torch.allclose(student.body[1].body[2].weight, build("EDSR").body[1].body[2].weight[:8, :8])


@pytest.mark.parametrize("extra, words", [
    ("--width_mult 0.5 --model RCAN", "not --model RCAN"),
    ("--width_mult 0.5 --n_feats 8", "n_feats 16, not 8"),
    ("--width_mult 0.5 --init_from_teacher", "the one or the other"),
    ("--width_mult 0.5 --pre_train {file}", "one --teacher, or --pre_train"),
    ("--width_mult 0.5 --teacher {file}+{file}", "one --teacher"),
    ("--init_from_teacher --model EDSR --teacher {file}+{file}", "one teacher"),
    ("--loss 1*DS+1*T_DS --model EDSR", "--width_mult"),
])
def test_flags_that_exclude_each_other_are_refused(run_main, flags, tmp_path, extra, words):  # noqa: F811
    file = tmp_path / "teacher.pt"
    save_model(build("EDSR"), file)
    status, _, err = run_main("train", without_sizes(flags) + f"--teacher {file} --loss 1*DS " + extra.format(file=file))
    assert status == 2 and words in err[-1]
    assert not (tmp_path / "run").exists()


def test_a_slice_of_a_pretrained_network_is_taken_once(run_main, flags, tmp_path):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "whole.pt")
    status, out, _ = run_main("train", without_sizes(flags) + f"--pre_train {tmp_path / 'whole.pt'} --width_mult 0.5 "
                              "--loss 1*DS --epochs 1 --test_every 1")
    assert status == 0 and "n_feats 8" in out[0]
