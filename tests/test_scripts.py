"""The shell scripts: what they call, with a stand-in for python that prints its arguments."""
import os
import shutil
import subprocess

import pytest
from conftest import ROOT

import loss
import option

TRAINING = sorted((ROOT / "scripts").glob("train_*.sh"))


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
    if script.stem.split("_")[1] in ("rcan", "edsr", "san"):
        assert args.model == script.stem.split("_")[1].upper()
        assert args.loss == ("1*DS" if "baseline" in script.stem else "0.5*DS+0.5*TS+10*SA")


def test_there_is_a_script_for_each_published_fakd_experiment():
    names = {script.stem for script in TRAINING}
    assert names >= {f"train_{net}_{kind}_x{scale}" for net in ("rcan", "edsr") for kind in ("SA", "baseline")
                     for scale in (2, 3, 4, 8)}
    assert names >= {f"train_san_{kind}_x{scale}" for kind in ("SA", "baseline") for scale in (2, 3, 4)}


def test_the_teacher_download_keeps_the_users_folder_and_flags(checkout):
    ran = subprocess.run(["bash", str(checkout / "scripts" / "download_teacher.sh"), "SwinIR_x2", "--dir", "here"],
                         capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout.splitlines() == [str(checkout / "code" / "download_teacher.py"), "SwinIR_x2", "--dir", "here"]
