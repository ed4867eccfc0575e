"""Checkpoint files: what loads, what is refused and with which words, and finding teachers."""
import io
import os
import pickle
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model
import option
from checkpoint import save_model
from conftest import ROOT
from loss import vgg, vqgan
from model import CheckpointError, load_model, load_with_flags, make_model, roles, teachers
from model.carn import CARN
from model.edsr import EDSR
from model.loading import read_checkpoint
from model.rcan import RCAN
from model.san import SAN
from model.swinir import SwinIR
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
    scale = 2 if 2 in model.NETWORKS[name][0].scales else 1
    made = make_model(name, SimpleNamespace(scale=scale, n_resgroups=2, n_resblocks=1, n_feats=16, reduction=4, n_modules=2,
                                            RDNconfig="2,2,4", depths=(2,), num_heads=(2,), num_block=1,
                                            enc_blk_nums=(1,), dec_blk_nums=(2,), num_blocks=(1, 1, 1, 2)))
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


@pytest.mark.parametrize("make", [lambda: RCAN(2, n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4),
                                  lambda: SAN(2, n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4),
                                  lambda: EDSR(2, n_resblocks=1, n_feats=8), lambda: CARN(2, n_feats=8)])
def test_mean_shifts_are_constant_and_those_of_the_file(save, make):
    net = make()
    shifts = {name for name, _ in net.named_parameters() if "_mean." in name}
    assert len(shifts) == 4
    state = {name: value + 1 if name in shifts else value for name, value in net.state_dict().items()}
    loaded = load_model(save(state))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, state[name]) and parameter.requires_grad == (name not in shifts)


def test_means_may_be_missing(net, save):
    state = {name: value for name, value in net.state_dict().items() if not name.startswith(("sub_mean", "add_mean"))}
    assert same_weights(load_model(save(state)), net)


@pytest.mark.parametrize("n_resblocks, n_feats, expected", [  # of 16 and 32 blocks: EDSR's, FAKD's, DUKD's, CSD's
    (16, 64, 1.0), (32, 64, 0.1), (32, 128, 0.1), (16, 256, 1.0), (1, 64, 1.0), (1, 256, 0.1)])
def test_res_scale_of_a_foreign_file_follows_its_depth(save, n_resblocks, n_feats, expected):
    state = EDSR(2, n_resblocks, 8, res_scale=7).state_dict()
    state = {name: torch.zeros([n_feats if size == 8 else 4 * n_feats if size == 32 else size for size in value.shape])
             for name, value in state.items()}
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
    assert "no such file" in message(tmp_path / "none.pt")
    assert "it is a folder, not a file; give the file, such as model/model_best.pt" in message(tmp_path)


def test_the_state_of_a_run_is_no_checkpoint(save):
    assert "model/model_best.pt" in message(save({"student": {}, "optimizer": {}, "iteration": 3}))


def test_a_name_of_two_lines_makes_one(save):
    message(save({"a\nb": torch.zeros(3)}))


def test_a_raw_pickle_gets_its_one_line_and_no_warning(tmp_path, recwarn):
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"a": Touch(tmp_path / "made")}))
    assert "holds code" in message(tmp_path / "raw.pt")
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
    assert "holds code" in message(tmp_path / "file.pt")
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
    assert "unknown body.7.more" in message(save({**net.state_dict(), "body.7.more": torch.zeros(1)}))


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
    net = load_with_flags(own_file, args)
    assert net.rgb_range == 1
    assert net.body[0].res_scale == 0.5


def test_defaults_of_flags_are_no_claims(own_file):
    args = option.parse([])
    assert args.scale == 4
    assert load_with_flags(own_file, args).scale == 2


@pytest.mark.parametrize("flags, words", [
    (("--scale", "4"), "scale 2, not 4"), (("--n_feats", "16"), "n_feats 8, not 16"),
    (("--n_resblocks", "5"), "n_resblocks 2, not 5"), (("--model", "RCAN"), "EDSR, not --model RCAN")])
