"""Released checkpoints: found by name, fetched from a server in this process, checked before they appear."""
import functools
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import download_teacher
import model.teachers
import option
from checkpoint import save_model
from model import CheckpointError
from model.carn import CARN_M
from model.edsr import EDSR
from model.rcan import RCAN
from model.roles import make_teachers
from model.swinir import SwinIR
from model.teachers import find_teacher
from released import EDSR_SITE, LOSS_NETWORKS, RELEASED, TEACHERS, Release
from system import errors

SWINIR_X2 = RELEASED["SwinIR_x2"].file


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The folder that a server on 127.0.0.1 shows, which TEACHER_URL names."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("TEACHER_URL", f"http://127.0.0.1:{server.server_port}/")
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def download(tmp_path, monkeypatch, capfd, caplog):
    """download('NAME ...') -> (exit status, lines of the log, of stderr); it puts files into tmp_path/teachers."""
    monkeypatch.setattr(model.teachers, "FOLDER", tmp_path / "teachers")
    caplog.set_level("INFO")

    def run(line):
        monkeypatch.setattr("sys.argv", ["download_teacher.py", *line.split(), "--dir", str(tmp_path / "teachers")])
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            errors.run(download_teacher.main)
        return ended.value.code, list(caplog.messages), capfd.readouterr().err.splitlines()
    return run


def swinir(scale=2):
    return SwinIR(scale, (1,), 8, (2,), 4)


def files(folder):
    return sorted(path.name for path in folder.glob("*"))


def test_a_fetched_teacher_is_checked_and_then_found_by_name(site, download, tmp_path):
    torch.save({"params": swinir().state_dict()}, site / SWINIR_X2)
    status, out, _ = download("SwinIR_x2")
    assert status == 0 and "SwinIR x2" in out[-1] and "parameters" in out[-1]
    assert files(tmp_path / "teachers") == [SWINIR_X2] and find_teacher("SwinIR", 2).name == SWINIR_X2
    (site / SWINIR_X2).unlink()
    assert download("SwinIR_x2")[0] == 0  # it is there


def test_an_interrupted_download_is_continued(site, download, tmp_path):
    torch.save({"params": swinir().state_dict()}, site / SWINIR_X2)
    content = (site / SWINIR_X2).read_bytes()
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / f"{SWINIR_X2}.part").write_bytes(content[:1000])
    assert download("SwinIR_x2")[0] == 0 and files(tmp_path / "teachers") == [SWINIR_X2]
    assert (tmp_path / "teachers" / SWINIR_X2).read_bytes() == content


def test_the_hex_digits_in_a_name_are_checked(site, download, tmp_path, monkeypatch):
    save_model(EDSR(2, 1, 8), site / "net.pt")
    digits = hashlib.sha256((site / "net.pt").read_bytes()).hexdigest()[:8]
    for expected, good in ((digits, True), ("0edfb8a3", False)):
        release = Release("EDSR", (2,), f"edsr_x2-{expected}.pt", EDSR_SITE)
        monkeypatch.setitem(RELEASED, "EDSR_x2", release)
        (site / release.file).write_bytes((site / "net.pt").read_bytes())
        status, _, err = download("EDSR_x2")
        assert (status == 0) == good
        assert good or ("sha256" in err[0] and len(err) == 1)
    assert files(tmp_path / "teachers") == [f"edsr_x2-{digits}.pt"]


@pytest.mark.parametrize("content, words", [
    (lambda path: torch.save(swinir(3).state_dict(), path), "scale 3, not 2"),
    (lambda path: path.write_bytes(b"<html>moved</html>"), "is not SwinIR_x2")])
def test_what_does_not_load_leaves_nothing(site, download, tmp_path, content, words):
    content(site / SWINIR_X2)
    status, _, err = download("SwinIR_x2")
    assert status == 2 and len(err) == 1 and words in err[0]
    assert files(tmp_path / "teachers") == []


def test_a_file_that_is_not_there_names_the_variable(site, download):
    status, _, err = download("SwinIR_x2")
    assert status == 2 and "404" in err[0] and "TEACHER_URL" in err[0]


