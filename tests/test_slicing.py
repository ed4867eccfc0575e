"""Channel slices: against CSD's own outputs, over the networks, and as students that share their teacher's weights."""
import pytest
import torch

from checkpoint import save_model
from model import NETWORKS, inherit, load_model, slim
from model.channels import sets_of, trace
from model.imdn import IMDN
from model.slicing import evenly_spaced, narrow_network
from system.errors import UserError
from test_training import SIZES, assert_same_weights, flags  # noqa: F401 - a fixture

NETS = {
    "EDSR": dict(n_resblocks=2, n_feats=16),
    "RCAN": dict(n_resgroups=2, n_resblocks=1, n_feats=16, reduction=4),
    "SAN": dict(n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4),
    "SwinIR": dict(depths=[2], n_feats=16, num_heads=[2], window_size=4),
    "CARN": dict(n_feats=16),
    "RDN": dict(G0=16, RDNconfig="2,2,8"),
    "Compact": dict(n_feats=16, n_convs=3),
    "SPAN": dict(n_feats=16),
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
@pytest.mark.parametrize("name", ["csd_edsr_x2", "csd_edsr_x4", "csd_rcan_x2", "csd_carn_x2"])
def test_a_slice_agrees_with_the_authors(golden, name, width):
    path, x, arrays, about = golden(name)
    override = {"res_scale": about["config"].get("res_scale")}
    net = load_model(path, **override)
    expected = arrays[f"width_{width:g}"]
    copied = load_model(path, **override, width_mult=width)
    with torch.no_grad():
        for student in (slim(net, width), copied):
            assert (student(x) - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_every_network_can_be_sliced(name):
    net = build(name)
    x = torch.rand(1, 3, 12, 8) * 255
    student = slim(net, 0.5)
    sr, feature_maps = student(x, features=True)
    assert sr.shape == (1, 3, 24, 16) and all(f.shape[1] == student.n_feats for f in feature_maps)
    copy = inherit(narrow_network(net, 0.5), net)
    assert torch.allclose(copy(x), sr, atol=1e-3)
    assert sum(p.numel() for p in copy.parameters()) < sum(p.numel() for p in net.parameters())


def test_imdn_cannot_be_sliced(run_main, tmp_path):
    save_model(IMDN(2, n_feats=32, n_modules=1), tmp_path / "imdn.pt")
    line = f"--cpu --scale 2 --width_mult 0.5 --ckp_path {tmp_path / 'imdn.pt'} --data_test Demo --dir_demo {tmp_path}"
    status, _, err = run_main("test", line)
    assert status == 2 and err == ["error: --width_mult: IMDN cannot be sliced, since its blocks divide their channels; "
                                   "train a narrower one with --n_feats"]


def test_a_slice_shares_storage_and_its_gradient_reaches_only_its_channels():
    net = build("EDSR")
    student = slim(net, 0.25)
    student(torch.rand(1, 3, 8, 8)).sum().backward()
    grad = net.body[0].body[0].weight.grad
    assert grad[:4, :4].any() and not grad[4:].any() and not grad[:, 4:].any()
    assert {id(p) for p in student.parameters()} == {id(p) for p in net.parameters()}


def test_a_copied_slice_shares_nothing():
    net = build("EDSR")
    copy = inherit(narrow_network(net, 0.5), net)
    before = net.head[0].weight.clone()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(net.head[0].weight, before)


@pytest.mark.parametrize("width, words", [(0.01, "leaves 0.16 channels"), (0.3, "whole number"), (1.5, "at most 1")])
def test_a_width_that_leaves_no_whole_channels_is_refused(width, words):
    with pytest.raises(UserError, match=words):
        slim(build("EDSR"), width)


def test_inheriting_from_another_or_a_smaller_network_is_refused():
    with pytest.raises(UserError, match="the student is EDSR, the teacher RCAN"):
        inherit(build("EDSR"), build("RCAN"))
    with pytest.raises(UserError, match=r"head.0.weight has shape \[16, 3, 3, 3\], the teacher's \[8, 3"):
        inherit(build("EDSR"), narrow_network(build("EDSR"), 0.5))


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


def test_a_slice_and_its_ema_resume_exactly(run_main, flags, tmp_path):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "teacher.pt")
    line = without_sizes(flags) + f"--teacher {tmp_path / 'teacher.pt'} --width_mult 0.5 "
    line += "--loss 1*DS+1*T_DS --ema 0.9 --test_every 3 "
    assert run_main("train", line + f"--epochs 2 --ckp_dir {tmp_path / 'whole'}")[0] == 0
    assert run_main("train", line + "--epochs 1")[0] == 0
    assert run_main("train", line + "--epochs 2 --resume 1")[0] == 0
    for name in ("model_latest.pt", "model_raw.pt"):
        assert_same_weights(*(tmp_path / run / "model" / name for run in ("whole", "run")))


def test_a_student_is_initialised_from_its_teachers_channels(run_main, flags, tmp_path):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "teacher.pt")
    line = f"--model EDSR --n_resblocks 2 --n_feats 8 --teacher {tmp_path / 'teacher.pt'} "
    status, _, _ = run_main("train", without_sizes(flags) + line +
                            "--init_from_teacher --loss 1*DS --lr 1e-30 --epochs 1 --test_every 1")
    student = load_model(tmp_path / "run" / "model" / "model_latest.pt")
    assert status == 0
    assert torch.allclose(student.body[1].body[2].weight, build("EDSR").body[1].body[2].weight[:8, :8])