def test_flag_that_contradicts_the_file_names_both(own_file, flags, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        load_with_flags(own_file, option.parse(flags))
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
    with pytest.raises(UserError, match="there is no network Oracle; the networks are EDSR, RCAN"):
        make_model("Oracle", option.parse([]))


# ---- damaged files

@pytest.fixture
def small_file(tmp_path):
    save_model(EDSR(2, n_resblocks=1, n_feats=2), tmp_path / "small.pt")
    return tmp_path / "small.pt"


def test_a_flipped_bit_is_found_or_changes_no_weight(small_file):
    net, content = load_model(small_file), small_file.read_bytes()
    draw, refused = random.Random(0), 0
    for place in draw.sample(range(len(content)), 300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        small_file.write_bytes(damaged)
        try:
            assert same_weights(load_model(small_file), net), place
        except CheckpointError as error:
            assert str(small_file) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100  # alignment, dates and other unused bytes are the rest


def test_a_flipped_bit_in_every_weight_is_found(small_file):
    content = small_file.read_bytes()
    weight = load_model(small_file).head[0].weight.detach().numpy().tobytes()
    start = content.index(weight)
    for place in range(start, start + len(weight), 7):
        small_file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        assert "checksum" in message(small_file)


def test_files_from_before_checksums_load(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same_weights(load_model(tmp_path / "old.pth"), net)


def test_a_released_file_from_before_checksums_loads(shared):
    assert load_model(shared / "weights" / "IMDN_x2.pth").scale == 2


def test_a_compressed_file_is_not_inflated(small_file):
    with zipfile.ZipFile(small_file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(small_file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + bytes(10**6))
    assert "compressed" in message(small_file)


def bad_files(net):
    """{name: what the bytes of a file may be} of files that PyTorch fails on in ways of its own."""
    buffer = io.BytesIO()
    torch.save({"params": net.state_dict()}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    files = {"legacy, cut": legacy_bytes(net)[:700], "zip without an end": buffer.getvalue()[:-30],
             "pickle of nothing": b"\x80\x02}.", "zip of nothing": zip_bytes({})}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    for length in (0, 1, 10, 200, len(members[pickled]) - 1):
        files[f"pickle cut at {length}"] = zip_bytes({**members, pickled: members[pickled][:length]})
    files["no storages"] = zip_bytes({pickled: members[pickled]})
    files["storages cut"] = zip_bytes({name: data if len(data) < 9 or name == pickled else data[:8]
                                       for name, data in members.items()})
    return files


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def legacy_bytes(net):
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


BAD = bad_files(EDSR(2, n_resblocks=1, n_feats=2))


@pytest.mark.parametrize("flag, make", [("", None), ("--vgg_path", vgg.make_vgg), ("--vqgan_path", vqgan.make_vqgan)])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_gets_one_line_without_advice_to_run_code(tmp_path, recwarn, kind, flag, make):
    path = tmp_path / "file.pt"
    path.write_bytes(BAD[kind])
    with pytest.raises(CheckpointError) as caught:
        make(option.parse([flag, str(path)])) if make else load_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "weights_only" not in text and not recwarn


@pytest.fixture
def unprivileged():
    """Without root's right to read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_file_that_may_not_be_read_names_the_reason(unprivileged, place):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inner" / "file.pt"
        path.parent.mkdir()
        torch.save({}, path)
        closed = path if place == "file" else path.parent
        closed.chmod(0)
        try:
            assert "Permission denied" in message(path)
            with pytest.raises(CheckpointError, match="Permission denied"):
                vgg.make_vgg(option.parse(["--vgg_path", str(path)]))
        finally:
            closed.chmod(0o700)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    assert "pipe" in message(tmp_path / "pipe.pt")


@pytest.mark.parametrize("name", ["x" * 300 + ".pt", "file.pt/more"])
def test_a_path_that_cannot_be_names_the_reason(tmp_path, name):
    (tmp_path / "file.pt").touch()
    assert "cannot read" in message(tmp_path / name)


def test_safetensors_are_read_or_refused_in_one_line(net, tmp_path, monkeypatch):
    safetensors, path = pytest.importorskip("safetensors.torch"), tmp_path / "file.safetensors"
    safetensors.save_file(net.state_dict(), path)
    assert same_weights(load_model(path), net)
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in message(path)
    safetensors.save_file({**net.state_dict(), "tail.1.bias": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    assert "float8_e4m3fn" in message(path)
    safetensors.save_file(net.state_dict(), path, {"network": "RCAN", "config": "no JSON"})
    assert "damaged" in message(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in message(path)


# ---- tensors that are no weights, sizes that are none

@pytest.mark.parametrize("convert, words", [
    (lambda x: x.to(torch.int8), "int8"), (lambda x: x > 0, "bool"), (lambda x: x.to(torch.complex64), "complex64"),
    (lambda x: x.long(), "int64"), (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    (lambda x: x.to(torch.float8_e5m2), "float8_e5m2"), (lambda x: x.to_sparse(), "sparse"),
    (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantised"), (lambda x: x.to("meta"), "meta"),
    (lambda x: torch.nested.nested_tensor([x, x]), "tail.1.bias"), (lambda x: torch.zeros(1).expand(3), "stride of 0"),
    (lambda x: torch.zeros(1).expand(10**9), "stride of 0"),
    (lambda x: torch.zeros(10).as_strided((6, 5), (1, 1)), "stride of 0"), (lambda x: torch.zeros(0), "[0], not [3]"),
    (lambda x: torch.tensor(1.0), "[], not [3]")])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_cannot_be_a_weight_is_named(net, save, convert, words):
    text = message(save({**net.state_dict(), "tail.1.bias": convert(net.tail[1].bias.detach())}))
    assert words in text and ("tail.1.bias" in text or "holds code" in text or "damaged" in text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_become_float32(net, save, dtype):
    loaded = load_model(save({name: value.to(dtype) for name, value in net.state_dict().items()}))
    assert loaded.head[0].weight.dtype == torch.float32
    assert torch.equal(loaded.head[0].weight, net.head[0].weight.to(dtype).float())


def test_names_for_one_storage_do_not_make_a_file_large(save):
    tensor = torch.zeros(1000)
    assert "larger than the file" in message(save({f"body.{n}.weight": tensor for n in range(100)}))


SWINIR = dict(scale=2, depths=[1], n_feats=4, num_heads=[1], window_size=2, mlp_ratio=2, upsampler="pixelshuffledirect",
              resi_connection="1conv", in_chans=3, img_range=1)


@pytest.mark.parametrize("name, key, value", [
    *[("EDSR", key, value) for key in ("scale", "n_resblocks", "n_feats")
      for value in (0, -1, 2.0, "2", None, True, [2], 10**9, 2**63, 10**30)],
    ("EDSR", "scale", 3), ("EDSR", "scale", 5), ("EDSR", "res_scale", "1"), ("EDSR", "res_scale", float("nan")),
    ("EDSR", "res_scale", -1), ("EDSR", 7, 7), ("EDSR", "colour", 7), ("EDSR", "n_feats", torch.ones(1)),
    *[("SwinIR", key, value) for key in ("img_range", "mlp_ratio", "window_size") for value in (0, -1, "1", None, 1e400)],
    ("SwinIR", "window_size", 10**5), ("SwinIR", "depths", [10**9]), ("SwinIR", "depths", [1] * 1000),
    ("SwinIR", "depths", "11"), ("SwinIR", "depths", 1), ("SwinIR", "num_heads", [0]), ("SwinIR", "num_heads", [10**9]),
    ("SwinIR", "upsampler", 3), ("SwinIR", "upsampler", "none"), ("SwinIR", "in_chans", 10**9),
    ("SwinIR", "mlp_ratio", 10**9)])
def test_a_header_with_an_impossible_size_is_refused(save, name, key, value):
    made = EDSR(2, n_resblocks=1, n_feats=4) if name == "EDSR" else SwinIR(**SWINIR)
    message(save({"network": name, "config": {**made.config, key: value}, "params": made.state_dict()}))


def test_a_network_of_another_name_in_the_header_is_refused(net, save):
    message(save({"network": "RCAN", "config": net.config, "params": net.state_dict()}))
    message(save({"network": torch.ones(2), "config": net.config, "params": {"x": torch.ones(1)}}))


ABSURD = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from model import CheckpointError, load_model
from model.edsr import EDSR
from model.rcan import RCAN
from model.swinir import SwinIR
from model.rdn import RDN
from loss.vqgan import load_vqgan
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 10**6,) * 2)

def own(net, **sizes):
    name = type(net).__name__
    return {"network": name, "config": {**net.config, **sizes}, "params": net.state_dict()}

rcan = RCAN(2, n_resgroups=1, n_resblocks=1, n_feats=4, reduction=2)
swin = SwinIR(2, depths=(1,), n_feats=4, num_heads=(1,), window_size=2)
edsr = EDSR(2, n_resblocks=1, n_feats=4)
state = edsr.state_dict()
basicsr = {"body.0.residual_group.0.rcab.0.weight": torch.ones(1), "body.999999999.conv.weight": torch.ones(1)}
vq = {"encoder.conv_in.weight": torch.ones(32, 3, 3, 3), "encoder.conv_out.weight": torch.ones(4, 4, 3, 3),
      "quant_conv.weight": torch.ones(4, 4, 1, 1), "quantize.embedding.weight": torch.ones(4, 4),
      **{f"encoder.down.{n}.block.0.conv1.weight": torch.ones(32, 32, 3, 3) for n in range(5)}}
files = [own(rcan, n_resgroups=10**9), own(rcan, n_resblocks=10**9), own(rcan, n_feats=10**9), own(edsr, n_feats=2**30),
         own(swin, window_size=10**5), own(swin, window_size=300), own(swin, depths=[10**9]), own(swin, n_feats=10**9),
         own(RDN(2, G0=4, RDNconfig="1,1,4"), RDNconfig="999999999,999999999,999999999"),
         {**state, "body.999999999.body.0.weight": torch.ones(1)},
         {**state, f"body.{'9' * 5000}.body.0.weight": torch.ones(1)},
         {**state, "body.\\u00b2.body.0.weight": torch.ones(1)},
         {"body1.0.body.0.weight": torch.ones(1), "body1.999999999.body.0.weight": torch.ones(1)},
         {**basicsr, "body.0.residual_group.999999999.rcab.0.weight": torch.ones(1)},
         {**basicsr, **{f"body.{n}.conv.weight": torch.ones(1) for n in range(1000)},
          **{f"body.0.residual_group.{n}.rcab.0.weight": torch.ones(1) for n in range(1000)}},
         {**swin.state_dict(), "layers.999999.residual_group.blocks.0.norm1.weight": torch.ones(1)},
         {**state, "tail.1.bias": torch.zeros(1).expand(14 * 10**9 // 4)}]
lightning = [{**vq, "encoder.down.0.block.999999999.x": torch.ones(1)}, {**vq, "encoder.down.999999999.x": torch.ones(1)}]
for load, content in [(load_model, one) for one in files] + [(load_vqgan, one) for one in lightning]:
    torch.save(content, sys.argv[2])
    start = time.monotonic()
    try:
        load(sys.argv[2])
        print("loaded", list(content)[-1])
    except CheckpointError as error:
        print(f"{time.monotonic() - start:.2f} s", str(error)[len(sys.argv[2]):200])
"""


def test_absurd_sizes_take_neither_time_nor_memory(tmp_path):
    ended = subprocess.run([sys.executable, "-c", ABSURD, str(ROOT / "code"), str(tmp_path / "file.pt")], timeout=60,
                           capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = ended.stdout.splitlines()
    assert len(lines) == 19 and not [line for line in lines if line.startswith("loaded")]
    assert max(float(line.split()[0]) for line in lines) < 10, lines  # 0.1 s on an idle machine


@pytest.mark.parametrize("line, words", [
    ("--n_resgroups 65536 --n_resblocks 65536", "more than 10,000 parameter tensors"),
    ("--n_feats 65536", "GB of free memory"),
    ("--model RDN --RDNconfig 99999,99999,99999", "RDN"),
    ("--model SwinIR --depths 65536 --num_heads 6", "parameter tensors"),
    ("--model SwinIR --window_size 64 --depths 99 --num_heads 1 --n_feats 65536", "free memory")])
def test_a_network_too_large_to_build_is_refused_at_once(line, words):
    args = option.parse(line.split())
    with pytest.raises(UserError, match=words):
        make_model(args.model, args)


def test_lack_of_memory_for_a_file_is_not_called_damage_alone(own_file, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "load", load)
    assert "not enough memory" in message(own_file)
