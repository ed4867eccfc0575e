"""Checkpoint files: what loads, what is refused and with which words, and finding teachers."""
import pickle
from pathlib import Path
from types import SimpleNamespace

import model
import option
import pytest
import torch
from checkpoint import save_model
from model import CheckpointError, load_as_told, load_model, make_model, roles, teachers
from model.edsr import EDSR
from model.loading import read_checkpoint
from model.rcan import RCAN
from released import files_of
from system.errors import UserError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return EDSR(2, n_resblocks=2, n_feats=8, res_scale=0.3)


@pytest.fixture
def save(tmp_path):
    """save(content) -> path of a file that torch.save made of it."""
    def write(content, name="file.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return write


@pytest.fixture
def own_file(net, tmp_path):
    save_model(net, tmp_path / "own.pt")
    return tmp_path / "own.pt"


def message(path, **override):
    """The one line of the CheckpointError, which names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_model(path, **override)
    assert isinstance(caught.value, UserError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- what loads

@pytest.mark.parametrize("net", [
    EDSR(3, n_resblocks=2, n_feats=8, res_scale=0.3), RCAN(4, n_resgroups=2, n_resblocks=1, n_feats=8, reduction=4)],
    ids=["EDSR", "RCAN"])
def test_own_file_gives_the_network_back(tmp_path, net):
    save_model(net, tmp_path / "own.pt")
    loaded = load_model(tmp_path / "own.pt")
    assert type(loaded) is type(net)
    assert loaded.config == net.config
    assert same_weights(loaded, net)
    assert not loaded.training


@pytest.mark.parametrize("name", model.NETWORKS)
def test_every_network_comes_back_from_its_own_file(tmp_path, name):
    made = make_model(name, SimpleNamespace(scale=2, n_resgroups=2, n_resblocks=1, n_feats=16, reduction=4, n_modules=2,
                                            RDNconfig="2,2,4", depths=(2,), num_heads=(2,)))
    save_model(made, tmp_path / "own.pt")
    assert same_weights(load_model(tmp_path / "own.pt"), made)


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"params": state}, lambda state: {"params_ema": state},
    lambda state: {"state_dict": state, "epoch": 7}, lambda state: {"model_state_dict": state, "optimizer": {}},
    lambda state: {"params": {}, "params_ema": state},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}}],
    ids=["bare", "params", "params_ema", "state_dict", "model_state_dict", "both", "module", "module in state_dict"])
def test_weights_are_found_in_their_wrapping(net, save, wrap):
    loaded = load_model(save(wrap(net.state_dict())))
    assert same_weights(loaded, net)
    assert loaded.config == {**net.config, "res_scale": 1.0}


def test_averaged_weights_come_before_the_others(net, save):
    averaged = {name: value + 1 for name, value in net.state_dict().items()}
    loaded = load_model(save({"params": net.state_dict(), "params_ema": averaged}))
    assert torch.equal(loaded.head[0].weight, net.head[0].weight + 1)


def test_half_precision_becomes_single(net, save):
    loaded = load_model(save({name: value.half() for name, value in net.state_dict().items()}))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.allclose(loaded.head[0].weight, net.head[0].weight, atol=1e-3)


def test_means_may_be_missing(net, save):
    state = {name: value for name, value in net.state_dict().items() if not name.startswith(("sub_mean", "add_mean"))}
    assert same_weights(load_model(save(state)), net)


@pytest.mark.parametrize("n_feats, expected", [(64, 1.0), (256, 0.1)])
def test_res_scale_of_a_foreign_file_follows_its_width(save, n_feats, expected):
    state = EDSR(2, n_resblocks=1, n_feats=n_feats, res_scale=7).state_dict()
    path = save(state)
    assert load_model(path).body[0].res_scale == expected
    assert load_model(path, res_scale=0.5).body[0].res_scale == 0.5


def test_res_scale_of_an_own_file_is_kept_unless_told(own_file):
    assert load_model(own_file).body[0].res_scale == 0.3
    assert load_model(own_file, res_scale=0.5).body[0].res_scale == 0.5


def test_override_that_agrees_or_says_nothing_is_fine(own_file):
    assert load_model(own_file, scale=2, n_feats=8, res_scale=None, n_resblocks=None).scale == 2


# ---- what does not

def test_missing_file_is_named(tmp_path):
    assert "no such checkpoint file" in message(tmp_path / "none.pt")
    assert "it is a folder" in message(tmp_path)


def test_the_state_of_a_run_is_no_checkpoint(save):
    assert "model/model_best.pt" in message(save({"student": {}, "optimizer": {}, "iteration": 3}))


def test_a_name_of_two_lines_makes_one(save):
    message(save({"a\nb": torch.zeros(3)}))


def test_a_raw_pickle_gets_its_one_line_and_no_warning(tmp_path, recwarn):
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"a": Touch(tmp_path / "made")}))
    assert "safe" in message(tmp_path / "raw.pt")
    assert not recwarn


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken", b"\x80\x02garbage", b"\x80\x02.",
                                     bytes(range(256))])
def test_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    message(path)


@pytest.mark.parametrize("left", [0.1, 0.5, 0.99])
def test_cut_off_file_is_refused(own_file, left):
    content = own_file.read_bytes()
    own_file.write_bytes(content[:int(left * len(content))])
    assert "again" in message(own_file) or "no PyTorch file" in message(own_file)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))],
                         ids=["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path, net, write):
    made = tmp_path / "made"
    write({**net.state_dict(), "extra": Touch(made)}, tmp_path / "file.pt")
    assert "safe" in message(tmp_path / "file.pt")
    assert not made.exists()


@pytest.mark.parametrize("content", [{}, {"params": {}}, {"epoch": 3}, [1, 2], torch.zeros(3), 7],
                         ids=["empty", "empty params", "no tensor", "list", "tensor", "number"])
def test_file_without_weights_is_refused(save, content):
    assert "weights" in message(save(content))


def test_names_that_are_no_strings_are_refused(save):
    message(save({1: torch.zeros(3)}))


def test_weights_of_an_unknown_network_are_named(save):
    assert "conv9.weight" in message(save({"conv9.weight": torch.zeros(3)}))


def test_missing_key_is_named(net, save):
    state = net.state_dict()
    del state["body.1.body.2.bias"]
    assert "no body.1.body.2.bias" in message(save(state))


def test_superfluous_key_is_named(net, save):
    assert "body.7.more too many" in message(save({**net.state_dict(), "body.7.more": torch.zeros(1)}))


def test_wrong_shape_is_named(net, save):
    state = {**net.state_dict(), "body.0.body.0.weight": torch.zeros(8, 4, 3, 3)}
    assert "body.0.body.0.weight is [8, 4, 3, 3], not [8, 8, 3, 3]" in message(save(state))


def test_only_the_first_faults_are_listed(net, save):
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("body.1.")}
    assert "more" not in message(save({**state, "body.1.body.0.weight": torch.zeros(8, 8, 3, 3)}))
    assert "and 2 more" in message(save({**state, "body.1.body.0.weight": torch.zeros(1), "x": torch.zeros(1),
                                         "y": torch.zeros(1)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(net, save, value):
    state = net.state_dict()
    state["tail.1.bias"] = torch.tensor([0, value, 0])
    assert "tail.1.bias" in message(save(state))


def test_header_of_an_unknown_network_is_named(net, save):
    assert "Newer" in message(save({"network": "Newer", "config": {}, "params": net.state_dict()}))


def test_header_without_sizes_is_no_header(net, save):
    assert load_model(save({"network": "EDSR", "config": "settings.yml", "params": net.state_dict()})).config["n_feats"] == 8


@pytest.mark.parametrize("config", [{}, {"scale": 2, "colour": 3}, {"scale": 2, "n_feats": 16}],
                         ids=["nothing", "unknown size", "wrong size"])
def test_header_that_does_not_fit_is_refused(net, save, config):
    message(save({"network": "EDSR", "config": config, "params": net.state_dict()}))


@pytest.mark.parametrize("override", [dict(scale=4), dict(n_feats=16), dict(n_resblocks=3)])
@pytest.mark.parametrize("own", [True, False])
def test_claim_about_a_file_that_is_wrong_names_both(net, own_file, save, own, override):
    (key, value), = override.items()
    text = message(own_file if own else save(net.state_dict()), **override)
    assert f"{key} {net.config[key]}, not {value}" in text


def test_read_checkpoint_tells_own_files_from_others(net, own_file, save):
    assert read_checkpoint(own_file)[0] == {"network": "EDSR", "config": net.config}
    assert read_checkpoint(save({"network": "EDSR", "params": net.state_dict()}))[0] is None


# ---- flags as claims

def test_flags_that_agree_are_taken(own_file):
    args = option.parse(["--model", "EDSR", "--scale", "2", "--n_feats", "8", "--rgb_range", "1", "--res_scale", "0.5"])
    net = load_as_told(own_file, args)
    assert net.rgb_range == 1
    assert net.body[0].res_scale == 0.5


def test_defaults_of_flags_are_no_claims(own_file):
    args = option.parse([])
    assert args.scale == 4
    assert load_as_told(own_file, args).scale == 2


@pytest.mark.parametrize("flags, words", [
    (("--scale", "4"), "scale 2, not 4"), (("--n_feats", "16"), "n_feats 8, not 16"),
    (("--n_resblocks", "5"), "n_resblocks 2, not 5"), (("--model", "RCAN"), "EDSR, not --model RCAN")])
def test_flag_that_contradicts_the_file_names_both(own_file, flags, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        load_as_told(own_file, option.parse(flags))
    assert str(own_file) in str(caught.value)


# ---- teachers

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in the place of teacher_checkpoint/."""
    monkeypatch.setattr(teachers, "FOLDER", tmp_path / "teachers")
    (tmp_path / "teachers").mkdir()
    return tmp_path / "teachers"


@pytest.mark.parametrize("name, scale, files", [
    ("EDSR", 2, ["edsr_x2-0edfb8a3.pt", "EDSR_BIX2.pt", "EDSR_Lx2_f256b32_DIV2K_official-be38e77d.pth"]),
    ("RCAN", 4, ["RCAN_BIX4.pt", "RCAN_compact_x4.pt"]),
    ("SwinIR", 3, ["001_classicalSR_DIV2K_s48w8_SwinIR-M_x3.pth"])])
def test_teacher_is_the_most_preferred_file_there(folder, name, scale, files):
    (folder / files[0].replace(f"X{scale}", "X8").replace(f"x{scale}", "x8")).touch()  # of another scale
    for file in reversed(files):
        (folder / file).touch()
        assert teachers.find_teacher(name, scale) == folder / file


@pytest.mark.parametrize("name", ["EDSR", "RCAN"])
def test_teacher_that_is_not_there_says_how_to_get_it(folder, name):
    with pytest.raises(CheckpointError) as caught:
        teachers.find_teacher(name, 3)
    words = [f"{name} teacher for scale 3", str(folder), f"download_teacher.sh {name}_x3", "--teacher FILE",
             *files_of(name, 3)]
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_teacher_that_was_not_released_for_a_scale_says_for_which(folder):
    with pytest.raises(CheckpointError, match=r"no IMDN teacher for scale 8: .* for x2, x3, x4;.*--teacher FILE"):
        teachers.find_teacher("IMDN", 8)


def test_unknown_teacher_is_refused():
    with pytest.raises(CheckpointError, match=r"--teacher Oracle: neither a file nor one of EDSR,.* RCAN"):
        teachers.find_teacher("Oracle", 2)


def test_a_teacher_is_a_file_whatever_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").touch()
    assert teachers.teacher_path("weights", 2) == "weights"
    with pytest.raises(CheckpointError, match="--ckp_path RCAN2: neither"):
        teachers.teacher_path("RCAN2", 2, "--ckp_path")


def test_teachers_are_files_or_found_by_name(folder, own_file):
    save_model(RCAN(2, n_resgroups=3, n_resblocks=1, n_feats=8, reduction=4), folder / "RCAN_BIX2.pt")
    found = roles.make_teachers(option.parse(["--scale", "2", "--teacher", f"[{own_file},RCAN]", "--rgb_range", "1"]))
    assert [type(net) for net in found] == [EDSR, RCAN]
    assert [net.rgb_range for net in found] == [1, 1]


def test_teacher_of_another_scale_is_refused(own_file):
    with pytest.raises(CheckpointError, match="scale 2, not 4"):
        roles.make_teachers(option.parse(["--teacher", str(own_file)]))


def test_unknown_network_is_refused():
    with pytest.raises(UserError, match="no network is called Oracle: there are EDSR, RCAN"):
        make_model("Oracle", option.parse([]))
