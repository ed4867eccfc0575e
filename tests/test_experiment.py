"""The folder of a run: what is overwritten, replaced, locked, and what a folder that cannot be used gets."""
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import checkpoint
import option
from checkpoint import Experiment
from conftest import ROOT
from system.errors import UserError
from test_training import TINY, flags  # noqa: F401

SHORT = "--loss 1*DS --epochs 1 --test_every 1 "


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    with started(run) as experiment:
        experiment.begin()
        experiment.write_history([dict(epoch=1, iteration=1, lr=1.0, loss={"DS": 1.0}, scores={"Set5": (30.0, 0.9)},
                                      images={"Set5": [("baby", 30.0, 0.9)]})])
        for name in ("best", "latest", "raw", "7"):
            torch.save({}, run / "model" / f"model_{name}.pt")
        experiment.save_state({"iteration": 1})
    return run


@pytest.fixture
def folder(finished, tmp_path):
    """The folder of a finished run, as far as its files are concerned."""
    return shutil.copytree(finished, tmp_path / "run")


@contextmanager
def started(run, line=""):
    experiment = Experiment(option.parse([*line.split(), "--ckp_dir", str(run)]))
    try:
        yield experiment
    finally:
        experiment.end()


def refused(run, line=""):
    with started(run, line):
        pass


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- a run is not overwritten

@pytest.mark.parametrize("kept", ["state.pt", "metrics.csv", "images.csv", "loss.csv", "loss_DS.png", "psnr_Set5.png",
                                  "model/model_best.pt", "model/model_7.pt", "model/model_latest.pt"])
@pytest.mark.parametrize("line", ["", "--resume auto"])
def test_whatever_is_left_of_a_run_is_not_overwritten(folder, kept, line):
    if line and kept == "state.pt":
        return
    tables = {"loss_DS.png": "loss.csv", "psnr_Set5.png": "metrics.csv"}
    for name in contents(folder):
        if name not in (kept, "config.txt", tables.get(kept)):
            (folder / name).unlink()
    before = contents(folder)
    with pytest.raises(UserError, match=r"already holds a run \(.*--reset replaces it"):
        refused(folder, line)
    assert contents(folder) == before


def test_the_users_own_files_are_neither_overwritten_nor_reset(tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    for name in ("log.txt", "config.txt", "notes.md", "model/model_mine.pt"):
        (tmp_path / "mine" / name).write_text("mine")
    before = contents(tmp_path)
    for line in ("", "--reset", "--resume auto"):
        with pytest.raises(UserError, match=r"holds (config|log).txt, which a run would overwrite, but no run"):
            refused(tmp_path / "mine", line)
    assert contents(tmp_path) == before


def test_files_beside_a_run_stay_under_reset(folder):
    mine = {"model/model_mine.pt", "model/model_best.pt.bak", "psnr_comparison.png", "loss_notes.png", "notes.md",
            "model/model_7_old.pt"}
    for name in mine:
        (folder / name).write_text("mine")
    with started(folder, "--reset") as experiment:
        experiment.begin()
        experiment.save_state({})
    left = set(contents(folder))
    assert left == mine | {".lock", "config.txt", "log.txt", "state.pt"}


def test_a_run_that_ended_before_it_saved_anything_is_started_anew(tmp_path):
    for line in ("", "", "--resume auto"):
        with started(tmp_path / "run", line) as experiment:
            experiment.begin()
            assert experiment.state is None


# ---- --reset

@pytest.mark.parametrize("when", ["moving", "config", "log", "training"])
def test_a_reset_that_fails_leaves_the_old_run(folder, monkeypatch, when):
    before = contents(folder)
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with started(folder, "--reset") as experiment:
        with monkeypatch.context() as patch:
            if when == "moving":
                rename, calls = os.rename, []
                patch.setattr(type(folder), "rename", lambda path, to: (calls.append(to), len(calls) > 3 and full(),
                                                                        rename(path, to)))
            elif when != "training":
                patch.setattr(checkpoint, {"config": "atomic_write", "log": "log_to"}[when], full)
            if when == "training":
                experiment.begin()
            else:
                with pytest.raises(UserError, match="No space left"):
                    experiment.begin()
        experiment.end()
    assert contents(folder) == before


def test_a_reset_that_was_killed_is_repeated_or_undone_by_hand(folder):
    with started(folder, "--reset") as experiment:
        experiment.begin()
        experiment.moved = False  # as if the process had been killed
    for line in ("", "--resume 1", "--resume auto"):
        with pytest.raises(UserError, match=r"\.replaced holds a run that --reset was replacing"):
            refused(folder, line)
    with started(folder, "--reset") as experiment:
        experiment.begin()
        experiment.save_state({"iteration": 2})
    assert not (folder / ".replaced").exists() and not (folder / "model" / "model_best.pt").exists()
    assert torch.load(folder / "state.pt", weights_only=True) == {"iteration": 2}


# ---- two at a time

@pytest.mark.parametrize("line", ["", "--resume auto"])
def test_a_run_that_was_made_meanwhile_is_not_overwritten(tmp_path, line):
    with started(tmp_path / "run", line) as late:
        with started(tmp_path / "run") as other:
            other.begin()
            other.save_state({"iteration": 5})
        with pytest.raises(UserError, match="another run wrote there"):
            late.begin()
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True) == {"iteration": 5}