# ---- fewer blocks

SHALLOW = {
    "EDSR": (dict(n_resblocks=8, n_feats=16), dict(n_resblocks=3, n_feats=8)),
    "RCAN": (dict(n_resgroups=4, n_resblocks=3, n_feats=16, reduction=4), dict(n_resgroups=2, n_resblocks=1, n_feats=8,
                                                                               reduction=4)),
    "SAN": (dict(n_resgroups=3, n_resblocks=2, n_feats=16, reduction=4), dict(n_resgroups=2, n_resblocks=1, n_feats=8,
                                                                              reduction=4)),
    "SwinIR": (dict(depths=[4, 4, 4], n_feats=16, num_heads=[2, 2, 2], window_size=4),
               dict(depths=[2, 2], n_feats=8, num_heads=[2, 2], window_size=4)),
    "RDN": (dict(G0=16, RDNconfig="4,2,8"), dict(G0=8, RDNconfig="3,2,4")),
    "IMDN": (dict(n_feats=64, n_modules=4), dict(n_feats=32, n_modules=2)),
    "Compact": (dict(n_feats=16, n_convs=5), dict(n_feats=8, n_convs=3)),
    "SPAN": (dict(n_feats=16), dict(n_feats=8)),
}


def make(name, sizes, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name][0](2, **sizes).eval()


