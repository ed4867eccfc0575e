"""--tensorboard: the curves of a run, also of one that was killed and resumed."""
import csv
import errno
import shutil
import sys

import numpy as np
import pytest
import torch

import tensorboard_log
from checkpoint import Experiment
from system.errors import UserError
from tensorboard_log import TensorBoard

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                  reason="the package tensorboard is not installed")


@pytest.fixture
def train(run_main, tiny_data, tmp_path):
    """train(name, flags) -> exit status and stderr of a tiny run, each iteration of which is logged."""
    def run(name, line):
        status, _, err = run_main("train", f"--cpu --n_threads 0 --dir_data {tiny_data} --dir_cache {tmp_path / 'cache'} "
                                  "--data_train tiny --data_test tiny --scale 2 --model EDSR --n_resblocks 1 --n_feats 4 "
                                  "--teacher EDSR --loss 1*DS+2*DS_FFT --patch_size 16 --batch_size 1 --test_every 3 "
                                  f"--print_every 1 --tensorboard --ckp_dir {tmp_path / name} {line}")
        return status, err
    return run


def scalars_of(folder):
    """Return {name: [(step, value)]} as TensorBoard shows them."""
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def test_a_run_that_was_killed_twice_has_the_curves_of_an_undisturbed_one(train, tmp_path, monkeypatch):
    assert train("whole", "--epochs 2")[0] == 0
    with monkeypatch.context() as patch:  # ends the run between the test of the first epoch and the save of the state
        patch.setattr(Experiment, "save_models", lambda *_: (_ for _ in ()).throw(UserError("killed")))
        assert train("killed", "--epochs 2")[0] == 2
    run = tmp_path / "killed"
    assert train("killed", "--epochs 1 --resume 1")[0] == 0
    shutil.copy(run / "state.pt", tmp_path / "earlier.pt")
    assert train("killed", "--epochs 2 --resume 1")[0] == 0
    shutil.copy(tmp_path / "earlier.pt", run / "state.pt")  # as if the second epoch had not been saved
    assert train("killed", "--epochs 2 --resume 1")[0] == 0
    curves, events = scalars_of(tmp_path / "whole")
    assert scalars_of(run)[0] == curves
    assert curves.keys() == {"loss/total", "loss/DS", "loss/DS_FFT", "lr", "PSNR/tiny", "SSIM/tiny"}
    assert [[step for step, _ in curves[name]] for name in ("loss/total", "PSNR/tiny")] == [[1, 2, 3, 4, 5, 6], [3, 6]]
    for table, column, name in (("metrics", "psnr", "PSNR/tiny"), ("loss", "DS_FFT", "loss/DS_FFT")):
        written = [float(row[column]) for row in csv.DictReader((tmp_path / "whole" / f"{table}.csv").open())]
        assert [value for step, value in curves[name] if step % 3 == 0] == pytest.approx(written, rel=1e-4)
    assert [(image.step, image.width, image.height) for image in events.Images("SR/tiny")] == [(3, 64, 56), (6, 64, 56)]


def test_a_new_run_replaces_the_curves(train, tmp_path):
    assert train("run", "--epochs 2")[0] == 0 and train("run", "--epochs 1 --reset --seed 2")[0] == 0
    assert [step for step, _ in scalars_of(tmp_path / "run")[0]["lr"]] == [1, 2, 3]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_images_are_cut_to_a_size(monkeypatch, train, tmp_path):
    monkeypatch.setattr("trainer.IMAGE_SIDE", 20)
    assert train("run", "--epochs 1")[0] == 0
    (image,) = scalars_of(tmp_path / "run")[1].Images("SR/tiny")
    assert (image.width, image.height) == (20, 20)


def test_without_the_package_nothing_is_begun(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, err = train("run", "--epochs 1")
    assert status == 2 and len(err) == 1 and "pip install tensorboard" in err[0] and not (tmp_path / "run").exists()


def test_a_full_disk_is_logged_once_and_does_not_end_the_run(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    board = TensorBoard(tmp_path, 1)
    monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, "add_scalar", fail)
    lines = []
    monkeypatch.setattr(tensorboard_log.log, "warning", lambda text, *values: lines.append(text % values))
    for step in (1, 2):
        board.add(step, {"a": 1.0}, {"b": np.zeros((4, 4, 3), np.uint8)})
    board.close()
    assert lines == ["--tensorboard: cannot write (No space left on device); the run continues without it"]