def test_what_is_behind_a_page_is_described_and_the_rest_done(download, tmp_path):
    (tmp_path / "teachers").mkdir()
    torch.save(CARN_M(2, 8, multi_scale=True).state_dict(), tmp_path / "teachers" / "carn_m.pth")
    status, out, err = download("RCAN_x2 CARN_M SAN_x3")
    assert status == 2 and "CARN_M x2, x3, x4" in out[0]
    assert [word in line for line, word in zip(err, ("RCAN_BIX2.pt", "SAN_BIX3.pt"))] == [True, True]
    assert "github.com/yulunzhang/RCAN" in err[0] and str(tmp_path / "teachers") in err[0]
    torch.save(RCAN(2, 1, 1, 8, 4).state_dict(), tmp_path / "teachers" / "RCAN_BIX2.pt")
    assert download("RCAN_x2")[0] == 0


def test_networks_of_the_loss(download, tmp_path):
    (tmp_path / "teachers").mkdir()
    path = tmp_path / "teachers" / "vgg19-dcbb9e9d.pth"
    for key, expected in (("features.0.weight", 0), ("classifier.0.weight", 2)):
        torch.save({key: torch.zeros(1)}, path)
        assert download("vgg19")[0] == expected
    status, _, err = download("vqgan_f16_1024")
    assert status == 2 and "heibox" in err[0] and "vqgan_f16_1024.ckpt" in err[0]


def test_names_are_listed_and_a_wrong_one_is_a_mistake(download):
    status, out, _ = download("")
    assert not status and all(name in out[0] for name in RELEASED)
    status, _, err = download("EDSR_x5")
    assert status == 2 and len(err) == 1 and "SwinIR_x2" in err[0]
    assert "RCAN; choose RCAN_x2 or RCAN_x3" in download("RCAN")[2][0]


# ---- finding teachers

@pytest.mark.parametrize("release", TEACHERS, ids=lambda release: release.title)
def test_every_released_file_is_found_by_its_name_and_scale(tmp_path, monkeypatch, release):
    monkeypatch.setattr(model.teachers, "FOLDER", tmp_path)
    (tmp_path / release.file).touch()
    assert [find_teacher(release.name, scale).name for scale in release.scales] == [release.file] * len(release.scales)


@pytest.mark.parametrize("name, scale, file", [
    ("EDSR", 2, "EDSR_BIX2.pt"), ("EDSR", 4, "EDSR_Lx4_f256b32_DIV2K_official-76ee1c8f.pth"), ("SAN", 3, "SAN_BI3X.pt"),
    ("RCAN", 2, "RCAN_compact_x2.pt")])
def test_other_names_of_files_are_found(tmp_path, monkeypatch, name, scale, file):
    monkeypatch.setattr(model.teachers, "FOLDER", tmp_path)
    (tmp_path / file).touch()
    assert find_teacher(name, scale).name == file


def test_released_files_come_before_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(model.teachers, "FOLDER", tmp_path)
    for file in ("RCAN_compact_x2.pt", "RCAN_BIX2.pt"):
        (tmp_path / file).touch()
    assert find_teacher("RCAN", 2).name == "RCAN_BIX2.pt"


@pytest.mark.parametrize("name, scale, words", [
    ("IMDN", 2, "download_teacher.sh IMDN_x2 "), ("CARN", 3, "download_teacher.sh CARN "),
    ("SwinIR", 8, "released for x2, x3, x4"), ("VGG", 2, "EDSR_baseline")])
def test_a_missing_teacher_says_how_to_get_it(tmp_path, monkeypatch, name, scale, words):
    monkeypatch.setattr(model.teachers, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=words):
        find_teacher(name, scale)


def test_a_teacher_of_several_scales_is_loaded_at_the_students(tmp_path, monkeypatch):
    monkeypatch.setattr(model.teachers, "FOLDER", tmp_path)
    torch.save(CARN_M(2, 8, multi_scale=True).state_dict(), tmp_path / "carn_m.pth")
    assert [net.scale for net in make_teachers(option.parse(["--teacher", "CARN_M", "--scale", "3"]))] == [3]


def test_titles_and_files_are_unique():
    assert len(RELEASED) == len({release.file for release in RELEASED.values()}) == len(TEACHERS + LOSS_NETWORKS)
