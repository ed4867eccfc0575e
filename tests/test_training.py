"""Training from the command line: what a run leaves, that it can be interrupted anywhere, and what mistakes get."""
import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from checkpoint import save_model
from conftest import ROOT
from data.image import read_photo
from model import load_model
from model.edsr import EDSR
from model.rcan import RCAN
from test_distributed import make_trainer

SIZES = dict(n_resgroups=2, n_resblocks=1, n_feats=8, reduction=4)
TINY = "--model RCAN --scale 2 --patch_size 24 --batch_size 4 --cpu " + "".join(f"--{k} {v} " for k, v in SIZES.items())


@pytest.fixture
def flags(tiny_data, tmp_path):
    """Flags of a tiny run in tmp_path/run."""
    return f"{TINY} --dir_data {tiny_data} --data_train tiny --data_test tiny --n_threads 0 --ckp_dir {tmp_path / 'run'} "


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(7)
    save_model(EDSR(2, n_resblocks=3, n_feats=12), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_distillation_leaves_what_was_promised(run_main, flags, teacher, tmp_path):
    terms = {"DS", "TS", "SA", "IA", "AT", "fitnet", "PSA", "RBF", "MMD"}
    status, out, _ = run_main("train", flags + f"--teacher {teacher} --loss {'+'.join(sorted(terms))} --pool_size 2 "
                              "--epochs 2 --test_every 6 --print_every 3 --save_results --save_gt --save_models")
    run = tmp_path / "run"
    assert status == 0
    assert [row["epoch"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    assert set(rows(run / "loss.csv")[0]) == {"epoch", "iteration", "lr", "total", *terms}
    names = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert names >= {"config.txt", "log.txt", "state.pt", "loss_total.png", "loss_SA.png", "psnr_tiny.png",
                     "model/model_latest.pt", "model/model_best.pt", "model/model_1.pt", "model/model_2.pt",
                     "results-tiny/0_x2_SR.png", "results-tiny/0_x2_LR.png", "results-tiny/3_x2_HR.png"}
    assert not [name for name in names if name.endswith(".part")]
    assert any("PSNR" in line for line in out) and "--loss AT+DS" in (run / "config.txt").read_text()
    net = load_model(run / "model" / "model_latest.pt")
    assert net.config == dict(scale=2, **SIZES)


def test_training_learns(run_main, flags, tmp_path):
    status, _, _ = run_main("train", flags + "--loss 1*DS --lr 3e-3 --epochs 3 --test_every 40")
    scores = [float(row["psnr"]) for row in rows(tmp_path / "run" / "metrics.csv")]
    losses = [float(row["total"]) for row in rows(tmp_path / "run" / "loss.csv")]
    assert status == 0 and scores[2] > scores[0] + 1 and losses[2] < 0.7 * losses[0]


def test_scratch_and_distilled_start_from_the_same_student(run_main, flags, teacher, tmp_path):
    run_main("train", flags + "--loss 1*DS --lr 1e-30 --epochs 1 --test_every 1")
    run_main("train", flags + f"--loss 1*DS+1*TS+1*fitnet --teacher {teacher} --lr 1e-30 --epochs 1 --test_every 1 "
             f"--ckp_dir {tmp_path / 'other'}")
    assert_same_weights(*(tmp_path / name / "model" / "model_latest.pt" for name in ("run", "other")), 1e-20)


@pytest.mark.parametrize("precision", ["bf16", "half"])
def test_reduced_precision_trains_and_keeps_float32_weights(run_main, flags, teacher, tmp_path, precision):
    status, _, _ = run_main("train", flags + f"--teacher {teacher} --loss 1*DS+1*TS+10*SA --precision {precision} "
                            "--epochs 1 --test_every 3")
    assert status == 0
    assert all(p.dtype == torch.float32 for p in load_model(tmp_path / "run" / "model" / "model_latest.pt").parameters())


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "ADAMW"])
def test_other_optimisers_and_step_decay(run_main, flags, tmp_path, optimizer):
    status, _, _ = run_main("train", flags + f"--loss 1*DS --optimizer {optimizer} --lr 1e-6 --decay 2-3 --gamma 0.1 "
                            "--epochs 3 --test_every 2 --gclip 1 --weight_decay 1e-4")
    assert status == 0
    assert [float(row["lr"]) for row in rows(tmp_path / "run" / "loss.csv")] == pytest.approx([1e-6, 1e-7, 1e-8])


@pytest.mark.parametrize("flag", ["", "--gclip 1e-4", "--grad_norm 1e-3", "--gclip 1e-4 --grad_norm 1e-3"])
def test_gclip_clips_values_and_grad_norm_the_norm(flag):
    trainer = make_trainer(f"--loss 1*DS --lr 1 --momentum 0 {flag}")
    weights = [weight for weight in trainer.student.parameters() if weight.requires_grad]
    lr, hr = (torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8) for side in (16, 32))
    gradients = torch.autograd.grad(trainer.distiller(lr, hr)[0], weights)
    before = [weight.detach().clone() for weight in weights]
    if "gclip" in flag:
        gradients = [x.clamp(-1e-4, 1e-4) for x in gradients]
    norm = torch.cat([x.flatten() for x in gradients]).norm().item()
    factor = min(1, 1e-3 / norm) if "grad_norm" in flag else 1
    assert norm > 0.002
    trainer.step(lr, hr)
    for weight, old, gradient in zip(weights, before, gradients):
        assert torch.allclose(weight, old - factor * gradient, rtol=1e-4, atol=2e-7)


