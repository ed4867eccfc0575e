"""Several processes, on the CPU with gloo: what they compute, one would; and runs of them started, ended, continued."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing

import loss
import option
from checkpoint import save_model
from data import dataset
from data.views import plan
from distiller import build_distiller
from loss import vqgan
from model import slim
from model.lora import LowRankAdapted
from model.rcan import RCAN
from model.san import SAN
from option_types import Stage
from system import distributed
from system.errors import UserError
from trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4)
STEP = ("--cpu --scale 2 --patch_size 32 --batch_size 4 --feature_net random --optimizer SGD --lr 1e-9 --epochs 1 "
        "--test_every 1 ")
CASES = {
    "pixel": "--loss 1*DS+1*TS",
    "pixel terms": "--loss 1*DS_MSE+1*TS_Charbonnier+1*DS_FFT+1*TS_gradient+1*DS_wavelet+1*TS_masked",
    "stages": "--loss 1*DS@0-50%,1*TS+1*fitnet@50-100% --test_every 2",
    "ECO": "--loss 1*DS+1*TS --eco --test_every 2",
    "FAKD": "--loss 0.5*DS+0.5*TS+10*SA",
    "other features": "--loss 1*AT+1*CA+1*IA+1*fitnet+1*PSA+1*FSP+1*MMD+1*RBF",
    "CSD": "--loss 1*DS+200*CSD+1*VGG --neg_num 2",
    "CSD cos": "--loss 200*CSD --neg_num 3 --d_func cos",
    "slice": "--loss 1*DS+1*TS+1*T_DS --width_mult 0.5",
    "DCKD": "--loss 1*LC+25*DCR+1*DMM --dcr_negatives 1 --dcr_blur 0.5 --dcr_resize 0.5",
    "NCE": "--loss 1*NCE --nce_patches 3 --nce_patch_size 16",
    "GAN": "--loss 1*DS+1*GAN --gan_type RGAN",
    "WGAN": "--loss 1*GAN --gan_type WGAN_GP",
    "U-Net": "--loss 1*DS+1*GAN --gan_net unet",
    "MCADKD": "--loss 1*DS+1*GAN --gan_net unet --gan_update before",
    "DUKD": "--template DUKD --label_consistency 0.5 --n_zoom_in 2 --batch_size 4 --lr 1e-9 --patch_size 32",
    "DUKD as published": "--template DUKD --label_consistency 0.5 --label_consistency_views zoom_in --zoom_in_tiles batch "
                         "--n_zoom_in 2 --batch_size 4 --lr 1e-9 --patch_size 32",
    "degraded": "--loss 1*DS+1*TS --degrade blur+rain+noise0-55+jpeg10-40",
    "Real-ESRGAN": "--loss 1*DS+1*TS --degrade realesrgan",
    "adapters": "--loss 1*DS+1*TS --lora_rank 2 --pre_train p.pt",
    "unused parameters": "--loss 1*DS --model SAN",
}


@pytest.fixture(autouse=True)
def float32_again():
    yield
    torch.set_default_dtype(torch.float32)


def make_trainer(line, device="cpu"):
    torch.manual_seed(0)
    args = option.parse([*STEP.split(), *line.split()])
    teacher = RCAN(2, **SMALL)
    student = SAN(2, n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4) if args.model == "SAN" else RCAN(2, **SMALL)
    if args.width_mult:
        student = slim(teacher, args.width_mult)
    if args.lora_rank:
        student = LowRankAdapted(student, args.lora_rank)
    criterion = loss.build_loss(args.loss, loss.Context(args, student, [teacher], device, plan(args)))
    distiller = build_distiller(args, student, [teacher], criterion)
    return Trainer(args, distiller, None, [], SimpleNamespace(state=None), torch.device(device))


def gradients(case):
    """Of the networks and of the discriminator, after steps on this process's part of the batch; and the terms' values."""
    torch.set_default_dtype(torch.float64)
    trainer = make_trainer(CASES[case])
    trainer.parallel = distributed.wrap(trainer.distiller)
    generator = torch.Generator().manual_seed(5)
    hr = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    lr = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    torch.manual_seed(7)
    for trainer.iteration, trainer.args.log_gradients in enumerate((0, 1)):
        values = trainer.step(distributed.local_shard(lr), distributed.local_shard(hr))
    trained = enumerate(trainer.distiller.trainable_parameters())
    found = {f"trained {index}": parameter.grad for index, parameter in trained if parameter.grad is not None}
    found |= {f"state {name}": x for name, x in trainer.loss.state_dict().items() if isinstance(x, torch.Tensor)}
    return {**found, "values": values, "gradients": trainer.gradients, "draws": torch.get_rng_state()}


def work(rank, number, folder, port):
    """What one of the processes does: all cases, into a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        make_exact(patch)
        distributed.connect("cpu")
        torch.save({case: gradients(case) for case in CASES}, folder / f"{rank}.pt")
        distributed.disconnect()


