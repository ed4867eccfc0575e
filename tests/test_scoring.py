"""Mistakes and names in test.py and compare.py, and a loading process that is killed."""
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from checkpoint import save_model
from conftest import ROOT
from model.edsr import EDSR
from system import errors


@pytest.fixture
def run_of(tmp_path):
    """run_of(name, scale) -> the checkpoint of a run of that name."""
    def make(name, scale=2, n_feats=8):
        torch.manual_seed(0)
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.txt").write_text("")
        save_model(EDSR(scale, n_resblocks=1, n_feats=n_feats), tmp_path / name / "model" / "model_best.pt")
        return tmp_path / name / "model" / "model_best.pt"
    return make


@pytest.fixture
def flags(tiny_data, tmp_path):
    return f"--cpu --dir_data {tiny_data} --data_test tiny --ckp_dir {tmp_path / 'out'} "


def test_checkpoints_of_one_name_are_compared_beside_each_other(run_main, run_of, flags):
    status, out, _ = run_main("compare", flags + f"--ckp_path {run_of('A')}+{run_of('B')}")
    assert status == 0 and [line.split()[0] for line in out[-4:-1]] == ["bicubic", "A/model/model_best.pt",
                                                                       "B/model/model_best.pt"]


@pytest.mark.parametrize("names, words", [
    ("bicubic={A}", "another label"), ("a={A}+b={x3}", "different scales, a x2, b x3;"), ("x=Nothing", "--ckp_path Nothing"),
    ("x={A}++", "not a list")])
def test_a_wrong_comparison_gets_one_line(run_main, run_of, flags, names, words):
    status, _, err = run_main("compare", flags + "--ckp_path " + names.format(A=run_of("A"), x3=run_of("x3", 3)))
    assert status == 2 and len(err) == 1 and words in err[0]


def test_a_file_in_the_place_of_the_folder_is_named_before_anything_is_scored(run_main, run_of, flags, tmp_path):
    (tmp_path / "out").write_text("")
    for script, extra in (("compare", ""), ("test", " --save_results")):
        status, _, err = run_main(script, flags + f"--ckp_path {run_of(script)}{extra}")
        assert status == 2 and len(err) == 1 and "out" in err[0] and "cannot write" in err[0]


def test_images_of_a_runs_checkpoint_go_to_the_run(run_main, run_of, tiny_data, tmp_path):
    flags = f"--cpu --dir_data {tiny_data} --data_test tiny --save_results --ckp_path {run_of('A')}"
    assert run_main("test", flags)[0] == 0
    assert len(list((tmp_path / "A" / "results-tiny").glob("*.png"))) == 4


def test_a_teacher_to_score_is_one_file_of_any_name(run_main, run_of, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_of("A").rename(tmp_path / "weights")
    assert run_main("test", flags + "--TS T --teacher weights --patch_size 7")[0] == 0
    status, _, err = run_main("test", flags + "--TS T --teacher [weights,RCAN]")
    assert status == 2 and "give one teacher" in err[-1]


def test_the_width_of_a_preset_scores_the_slice(run_main, run_of, flags):
    status, out, _ = run_main("test", flags + f"--template CSD --ckp_path {run_of('A', n_feats=16)}")
    assert status == 0 and any("n_feats 4," in line for line in out)


def test_a_killed_worker_is_one_line(capsys):
    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == 2 and "--n_threads" in capsys.readouterr().err


# ---- results that are no images

@pytest.fixture
def overflowing(tmp_path):
    """The checkpoint of a network whose feature maps exceed float16 (65504), but not float32 or bfloat16."""
    net = EDSR(2, n_resblocks=1, n_feats=8)
    with torch.no_grad():
        net.body[0].body[0].weight.mul_(1e6)
        net.body[0].body[2].weight.mul_(1e-6)
    save_model(net, tmp_path / "large.pt")
    return tmp_path / "large.pt"


def without_bars(lines):
    return [line for line in lines if line.strip() and "%|" not in line]


@pytest.mark.parametrize("script, extra", [("test", "--save_results"), ("test", "--chop"), ("test", "--self_ensemble"),
                                           ("compare", "")])
def test_an_overflow_is_one_line_and_no_image(run_main, overflowing, flags, tmp_path, script, extra):
    line = f"{flags} --ckp_path {'net=' if script == 'compare' else ''}{overflowing} {extra}"
    status, _, err = run_main(script, line + " --precision half")
    err = without_bars(err)
    assert status == 2 and len(err) == 1 and not list((tmp_path / "out").rglob("0_x2_SR.png"))
    assert all(word in err[0] for word in ("0.png", "net" if script == "compare" else "EDSR", "half", "single or bf16"))
    for precision in ("single", "bf16"):
        assert run_main(script, f"{line} --precision {precision}")[0] == 0


def test_an_overflow_on_ones_own_images_names_the_image(run_main, overflowing, tiny_data, tmp_path):
    flags = f"--cpu --data_test Demo --dir_demo {tiny_data / 'tiny' / 'HR'} --ckp_dir {tmp_path / 'out'} --precision half"
    status, _, err = run_main("test", f"{flags} --ckp_path {overflowing}")
    err = without_bars(err)
    assert status == 2 and len(err) == 1 and "0.png" in err[0]
    assert not list((tmp_path / "out" / "results-Demo").iterdir())


# ---- limits of the machine

MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), OSError(
    12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 99 bytes. Error code 12"), RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED ")]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("script, words", [("train", ("--split_batch", "--batch_size", "--patch_size")),
                                           ("test", ("--chop",))])