def test_the_range_of_the_images_scales_the_loss_and_nothing_else(run_main, flags, tmp_path):
    for value in (255, 1):
        run_main("train", flags + f"--loss 1*DS --lr 1e-30 --epochs 1 --test_every 2 --rgb_range {value} "
                 f"--ckp_dir {tmp_path / str(value)}")
    losses, scores = ([float(rows(tmp_path / str(value) / name)[0][key]) for value in (255, 1)]
                      for name, key in (("loss.csv", "DS"), ("metrics.csv", "psnr")))
    assert losses[0] == pytest.approx(255 * losses[1], rel=1e-4) and scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_several_teachers_take_turns(run_main, flags, teacher, tmp_path):
    save_model(RCAN(2, **SIZES), tmp_path / "second.pt")
    status, _, _ = run_main("train", flags + f"--teacher [{teacher},{tmp_path / 'second.pt'}] --loss 1*TS+1*fitnet "
                            "--epochs 1 --test_every 4")
    assert status == 0


# ---- interruptions

def start(flags):
    """The run as a process of its own, in a process group of its own."""
    return subprocess.Popen([sys.executable, "train.py", *flags.split()], cwd=ROOT / "code", stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(path, text, process, seconds=120):
    """Waits until the file holds the text."""
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{text!r} did not appear in {path}"
        time.sleep(0.01)


def assert_same_weights(first, second, tolerance=0):
    first, second = (torch.load(path, weights_only=True)["params"] for path in (first, second))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= tolerance, name


@pytest.fixture
def interruptible(flags, teacher):
    """Flags of a run long enough to be interrupted in its second epoch, with terms that have parameters and draw numbers."""
    return flags + (f"--teacher [{teacher},{teacher}] --loss 1*DS+1*TS+1*fitnet --epochs 3 --test_every 12 --print_every 1 "
                    "--log_gradients 5 ")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_in_an_epoch_and_resumed_ends_bit_identical(run_main, interruptible, tmp_path, workers):
    whole, killed = (interruptible + f"--n_threads {workers} --ckp_dir {tmp_path / name} " for name in ("whole", "killed"))
    assert run_main("train", whole)[0] == 0
    process = start(killed + "--save_every 0.05")
    wait_for(tmp_path / "killed" / "log.txt", "[17/36]", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert 0 < state["iteration"] < 36
    assert run_main("train", killed + "--resume 1")[0] == 0
    assert_same_weights(*(tmp_path / name / "model" / "model_latest.pt" for name in ("whole", "killed")))
    assert_same_weights(*(tmp_path / name / "model" / "model_best.pt" for name in ("whole", "killed")))
    for name in ("metrics.csv", "images.csv", "loss.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "killed" / name).read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_the_very_iteration(run_main, interruptible, tmp_path, number):
    flags = interruptible + "--n_threads 2 --save_every 1000 "
    process = start(flags)
    wait_for(tmp_path / "run" / "log.txt", "[5/36]", process)
    os.killpg(process.pid, number)  # as a terminal does, workers included
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert 5 <= torch.load(tmp_path / "run" / "state.pt", weights_only=True)["iteration"] < 36
    assert run_main("train", flags + "--resume 1")[0] == 0
    assert run_main("train", flags + f"--ckp_dir {tmp_path / 'whole'}")[0] == 0
    assert_same_weights(*(tmp_path / name / "model" / "model_latest.pt" for name in ("run", "whole")))


def test_a_finished_run_resumes_to_nothing_or_to_more_epochs(run_main, flags, tmp_path):
    flags += "--loss 1*DS --test_every 2 "
    assert run_main("train", flags + "--epochs 1")[0] == 0
    assert run_main("train", flags + "--epochs 1 --resume 1")[0] == 0
    status, out, _ = run_main("train", flags + "--epochs 2 --resume 1")
    assert status == 0 and len(rows(tmp_path / "run" / "metrics.csv")) == 2
    assert any("--epochs 2 (was 1)" in line for line in out)


# ---- mistakes

def test_a_run_is_not_overwritten_unasked(run_main, flags):
    flags += "--loss 1*DS --epochs 1 --test_every 1 "
    assert run_main("train", flags)[0] == 0
    status, _, err = run_main("train", flags)
    assert status == 2 and "already holds a run" in err[-1]
    assert run_main("train", flags + "--reset")[0] == 0


def test_an_infinite_loss_ends_the_run_and_leaves_the_last_good_state(run_main, flags, tmp_path):
    good = flags + "--loss 1*DS --epochs 2 --test_every 3 "
    assert run_main("train", good + "--epochs 1")[0] == 0
    before = (tmp_path / "run" / "state.pt").read_bytes()
    status, _, err = run_main("train", good + "--resume 1 --lr 1e30")
    assert status == 2 and "not finite at iteration" in err[-1] and "DS" in err[-1]
    assert not [line for line in err if "Traceback" in line]
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_weights_that_the_last_update_broke_are_not_saved(run_main, flags, tmp_path):
    line = flags + "--loss 1*DS --test_every 1 --epochs 3 "
    status, _, err = run_main("train", line + "--lr 1e30")
    assert status == 2 and "outputs are not finite" in err[-1]
    assert not list((tmp_path / "run").rglob("*.pt"))
    assert "outputs are not finite" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_cannot_start_leaves_the_old_one_alone(run_main, flags, tmp_path):
    assert run_main("train", flags + "--loss 1*DS --epochs 1 --test_every 1")[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    for extra in ("--reset --loss 1*QQ", "--resume 1 --loss 1*DS --n_feats 16", "--resume 1 --loss 1*DS+1*TS --teacher RCAN",
                  "--resume 1 --loss 1*DS --optimizer SGD"):
        assert run_main("train", flags + "--epochs 2 --test_every 1 " + extra)[0] == 2
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_two_runs_do_not_share_a_folder(run_main, flags, tmp_path):
    from system.files import lock  # noqa: PLC0415
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run" / ".lock", "held"):
        status, _, err = run_main("train", flags + "--loss 1*DS --epochs 1 --test_every 1")
    assert status == 2 and "another run is writing there" in err[-1]


def test_nan_in_a_term_names_the_iteration_and_the_terms(run_main, flags, monkeypatch):
    from loss.pixel import DataSupervision  # noqa: PLC0415
    forward = DataSupervision.forward
    monkeypatch.setattr(DataSupervision, "forward", lambda self, step: forward(self, step) / (step.iteration != 2) - 0.0
                        if step.iteration != 2 else forward(self, step) * float("nan"))
    status, _, err = run_main("train", flags + "--loss 1*DS --epochs 1 --test_every 5")
    assert status == 2 and "at iteration 3" in err[-1] and "DS nan" in err[-1]


@pytest.mark.parametrize("extra, words", [
    ("--loss 1*DS+1*QQ", "no term QQ"),
    ("--loss 0*DS", "nothing would be trained"),
    ("--data_train Nowhere", "download_data.sh"),
    ("--data_test Nowhere", "--data_test Sample"),
    ("--patch_size 128", "larger than"),
    ("--teacher missing.pt", "no such file"),
    ("--teacher VGG", "--teacher VGG"),
    ("--model UNet --loss 1*DS", "EDSR, RCAN"),
    ("--resume 1", "does not exist"),
    ("--reduction 16 --loss 1*DS", "leaves none"),
])
def test_a_mistake_gets_one_line_and_status_2(run_main, flags, tmp_path, extra, words):
    status, _, err = run_main("train", flags + extra)
    assert status == 2 and len(err) == 1 and err[0].startswith("error: ") and words in err[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("term", ["CA", "FSP"])
def test_a_term_for_equal_widths_refuses_different_ones(run_main, flags, teacher, term):
    status, _, err = run_main("train", flags + f"--teacher {teacher} --loss 1*DS+1*{term}")
    assert status == 2 and "the student's feature maps have 8 channels and the teacher's 12" in err[0]


def test_a_teacher_of_another_scale_is_refused(run_main, flags, tmp_path):
    save_model(EDSR(3, n_resblocks=1, n_feats=8), tmp_path / "x3.pt")
    status, _, err = run_main("train", flags + f"--teacher {tmp_path / 'x3.pt'}")
    assert status == 2 and "scale 3" in err[0] and "2" in err[0]


def test_resuming_another_network_is_refused(run_main, flags):
    flags += "--loss 1*DS --epochs 1 --test_every 1 "
    assert run_main("train", flags)[0] == 0
    status, _, err = run_main("train", flags + "--resume 1 --n_feats 16")
    assert status == 2 and "n_feats 8" in err[-1] and "n_feats 16" in err[-1]


def test_a_broken_state_is_named(run_main, flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"half a file")
    status, _, err = run_main("train", flags + "--loss 1*DS --resume 1")
    assert status == 2 and "state.pt" in err[-1] and "no PyTorch file" in err[-1]


# ---- scoring

def test_scoring_reads_everything_from_the_file(run_main, flags, tmp_path, tiny_data):
    run_main("train", flags + "--loss 1*DS --lr 1e-3 --epochs 1 --test_every 5")
    trained = rows(tmp_path / "run" / "metrics.csv")[0]
    path = tmp_path / "run" / "model" / "model_best.pt"
    status, out, _ = run_main("test", f"--ckp_path {path} --dir_data {tiny_data} --data_test tiny --cpu")
    psnr, ssim = (float(word) for word in out[-1].split()[2:4])
    assert status == 0 and psnr == pytest.approx(float(trained["psnr"]), abs=6e-4)
    assert ssim == pytest.approx(float(trained["ssim"]), abs=6e-5)


@pytest.mark.parametrize("extra, words", [
    ("--scale 4", "scale 2, not 4"),
    ("--model EDSR", "not --model EDSR"),
    ("--n_resblocks 6", "n_resblocks 1, not 6"),
])
def test_a_flag_that_contradicts_the_file_is_an_error(run_main, tmp_path, extra, words):
    save_model(RCAN(2, **SIZES), tmp_path / "net.pt")
    status, _, err = run_main("test", f"--ckp_path {tmp_path / 'net.pt'} --data_test Sample {extra}")
    assert status == 2 and len(err) == 1 and words in err[0] and "net.pt" in err[0]


def test_demo_upscales_images_without_a_truth(run_main, tmp_path, tiny_data):
    save_model(RCAN(2, **SIZES), tmp_path / "net.pt")
    status, _, _ = run_main("test", f"--ckp_path {tmp_path / 'net.pt'} --data_test Demo --cpu --chop --self_ensemble "
                            f"--dir_demo {tiny_data / 'tiny' / 'HR'} --ckp_dir {tmp_path / 'out'}")
    assert status == 0 and len(list((tmp_path / "out" / "results-Demo").glob("*_x2_SR.png"))) == 4


def test_comparing_makes_a_table_and_pictures(run_main, tmp_path, tiny_data):
    save_model(RCAN(2, **SIZES), tmp_path / "net.pt")
    status, _, _ = run_main("compare", f"--ckp_path mine={tmp_path / 'net.pt'} --dir_data {tiny_data} --data_test tiny "
                            f"--cpu --ckp_dir {tmp_path / 'out'}")
    assert status == 0 and [row["network"] for row in rows(tmp_path / "out" / "compare.csv")] == ["bicubic", "mine"]
    for name in ("compare.png", "compare_speed.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    bicubic, mine = rows(tmp_path / "out" / "compare.csv")
    pixels = [image.size / 3 for image in map(read_photo, (tiny_data / "tiny" / "HR").iterdir())]
    per_image = 1e6 / np.mean(pixels)  # the table has tenths of a millisecond
    assert all(float(row["ms_per_megapixel"]) == pytest.approx(float(row["ms_per_image"]) * per_image, abs=0.06 * per_image)
               for row in (bicubic, mine))


def test_a_mistake_on_the_real_command_line_shows_no_traceback():
    ran = subprocess.run([sys.executable, "test.py", "--ckp_path", "missing.pt"], cwd=ROOT / "code", capture_output=True,
                         text=True, check=False)
    assert ran.returncode == 2 and ran.stderr == "error: missing.pt: no such file\n" and not ran.stdout


def test_a_student_may_start_from_a_checkpoint_of_another_scale(run_main, flags, tmp_path):
    save_model(RCAN(4, **SIZES), tmp_path / "x4.pt")
    flags += f"--pre_train {tmp_path / 'x4.pt'} --loss 1*DS --lr 1e-30 --epochs 1 --test_every 1"
    status, _, _ = run_main("train", flags)
    before, after = (torch.load(path, weights_only=True)["params"]
                     for path in (tmp_path / "x4.pt", tmp_path / "run" / "model" / "model_latest.pt"))
    assert status == 0 and "tail.0.2.weight" not in after
    assert all(torch.allclose(before[name], value) for name, value in after.items() if not name.startswith("tail."))


# ---- --compile

@pytest.mark.parametrize("works", [True, False])
def test_compiled_networks_train_as_without_and_the_others_are_named(run_main, flags, teacher, tmp_path, monkeypatch,
                                                                     works):
    line = flags + f"--teacher {teacher} --loss 1*DS+1*TS+1*AT --epochs 1 --test_every 3 "
    run_main("train", line)
    real, asked = torch.compile, []

    def compile(net):
        asked.append(net)
        # without a backend: as fast as it is compiled, and still traced and run by PyTorch's compiler
        return real(net, backend="eager") if works else broken

    def broken(*_, **__):
        raise RuntimeError("no compiler\nto be found")

    monkeypatch.setattr(torch, "compile", compile)
    status, out, _ = run_main("train", line + f"--compile --ckp_dir {tmp_path / 'compiled'}")
    told = [text for text in out if text.startswith("--compile: ")]
    assert status == 0 and len(asked) == 2
    assert [text[:40] for text in told] == ([] if works else [f"--compile: {name} cannot be compiled here "[:40]
                                                              for name in ("RCAN", "EDSR")])
    assert_same_weights(*(tmp_path / name / "model" / "model_latest.pt" for name in ("run", "compiled")), 1e-6)