def test_a_folder_with_a_run_is_locked_before_the_slow_work(folder):
    with started(folder, "--resume 1"):
        for line in ("--resume 1", "--reset", "--resume auto"):
            with pytest.raises(UserError, match="another run is writing there"):
                refused(folder, line)
    with started(folder, "--resume 1") as experiment:
        experiment.begin()


@pytest.mark.parametrize("line", ["--resume 1", "--reset"])
def test_a_copied_run_without_its_lock_is_checked_again(folder, line):
    (folder / ".lock").unlink()
    with started(folder, line) as late:
        with started(folder, "--resume 1") as other:
            other.begin()
            other.save_state({"iteration": 5})
        with pytest.raises(UserError, match="another run wrote there"):
            late.begin()


def test_two_runs_that_start_together_on_data_without_a_cache(tiny_data, tmp_path):
    command = [sys.executable, "train.py", *TINY.split(), "--dir_data", str(tiny_data), "--data_train", "tiny",
               "--data_test", "tiny", "--n_threads", "0", *SHORT.split(), "--ckp_dir", str(tmp_path / "run"), "--dir_cache",
               str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, cwd=ROOT / "code", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    ended = [(run.communicate()[1], run.returncode) for run in runs]
    assert sorted(status for _, status in ended) == [0, 2], ended
    assert (tmp_path / "run" / "log.txt").read_text().count("epoch 1") == 1


# ---- resuming

def test_resume_auto_starts_and_continues(run_main, flags, tmp_path):  # noqa: F811
    line = flags + "--loss 1*DS --test_every 1 --resume auto "
    assert run_main("train", line + "--epochs 1")[0] == 0
    status, out, _ = run_main("train", line + "--epochs 2")
    assert status == 0 and any("continues with --epochs 2 (was 1)" in text for text in out)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["iteration"] == 2


def test_the_config_of_a_run_continues_it(run_main, flags, tmp_path):  # noqa: F811
    assert run_main("train", flags + SHORT)[0] == 0
    status, _, err = run_main("train", f"@{tmp_path / 'run' / 'config.txt'}")
    assert status == 2 and "already holds a run" in err[-1]
    status, out, _ = run_main("train", f"@{tmp_path / 'run' / 'config.txt'} --resume 1")
    assert status == 0 and not [text for text in out if "continues with" in text]


# ---- folders and files that cannot be used

@pytest.mark.parametrize("name", ["state.pt", "config.txt", "log.txt", ".lock"])
def test_a_folder_in_place_of_a_file_gets_one_line(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(UserError) as caught, started(folder, "--resume 1") as experiment:
        experiment.begin()
    assert name in str(caught.value) and "irectory" in str(caught.value)


@pytest.mark.parametrize("name", ["state.pt", "config.txt"])
def test_a_file_that_may_not_be_read_is_not_called_broken(folder, name, monkeypatch):
    opening = type(folder).open
    def forbidden(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, *args, **kwargs)
    monkeypatch.setattr(type(folder), "open", forbidden)
    with pytest.raises(UserError) as caught, started(folder, "--resume 1") as experiment:
        experiment.begin()
    assert f"{name}: cannot read or write (Permission denied)" in str(caught.value)
    assert "--reset" not in str(caught.value)


@pytest.mark.parametrize("ckp_dir, words", [("file", "a file, not a folder"), ("file/run", "a file, not a folder"),
                                            ("x" * 300, "longer than"), ("new/" + "ü" * 200, "longer than"),
                                            ("x/" * 2000, "longer than")])
def test_a_place_that_cannot_be_is_refused_at_once(tmp_path, ckp_dir, words):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        refused(tmp_path / ckp_dir)


def test_a_place_without_permissions_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"{tmp_path}: its permissions"):
        refused(tmp_path / "run")


def test_files_of_killed_processes_are_removed(folder):
    from system.files import HOST  # noqa: PLC0415
    process = subprocess.Popen(["true"])
    process.wait()
    (folder / "results-Set5").mkdir()
    dead = [folder / place / f".x.{HOST}.{process.pid}.part" for place in (".", "model", "results-Set5")]
    alive = folder / f".x.{HOST}.{os.getpid()}.part"
    for file in (*dead, alive):
        file.touch()
    with started(folder, "--resume 1") as experiment:
        assert all(file.exists() for file in dead)
        experiment.begin()
    assert not any(file.exists() for file in dead) and alive.exists()
