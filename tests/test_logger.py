"""What a lost terminal, a full disk, an ASCII terminal or a signal does to a run: real processes."""
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpoint import save_model
from conftest import ROOT
from model.edsr import EDSR
from system import logger
from test_training import flags, wait_for  # noqa: F401
from trainer import Interruption

RUN = "--loss 1*DS --test_every 3 --epochs 2 --print_every 1 "


def start(line, **options):
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) | options
    command = [sys.executable, "train.py", *line.split()]
    return subprocess.Popen(command, cwd=ROOT / "code", start_new_session=True, **options)


def log_of(tmp_path):
    return (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full", "2>&1 | head -n 1"])
def test_a_run_goes_on_without_a_terminal(flags, tmp_path, redirection):  # noqa: F811
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    command = f"set -o pipefail; {sys.executable} train.py {flags}{RUN}{redirection}"
    ran = subprocess.run(["bash", "-c", f"set -f; {command}"], cwd=ROOT / "code", capture_output=True, text=True,
                         check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr
    assert "[6/6]" in log_of(tmp_path) and "epoch 2" in log_of(tmp_path)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["iteration"] == 6


def test_a_mistake_has_status_2_without_a_terminal(flags):  # noqa: F811
    command = f"{sys.executable} train.py {flags}--data_train Nowhere >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT / "code", check=False).returncode == 2


def test_a_lost_session_saves_and_ends_with_129(flags, tmp_path):  # noqa: F811
    """As where ssh ends: the terminal is gone, and SIGHUP goes to all processes, workers included."""
    ours, theirs = pty.openpty()
    line = flags + "--loss 1*DS --test_every 4000 --epochs 1 --print_every 1 --save_every 1000 --n_threads 2"
    process = start(line, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    os.set_blocking(ours, False)
    end = time.monotonic() + 60
    while not ((tmp_path / "run" / "log.txt").exists() and "[5/" in log_of(tmp_path)):
        assert process.poll() is None and time.monotonic() < end
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(ours)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    iteration = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["iteration"]
    assert iteration >= 5 and f"stopped at iteration {iteration};" in log_of(tmp_path)


@pytest.mark.parametrize("ignored", [True, False])
def test_under_nohup_a_hangup_is_ignored(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
        assert interruption.status == (0 if ignored else 128 + signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_after_the_last_epoch_leaves_no_traceback(flags, tmp_path):  # noqa: F811
    process = start(flags + RUN + "--epochs 1 --n_threads 2", text=True)
    wait_for(tmp_path / "run" / "log.txt", "epoch 1", process)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.003)
    _, err = process.communicate()
    assert process.returncode in (0, 130) and "Traceback" not in err and "Exception ignored" not in err, err
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["iteration"] == 3


def test_a_signal_after_the_last_epoch_is_said_to_meet_a_finished_run(run_main, flags, tmp_path, monkeypatch):  # noqa: F811
    from trainer import Trainer  # noqa: PLC0415
    test_epoch = Trainer.test_epoch
    monkeypatch.setattr(Trainer, "test_epoch", lambda self: (test_epoch(self), signal.raise_signal(signal.SIGTERM)))
    status, out, _ = run_main("train", flags + "--loss 1*DS --epochs 1 --test_every 2")
    assert status == 143 and out[-1] == "stopped at iteration 2; the run is finished"
    assert (tmp_path / "run" / "model" / "model_best.pt").exists()


@pytest.mark.parametrize("environment", [dict(PYTHONIOENCODING="ascii", LC_ALL="C"), {}])
def test_names_that_a_terminal_cannot_show(tmp_path, tiny_data, flags, environment):  # noqa: F811
    folder = os.fsencode(tmp_path / "run") + b"\xc3\xbc \xe2\x82\xac \xff"
    demo = tmp_path / "images"
    shutil.copytree(tiny_data / "tiny" / "HR", demo)
    (demo / "0.png").rename(os.fsdecode(os.fsencode(demo) + b"/\xc3\xbc\xff.png"))
    save_model(EDSR(2, n_resblocks=1, n_feats=8), tmp_path / "net.pt")
    command = [sys.executable, "test.py", "--cpu", "--ckp_path", str(tmp_path / "net.pt"), "--data_test", "Demo",
               "--dir_demo", str(demo), b"--ckp_dir=" + folder]
    ran = subprocess.run(command, cwd=ROOT / "code", capture_output=True, env={**os.environ, **environment}, check=False)
    assert ran.returncode == 0 and b"images are in" in ran.stdout, ran.stderr
    command = [sys.executable, "train.py", *flags.split(), *RUN.split(), "--epochs", "1", b"--ckp_dir=" + folder]
    ran = subprocess.run(command, cwd=ROOT / "code", capture_output=True, env={**os.environ, **environment}, check=False)
    assert ran.returncode == 0 and b"--ckp_dir " + folder in Path(os.fsdecode(folder), "config.txt").read_bytes(), ran.stderr


def test_a_log_file_on_a_full_disk_is_said_once(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    os.symlink("/dev/full", tmp_path / "log.txt")
    logger.start_logging()
    logger.log_to(tmp_path / "log.txt")
    for number in range(20):
        logging.getLogger("sr").info("line %d", number)
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"line {number}" for number in range(20)]
    assert err.count("\n") == 1 and "log.txt: cannot write (No space left on device); the run continues" in err
    logger.start_logging()  # closes the file