@pytest.mark.parametrize("name", SHALLOW)
def test_every_network_inherits_fewer_blocks_and_channels(name):
    deep, shallow = SHALLOW[name]
    teacher, student = make(name, deep), make(name, shallow, seed=1)
    inherit(student, teacher)
    values = {value for parameter in teacher.parameters() for value in parameter.flatten().tolist()}
    assert all(set(parameter.flatten().tolist()) <= values for parameter in student.parameters())
    assert student(torch.rand(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("count, total, chosen", [(3, 8, [0, 4, 7]), (4, 4, [0, 1, 2, 3]), (2, 32, [0, 31]), (1, 5, [0]),
                                                  (16, 20, None)])
def test_blocks_are_evenly_spaced(count, total, chosen):
    found = evenly_spaced(count, total)
    assert found == (chosen or found) and len(set(found)) == count and found == sorted(found)
    assert found[0] == 0 and (count == 1 or found[-1] == total - 1)


def test_which_blocks_a_student_gets_in_groups_and_at_their_end():
    deep, shallow = (dict(n_resgroups=4, n_resblocks=5, n_feats=8, reduction=4),
                     dict(n_resgroups=3, n_resblocks=3, n_feats=4, reduction=4))
    teacher, student = make("RCAN", deep), make("RCAN", shallow, seed=1)
    inherit(student, teacher)
    for number, group in enumerate((0, 2, 3)):
        for block, source_block in ((0, 0), (1, 2), (2, 4), (3, 5)):  # the last is the convolution that ends the group
            one, other = student.body[number].body[block], teacher.body[group].body[source_block]
            weight, source = (one.weight, other.weight) if block == 3 else (one.body[2].weight, other.body[2].weight)
            assert torch.equal(weight, source[:4, :4])
    assert torch.equal(student.body[3].weight, teacher.body[4].weight[:4, :4])


def test_a_fusion_of_all_blocks_keeps_the_columns_of_those_that_are_kept():
    teacher, student = make("IMDN", dict(n_feats=64, n_modules=3)), make("IMDN", dict(n_feats=32, n_modules=2), seed=1)
    inherit(student, teacher)
    weight = teacher.c[0].weight
    assert torch.equal(student.c[0].weight, torch.cat([weight[:32, :32], weight[:32, 128:160]], 1))
    assert torch.equal(student.IMDB2.c1.weight, teacher.IMDB3.c1.weight[:32, :32])


def test_blocks_that_compute_the_identity_can_be_left_out():
    """A student of the two outer blocks equals a teacher whose inner blocks compute the identity."""
    teacher, student = make("EDSR", dict(n_resblocks=4, n_feats=8)), make("EDSR", dict(n_resblocks=2, n_feats=8), seed=1)
    with torch.no_grad():
        for block in teacher.body[1:3]:
            for parameter in block.parameters():
                parameter.zero_()
    x = torch.rand(1, 3, 6, 6) * 255
    assert not torch.allclose(student(x), teacher(x), atol=1e-3)
    assert torch.allclose(inherit(student, teacher)(x), teacher(x), atol=1e-3)


@pytest.mark.parametrize("name, sizes, change, words", [
    ("EDSR", NETS["EDSR"], dict(n_resblocks=3), r"more blocks body\.\*, 3, than the teacher, 2"),
    ("EDSR", NETS["EDSR"], dict(n_feats=24), "head.0.weight has shape"),
    ("SwinIR", NETS["SwinIR"], dict(window_size=2), "window_size is 2, the teacher's 4"),
    ("SwinIR", NETS["SwinIR"], dict(resi_connection="3conv"), "differ in"),
    ("SwinIR", NETS["SwinIR"], dict(upsampler="pixelshuffledirect"), "differ in"),
    ("RDN", NETS["RDN"], dict(RDNkSize=1), r"SFENet1.weight has shape \[16, 3, 1, 1\]"),
])
def test_students_that_do_not_fit_the_teacher_are_refused(name, sizes, change, words):
    with pytest.raises(UserError, match=words):
        inherit(make(name, {**sizes, **change}), make(name, sizes))


# ---- channels with the largest norm

PLANTED = {**{name: NETS[name] for name in ("EDSR", "RCAN", "SAN", "CARN", "RDN", "Compact")},
           "IMDN": dict(n_feats=32, n_modules=2)}


def plant(student, teacher):
    """Zero the filters of random channels of a teacher, so that as many remain as the student has."""
    axes, own = (trace(net) for net in (teacher, student))
    same = {name: name for name, _ in axes}
    removed, number = set(), {key: len(groups) for key, groups in sets_of(own, same).items()}
    for key, groups in sets_of(axes, same).items():
        removed |= {groups[index] for index in torch.randperm(len(groups))[number[key]:].tolist()}
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad:  # not of MeanShift
                parameter.copy_(0.2 * torch.randn_like(parameter))
        for (name, axis), groups in axes.items():
            if axis == 0:
                teacher.get_parameter(name)[[index for index, group in enumerate(groups) if group in removed]] = 0


@pytest.mark.parametrize("name", PLANTED)
def test_a_student_equals_a_teacher_whose_other_filters_are_zero(name):
    """The channels that compute something are at random places, and may be different ones in each layer off the path."""
    sizes = PLANTED[name]
    halves = {"IMDN": dict(n_feats=16, n_modules=2), "RDN": dict(G0=8, RDNconfig="2,2,4")}.get(name, {**sizes, "n_feats": 8})
    teacher, student, first = make(name, sizes), make(name, halves, seed=1), make(name, halves, seed=2)
    plant(student, teacher)
    inherit(student, teacher, "norm")
    for module_name, parameter in student.named_parameters():
        if name == "SAN" and "conv_du.0.weight" in module_name:  # its pooled covariances are means over all channels
            parameter.data /= 2
    x = torch.rand(1, 3, 12, 8) * student.native_range
    student.rgb_range = teacher.rgb_range = first.rgb_range = student.native_range
    with torch.no_grad():
        expected = teacher(x)
        assert torch.allclose(student(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert not torch.allclose(inherit(first, teacher)(x), expected, rtol=0.1, atol=0.1)


def test_channels_by_norm_are_those_planted_by_hand():
    student, teacher = make("EDSR", dict(n_resblocks=1, n_feats=3)), make("EDSR", dict(n_resblocks=2, n_feats=6), seed=1)
    path, inner = torch.tensor([1, 2, 5]), torch.tensor([0, 3, 4])
    rows = (4 * path[:, None] + torch.arange(4)).flatten()  # of the upsampler: 4 for each channel
    state, own = teacher.state_dict(), student.state_dict()
    for name, ends, starts in [("head.0", path, None), ("body.0.body.0", inner, path), ("body.0.body.2", path, inner),
                               ("tail.0.0", rows, path), ("tail.1", None, path)]:
        weight = own[f"{name}.weight"]
        whole = torch.zeros_like(state[f"{name}.weight"])
        ends, starts = (torch.arange(3) if places is None else places for places in (ends, starts))
        whole[ends[:, None], starts] = weight
        state[f"{name}.weight"].copy_(whole)
    found = inherit(make("EDSR", dict(n_resblocks=1, n_feats=3), seed=2), teacher, "norm").state_dict()
    for name in ("head.0.weight", "body.0.body.0.weight", "body.0.body.2.weight", "tail.0.0.weight", "tail.1.weight"):
        assert torch.equal(found[name], own[name]), name


@pytest.mark.parametrize("name", [name for name in SHALLOW if name not in ("SwinIR", "Compact", "SPAN")])
def test_every_network_inherits_fewer_blocks_and_channels_by_norm(name):
    deep, shallow = SHALLOW[name]
    teacher, student = make(name, deep), make(name, shallow, seed=1)
    inherit(student, teacher, "norm")
    values = {value for parameter in teacher.parameters() for value in parameter.flatten().tolist()}
    assert all(set(parameter.flatten().tolist()) <= values for parameter in student.parameters())
    assert student(torch.rand(1, 3, 8, 8)).isfinite().all() and not student.training
    if name == "EDSR":  # the last block is the teacher's last
        assert set(student.body[2].body[0].bias.tolist()) <= set(teacher.body[7].body[0].bias.tolist())


@pytest.mark.parametrize("name, sizes, change, words", [
    ("SwinIR", NETS["SwinIR"], {}, "SwinIR cannot be followed through permute; give --init_from_teacher first"),
    ("Compact", dict(n_feats=8, n_convs=4), dict(n_convs=3), "do not share channels as in the student: layers between them"),
    ("CARN_M", dict(n_feats=16), dict(n_feats=8), "cannot be followed through convolutions in groups"),
    ("SPAN", dict(n_feats=8), dict(n_feats=4), "cannot be followed through a convolution whose weights are computed"),
    ("EDSR", NETS["EDSR"], dict(n_feats=24), "the student has 24 channels at .*, the teacher 16 in the same place"),
    ("RCAN", NETS["RCAN"], dict(reduction=2), "the student has 8 channels at .*conv_du.*, the teacher 4"),
])
def test_channels_that_cannot_be_chosen_by_norm(name, sizes, change, words):
    with pytest.raises(UserError, match=words):
        inherit(make(name, {**sizes, **change}), make(name, sizes), "norm")


def test_init_from_teacher_by_norm_on_the_command_line(run_main, flags, tmp_path):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "teacher.pt")
    line = without_sizes(flags) + (f"--model EDSR --n_resblocks 2 --n_feats 8 --teacher {tmp_path / 'teacher.pt'} "
                                   "--loss 1*DS --lr 1e-30 --epochs 1 --test_every 1 --init_from_teacher norm")
    assert run_main("train", line)[0] == 0
    expected = inherit(make("EDSR", dict(n_resblocks=2, n_feats=8)), build("EDSR"), "norm")
    save_model(expected, tmp_path / "expected.pt")
    assert_same_weights(tmp_path / "run" / "model" / "model_latest.pt", tmp_path / "expected.pt", 1e-6)
    assert "--init_from_teacher norm" in (tmp_path / "run" / "config.txt").read_text()


# ---- on the command line

def test_the_inherit_template_trains_from_the_teachers_weights(run_main, flags, tmp_path):  # noqa: F811
    save_model(make("RCAN", dict(n_resgroups=3, n_resblocks=2, n_feats=16, reduction=8)), tmp_path / "teacher.pt")
    line = flags + f"--teacher {tmp_path / 'teacher.pt'} --template inherit --lr 1e-30 --epochs 1 --test_every 1"
    assert run_main("train", line)[0] == 0
    student, teacher = load_model(tmp_path / "run" / "model" / "model_latest.pt"), load_model(tmp_path / "teacher.pt")
    assert torch.allclose(student.body[1].body[0].body[0].weight, teacher.body[2].body[0].body[0].weight[:8, :8])
    assert "--loss 1*DS" in (tmp_path / "run" / "config.txt").read_text()
    line = line.replace("--n_resgroups 2", "").replace("--reduction 4", "").replace("--model RCAN", "--model EDSR --reset")
    status, _, err = run_main("train", line)
    assert status == 2 and len(err) == 1 and "the student is EDSR, the teacher RCAN" in err[0]


@pytest.mark.parametrize("extra, words", [
    ("--width_mult 0.5 --model RCAN", "not --model RCAN"),
    ("--width_mult 0.5 --n_feats 8", "n_feats 16, not 8"),
    ("--width_mult 0.5 --init_from_teacher", "one or the other"),
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


def test_a_pretrained_network_is_sliced_once(run_main, flags, tmp_path):  # noqa: F811
    save_model(build("EDSR"), tmp_path / "whole.pt")
    status, out, _ = run_main("train", without_sizes(flags) + f"--pre_train {tmp_path / 'whole.pt'} --width_mult 0.5 "
                              "--loss 1*DS --epochs 1 --test_every 1")
    assert status == 0 and "n_feats 8" in out[0]
