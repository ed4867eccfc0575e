"""The shell scripts: what they call, with a stand-in for python that prints its arguments."""
import os
import shutil
import subprocess

import pytest

import loss
import option
from conftest import ROOT

TRAINING = sorted((ROOT / "scripts").glob("*_x[2348].sh"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout whose .venv looks installed and whose python prints what it is called with, an argument a line."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / ".venv" / "bin").mkdir(parents=True)
    requirements = b"".join(file.read_bytes() for file in sorted(ROOT.glob("requirements*.txt")))
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, root)
        (root / ".venv" / f"installed-{file.name}").write_bytes(requirements)
    python = root / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    return root


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.stem)
def test_a_training_script_passes_valid_flags_and_the_users_own(checkout, script):
    ran = subprocess.run(["bash", str(checkout / "scripts" / script.name), "--data_train", "Sample", "--epochs", "3"],
                         capture_output=True, text=True, check=True, cwd="/", env={**os.environ, "LC_ALL": "C"})
    entry, *argv = ran.stdout.splitlines()
    args = option.parse(argv)
    assert entry == str(checkout / "code" / "train.py") and args.data_train == ["Sample"] and args.epochs == 3
    assert loss.parse(args.loss)
    scale = int(script.stem.rpartition("_x")[2])
    assert args.scale == scale and args.patch_size == 48 * scale
    network = next(name for name in option.NETWORKS if f"_{name.lower()}_" in script.stem)
    assert args.model == network and args.teacher == [network]
    if script.stem.startswith("train_"):
        assert args.loss == ("1*DS" if "baseline" in script.stem else "0.5*DS+0.5*TS+10*SA")
    names = [name for _, name in args.upcycle]
    if script.stem.startswith("dukd_"):
        assert (args.loss, args.n_zoom_in, names) == {
            "EDSR": ("5*DS+1*TS", 2, ["zoom_in", "zoom_out"]), "RCAN": ("1*DS+1*TS", 1, ["zoom_in"]),
            "SwinIR": ("5*DS+1*TS", 1, ["zoom_in"])}[network]
        assert (args.label_consistency, args.ema, args.betas, args.batch_size) == (0.3, 0.999, (0.9, 0.99), 16)
        assert (args.lr, args.decay, args.gamma) == (1e-4, [100_000, 200_000], 0.1) and args.epochs == 3
    if script.stem.startswith("dckd_star"):
        assert "DCR" in args.loss and names == ["zoom_in"] and args.view_terms == ["TS"]
    elif script.stem.startswith("dckd"):
        assert "DCR" in args.loss and not names


def test_there_is_a_script_for_each_published_fakd_experiment():
    names = {script.stem for script in TRAINING}
    assert names >= {f"train_{net}_{kind}_x{scale}" for net in ("rcan", "edsr") for kind in ("SA", "baseline")
                     for scale in (2, 3, 4, 8)}
    assert names >= {f"train_san_{kind}_x{scale}" for kind in ("SA", "baseline") for scale in (2, 3, 4)}


def test_there_is_a_script_for_each_experiment_with_upcycled_data():
    names = {script.stem for script in TRAINING}
    assert names >= {f"dukd_{net}_x{scale}" for net in ("edsr", "rcan", "swinir") for scale in (2, 3, 4)}
    assert names >= {f"dckd_star_{net}_x{scale}" for net in ("rcan", "swinir") for scale in (2, 3, 4)}


def test_the_comparison_of_methods_passes_valid_flags_and_tabulates(checkout):
    metrics = checkout / "experiment" / "compare_methods" / "TS_2" / "metrics.csv"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    header = "epoch,iteration,dataset,scale,psnr,ssim\n"
    metrics.write_text(header + "1,9,Set5,2,30.0,0.9\n2,18,Set5,2,31.0,0.9\n")
    (metrics.parent / "state.pt").touch()
    (checkout / "experiment" / "compare_methods" / "TS_1").mkdir(exist_ok=True)
    (metrics.parent.parent / "TS_1" / "metrics.csv").write_text(header + "2,18,Set5,2,32.0,0.9\n")
    ran = subprocess.run(["bash", str(checkout / "scripts" / "compare_methods.sh"), "--scale", "2", "--epochs", "3"],
                         capture_output=True, text=True, check=True, cwd="/", env={**os.environ, "LC_ALL": "C"})
    *runs, table = ran.stdout.split("== ")[1:]
    found = {}
    for run in runs:
        title, entry, *argv = run.splitlines()
        assert entry == str(checkout / "code" / "train.py")
        found[title] = option.parse(argv)
    assert len(found) == 21 and table.splitlines()[1] == "TS             Set5       31.500 +- 0.500  2"
    for title, args in found.items():
        assert loss.parse(args.loss) and (args.epochs, args.decay, args.ema, args.lr) == (3, "cosine", 0.999, 2e-4), title
        assert args.ckp_dir == "compare_methods/" + title.replace(", seed ", "_")
        assert args.resume == (title == "TS, seed 2")
    assert found["DUKD_inherit, seed 1"].init_from_teacher and found["DUKD_inherit, seed 1"].loss == "5*DS+1*TS"
    assert found["TS_cached, seed 3"].cache_teacher and found["TS_cached, seed 3"].seed == 3
    ran = subprocess.run(["bash", str(checkout / "scripts" / "compare_methods.sh")], capture_output=True, text=True,
                         check=False, env={**os.environ, "METHODS": "scratch magic"})
    assert ran.returncode == 2 and "there is no magic" in ran.stderr and not ran.stdout


def test_the_teacher_download_keeps_the_users_folder_and_flags(checkout):
    ran = subprocess.run(["bash", str(checkout / "scripts" / "download_teacher.sh"), "SwinIR_x2", "--dir", "here"],
                         capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout.splitlines() == [str(checkout / "code" / "download_teacher.py"), "SwinIR_x2", "--dir", "here"]