def test_lack_of_memory_is_one_line(capsys, monkeypatch, error, script, words):
    def main():
        raise error
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and all(word in err for word in ("out of memory", *words))
    assert ("--split_batch" in err) == (script == "train")


@pytest.mark.parametrize("script", ["train", "test"])
def test_lack_of_memory_is_one_line_in_a_real_run(run_of, flags, tmp_path, script):
    """Under a limit of the address space 400 MB above what the imports take."""
    run = ("import resource, sys; sys.argv = sys.argv[1:]; import torch, trainer, evaluation, model, option; "
           "from system import errors; used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
           "resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 10**8,) * 2); import importlib; "
           "errors.run(importlib.import_module(sys.argv[0][:-3]).main)")
    large = "--n_threads 0 --patch_size 48 --batch_size 512 --scale 2 --model EDSR --n_resblocks 1 --n_feats 64 --loss DS"
    iio.imwrite(tmp_path / "large.png", np.zeros((1500, 1500, 3), np.uint8))
    more = (f"--data_train tiny {large}" if script == "train" else
            f"--data_test Demo --dir_demo {tmp_path} --ckp_path {run_of('A', n_feats=64)}")
    ended = subprocess.run([sys.executable, "-c", run, f"{script}.py", *flags.split(), *more.split()], cwd=ROOT / "code",
                           capture_output=True, text=True, check=False, timeout=100)
    lines = without_bars(ended.stderr.replace("\r", "\n").splitlines())
    assert ended.returncode == 2 and len(lines) == 1 and "out of memory" in lines[0], ended.stderr[-2000:]


def from_the_loader(error):
    """main() that raises an error as PyTorch's queues do: out of a frame of its dataloader.py."""
    source = compile("def next_batch(error):\n    raise error\n", "/x/torch/utils/data/dataloader.py", "exec")
    namespace = {}
    exec(source, namespace)
    return lambda: namespace["next_batch"](error)


@pytest.mark.parametrize("error", [
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), ConnectionResetError(104, "Connection reset by peer"),
    ConnectionRefusedError(111, "Connection refused"), EOFError(), FileNotFoundError(2, "No such file or directory"),
    pickle.UnpicklingError("pickle data was truncated")], ids=lambda error: type(error).__name__)
def test_a_lost_worker_is_one_line_however_it_shows(capsys, error):
    with pytest.raises(SystemExit) as ended:
        errors.run(from_the_loader(error))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "--n_threads" in err


def test_an_error_in_a_worker_is_no_lost_worker():
    with pytest.raises(FileNotFoundError):
        errors.run(from_the_loader(FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.")))
    with pytest.raises(RuntimeError):
        errors.run(lambda: torch.ones(2) @ torch.ones(3))


def test_killed_workers_end_a_run_in_one_line(flags, tmp_path):
    more = ("--data_train tiny --scale 2 --model EDSR --n_resblocks 1 --n_feats 4 --loss 1*DS --patch_size 16 "
            "--batch_size 2 --epochs 99 --test_every 9999 --n_threads 2 --reset")
    command = [sys.executable, "train.py", *flags.split(), *more.split()]
    draw = random.Random(0)
    for _ in range(2):
        run = subprocess.Popen(command, cwd=ROOT / "code", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        workers = []
        while len(workers) < 2 and run.poll() is None:
            workers = children.read_text().split()
            time.sleep(0.01)
        time.sleep(draw.random())
        os.kill(int(draw.choice(workers)), signal.SIGKILL)
        start = time.monotonic()
        err = run.communicate(timeout=60)[1]
        lines = without_bars(err.replace("\r", "\n").splitlines())
        assert run.returncode == 2 and len(lines) == 1 and "--n_threads" in lines[0], err
        assert time.monotonic() - start < 30  # 5 s, and what a busy machine adds


# ---- variables of torchrun

@pytest.mark.parametrize("variables, words", [
    ("RANK=0", "no WORLD_SIZE"), ("RANK=1", "no WORLD_SIZE"), ("WORLD_SIZE=2", "no RANK"),
    ("RANK=0 WORLD_SIZE=2", "no MASTER_ADDR, no MASTER_PORT"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost", "no MASTER_PORT"),
    ("RANK=x WORLD_SIZE=2", "RANK=x"), ("RANK=0 WORLD_SIZE=-1", "WORLD_SIZE=-1"), ("RANK=0 WORLD_SIZE=", "WORLD_SIZE="),
    ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500", "RANK=2 of WORLD_SIZE=2"),
    ("RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=x", "MASTER_PORT=x"), ("LOCAL_RANK=a", "LOCAL_RANK=a")])
def test_variables_that_do_not_fit_together_get_one_line(run_main, run_of, flags, monkeypatch, variables, words):
    for name, value in (pair.split("=") for pair in variables.split()):
        monkeypatch.setenv(name, value)
    status, _, err = run_main("train", flags + "--data_train tiny --scale 2 --model EDSR --loss 1*DS --patch_size 16")
    assert status == 2 and len(err) == 1 and words in err[0] and "torchrun" in err[0]