def make_small(patch):
    patch.setattr(vqgan, "F16_1024", dict(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attention=(4,),
                                          z_channels=8, embed_dim=8, n_embed=16))


def make_exact(patch):
    """Everything in float64: what is left of a difference is not rounding."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.start_processes(work, (2, folder, free_port()), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def free_port():
    import socket  # noqa: PLC0415
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(of_two, monkeypatch, case):
    make_small(monkeypatch)
    make_exact(monkeypatch)
    alone = gradients(case)
    for found in of_two:
        assert found[case].keys() == alone.keys()
        assert torch.equal(found[case]["draws"], alone["draws"])
        for name, expected in alone.items():
            if name != "draws":
                error = (found[case][name].double() - expected.double()).abs().max().item()
                assert error <= 1e-9 * expected.abs().max().item() + 1e-15, name


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_the_processes_are_the_batches(parts):
    whole = [list(batch) for batch in dataset.Batches(3, 7, [Stage(0, 0, 16, 8)])]
    divided = [list(dataset.Batches(3, 7, [Stage(0, 0, 16, 8)], part, parts)) for part in range(parts)]
    assert [[number for part in batch for number in part] for batch in zip(*divided)] == whole
    assert all(len(dataset.Batches(3, 7, [Stage(0, 0, 16, 8)], part, parts)) == 4 for part in range(parts))


@pytest.mark.parametrize("line", ["--loss 0.5*DS+0.5*TS+10*SA --upcycle zoom_out", "--loss 1*AT+1*CA+1*fitnet+1*FSP+1*RBF"])
def test_a_split_batch_has_the_gradients_of_the_whole(monkeypatch, line):
    make_exact(monkeypatch)
    monkeypatch.setitem(CASES, "whole", line)
    monkeypatch.setitem(CASES, "split", line + " --split_batch 2")
    whole, split = gradients("whole"), gradients("split")
    for name in whole.keys() - {"draws"}:
        assert torch.allclose(split[name], whole[name], rtol=1e-9, atol=1e-12), name


def test_terms_with_a_memory_see_all_parts_of_a_split_batch(monkeypatch):
    trainer = make_trainer("--loss 1*DS+1*GAN --split_batch 2")
    seen = []
    monkeypatch.setattr(trainer.loss.terms["GAN"], "update", seen.append)
    hr = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    lr = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    trainer.step(lr, hr)
    assert len(seen) == 1 and torch.equal(seen[0].hr, hr.float()) and torch.equal(seen[0].lr, lr.float())
    assert seen[0].student.sr.shape == hr.shape and not seen[0].student.sr.requires_grad


# ---- whole runs

@pytest.fixture
def command(tiny_data, tmp_path):
    """The command line of a small run with terms that draw numbers and have parameters."""
    torch.manual_seed(1)
    save_model(RCAN(2, **{**SMALL, "n_feats": 12}), tmp_path / "teacher.pt")
    flags = dict(dir_data=tiny_data, data_train="tiny", data_test="tiny", dir_cache=tmp_path / "cache", scale=2,
                 model="RCAN", **SMALL, patch_size=16, batch_size=4, test_every=8, print_every=1, n_threads=0, lr=1e-3,
                 teacher=tmp_path / "teacher.pt", loss="1*DS+1*TS+1*fitnet+0.1*GAN", label_consistency=0.3,
                 ckp_dir=tmp_path / "run")
    return ["train.py", "--cpu", "--save_results", *(f"--{name}={value}" for name, value in flags.items())]


def start(command, *more):
    return subprocess.Popen([sys.executable, *command, *more], cwd=ROOT / "code", stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, [line for text in (out, err) for line in text.replace("\r", "\n").splitlines()
                                if line.strip() and "it/s" not in line.split("|")[-1] and "|" not in line]


def wait_for(path, text, process, seconds=120):
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{text!r} did not appear in {path}"
        time.sleep(0.01)


def scores(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["psnr"]) for row in csv.DictReader(file)]


def test_a_run_of_two_processes_is_that_of_one_and_another_number_may_continue_it(run_main, command, tmp_path):
    status, lines = finish(start(command, "--n_GPUs", "2", "--epochs", "1"))
    assert status == 0, lines
    assert sum(line.startswith("student:") for line in lines) == 1 and not [line for line in lines if "Warning" in line]
    assert len(list((tmp_path / "run" / "results-tiny").glob("*_SR.png"))) == 4
    lines = (tmp_path / "run" / "images.csv").read_text().splitlines()
    assert [line.split(",")[4] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert run_main("train", " ".join([*command[1:], "--epochs", "2", "--resume", "1"]))[0] == 0
    alone = tmp_path / "alone"
    assert run_main("train", " ".join([*command[1:], "--epochs", "2", "--ckp_dir", str(alone)]))[0] == 0
    assert scores(tmp_path / "run") == pytest.approx(scores(alone), abs=0.01)
    of_both = [torch.load(folder / "state.pt", weights_only=True) for folder in (tmp_path / "run", alone)]
    assert torch.equal(*(state["random"] for state in of_both))
    for name, value in of_both[0]["student"].items():
        assert (value - of_both[1]["student"][name]).abs().max() <= 1e-3 * value.abs().max() + 1e-5, name


def test_what_ends_one_of_them_ends_all_and_nothing_is_lost(run_main, command, tmp_path):
    long = [*command, "--epochs", "2", "--test_every", "4000", "--save_every", "0.2", "--n_GPUs", "2"]
    process = start(long)
    wait_for(tmp_path / "run" / "log.txt", "[5/", process)
    os.kill(process.pid, signal.SIGTERM)  # the one that started the others passes it on
    status, lines = finish(process)
    assert status == 143 and not [line for line in lines if "Traceback" in line or line.startswith("W")]
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert any(f"stopped at iteration {state['iteration']};" in line for line in lines)

    process = start([*long, "--resume", "1"])
    wait_for(tmp_path / "run" / "log.txt", f"[{state['iteration'] + 5}/", process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    status, lines = finish(process)
    assert status == 2 and lines[-1].startswith("error: a process of the run was killed") and "--resume 1" in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["iteration"] >= state["iteration"]


def test_a_mistake_is_told_once(command, tmp_path):
    status, lines = finish(start(command, "--n_GPUs", "2", "--data_train", "Nowhere"))
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: no dataset Nowhere")
    status, lines = finish(start(command, "--n_GPUs", "2", "--lr", "1e30", "--epochs", "1"))
    assert status == 2 and [line for line in lines if line.startswith("error")] == [lines[-1]] and "not finite" in lines[-1]


def test_distributed_that_there_cannot_be_are_refused(run_main, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--n_GPUs 4: this machine has 1 GPUs; with --cpu"):
        distributed.launch(option.parse(["--n_GPUs", "4"]))
    status, _, err = run_main("train", " ".join([*command[1:], "--n_GPUs", "3"]))
    assert status == 2 and "--batch_size 4 cannot be divided evenly by --n_GPUs 3" in err[0]
    args = option.parse(["--batch_size", "6", "--split_batch", "3"])
    distributed.check_batch_divisible(args)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(UserError, match="6 images cannot be divided evenly among 4 processes x --split_batch 3"):
        distributed.check_batch_divisible(args)
