"""The shell scripts: what they call, with a stand-in for python that prints its arguments."""
import os
import re
import shutil
import subprocess
import sys

import pytest

import checkpoint
import loss
import option
import seed_statistics
from conftest import ROOT
from loss import adversarial, vqgan
from loss.adversarial import UNetDiscriminator
from model.edsr import EDSR
from model.rcan import RCAN
from model.swinir import SwinIR
from published import experiments
from system.errors import UserError


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


@pytest.mark.parametrize("script", ["train_rcan_SA_x4", "csd_edsr_x4_jt1", "dukd_edsr_x2"])
def test_a_training_script_passes_the_experiment_and_the_users_own_flags(checkout, script):
    ran = subprocess.run(["bash", str(checkout / "scripts" / f"{script}.sh"), "--data_train", "Sample", "--epochs", "3"],
                         capture_output=True, text=True, check=True, cwd="/", env={**os.environ, "LC_ALL": "C"})
    entry, *argv = ran.stdout.splitlines()
    args = option.parse(argv)
    assert entry == str(checkout / "code" / "train.py") and args.data_train == ["Sample"] and args.epochs == 3
    assert loss.parse(args.loss) and experiments()[args.published].script == script


EDSR_SIZES, RCAN_SIZES = dict(n_resblocks=2, n_feats=8), dict(n_resgroups=3, n_resblocks=1, n_feats=8, reduction=4)
SWINIR_SIZES = dict(depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], n_feats=8, window_size=4)


@pytest.mark.parametrize("script, kind, sizes, line", [
    ("train_rcan_SA_x4", RCAN, RCAN_SIZES, ""),
    ("csd_edsr_x4", EDSR, EDSR_SIZES, "--neg_num 1 --feature_net random"),
    ("dukd_edsr_x2", EDSR, EDSR_SIZES, ""),
    ("dckd_swinir_x4", SwinIR, SWINIR_SIZES, "--feature_net random"),
    ("mcadkd_swinir_x2", SwinIR, SWINIR_SIZES, "--nce_patches 2 --nce_patch_size 16"),
])
def test_a_script_of_each_method_trains(checkout, run_main, tiny_data, tmp_path, monkeypatch, script, kind, sizes, line):
    monkeypatch.setattr(checkpoint, "draw_curve", lambda *_: b"")  # takes longer than the training
    monkeypatch.setattr(vqgan, "F16_1024", dict(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attention=(4,),
                                                z_channels=8, embed_dim=8, n_embed=16))
    monkeypatch.setitem(adversarial.DISCRIMINATORS, "unet", lambda: UNetDiscriminator(4))
    scale = int(script[-1])
    checkpoint.save_model(kind(scale, **sizes), tmp_path / "teacher.pt")
    line += "".join(f" --{name} {value}" for name, value in sizes.items()).replace(", ", ",") if "csd" not in script else ""
    line += (f" --teacher {tmp_path / 'teacher.pt'} --ckp_dir {tmp_path / 'run'} --cpu --n_threads 0 --dir_data {tiny_data} "
             f"--data_train tiny --data_test tiny --epochs 2 --test_every 2 --batch_size 2 --patch_size {16 + 8 * scale}")
    ran = subprocess.run(["bash", str(checkout / "scripts" / f"{script}.sh"), *line.split()], capture_output=True, text=True,
                         check=True)
    status, out, _ = run_main("train", " ".join(ran.stdout.splitlines()[1:]))
    terms = option.parse(["--published", next(name for name in experiments() if experiments()[name].script == script)]).loss
    logged = next(text for text in out if text.startswith("[4/4] loss"))
    assert status == 0 and set(re.findall(r"[A-Z_]+", logged)) == set(loss.parse(terms))
    assert float((tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].split(",")[4]) > 0  # PSNR


def test_the_comparison_of_methods_passes_valid_flags(checkout):
    ran = subprocess.run(["bash", str(checkout / "scripts" / "compare_methods.sh"), "--scale", "2", "--epochs", "3"],
                         capture_output=True, text=True, check=True, cwd="/", env={**os.environ, "LC_ALL": "C.UTF-8"})
    *runs, table = ran.stdout.split("== ")[1:]
    found = {}
    for run in runs:
        title, entry, *argv = run.splitlines()
        assert entry == str(checkout / "code" / "train.py")
        found[title] = option.parse(argv)
    assert len(found) == 21
    for title, args in found.items():
        assert loss.parse(args.loss) and (args.epochs, args.decay, args.ema, args.lr) == (3, "cosine", 0.999, 2e-4), title
        assert args.ckp_dir == "compare_methods/" + title.replace(", seed ", "_") and args.resume == "auto"
    assert found["DUKD_inherit, seed 1"].init_from_teacher and found["DUKD_inherit, seed 1"].loss == "5*DS+1*TS"
    assert found["TS_cached, seed 3"].cache_teacher and found["TS_cached, seed 3"].seed == 3
    _, entry, *argv = table.splitlines()
    args = seed_statistics.parse(argv)
    assert entry == str(checkout / "code" / "seed_statistics.py")
    assert args.folder == checkout / "experiment" / "compare_methods"
    assert len(args.methods) == 7 and args.seeds == ["1", "2", "3"]


def test_the_comparison_takes_methods_and_seeds_from_the_environment(checkout):
    script = ["bash", str(checkout / "scripts" / "compare_methods.sh")]
    ran = subprocess.run(script, capture_output=True, text=True, check=True,
                         env={**os.environ, "METHODS": "TS FAKD", "SEEDS": "4"})
    assert [part.splitlines()[0] for part in ran.stdout.split("== ")[1:-1]] == ["TS, seed 4", "FAKD, seed 4"]
    assert ran.stdout.splitlines()[-5:] == ["--methods", "TS", "FAKD", "--seeds", "4"]
    ran = subprocess.run(script, capture_output=True, text=True, check=False,
                         env={**os.environ, "METHODS": "scratch magic"})
    assert ran.returncode == 2 and "unknown method magic; the methods are scratch" in ran.stderr and not ran.stdout


HEADER = "epoch,iteration,dataset,scale,psnr,ssim\n"


def write_metrics(folder, name, rows):
    (folder / name).mkdir()
    (folder / name / "metrics.csv").write_text(HEADER + rows)


def test_the_table_of_methods_has_mean_and_sample_standard_deviation(tmp_path):
    for method, values in {"A": (31, 32, 34.5), "B": (30, 30, 30)}.items():
        for seed, psnr in enumerate(values, 1):
            write_metrics(tmp_path, f"{method}_{seed}", "1,9,Set5,2,99,0.1\n1,9,Old,2,9,0.1\n"
                          f"2,18,Set5,2,{psnr},0.9{seed}\n2,18,B100,2,28,0.8\n")
    ran = subprocess.run([sys.executable, ROOT / "code" / "seed_statistics.py", tmp_path, "--methods", "A", "B", "--seeds",
                          "1", "2", "3"], capture_output=True, encoding="utf-8", check=True,
                         env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert ran.stdout == (tmp_path / "methods.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ran.stdout.splitlines()]
    assert rows[0] == ["method", "dataset", "PSNR (dB)", "SSIM", "seeds"]
    assert rows[2:] == [["A", "Set5", "32.500 ± 1.803", "0.9200 ± 0.0100", "3"],
                        ["A", "B100", "28.000 ± 0.000", "0.8000 ± 0.0000", "3"],
                        ["B", "Set5", "30.000 ± 0.000", "0.9200 ± 0.0100", "3"],
                        ["B", "B100", "28.000 ± 0.000", "0.8000 ± 0.0000", "3"]]
    lines = (tmp_path / "methods.csv").read_text().splitlines()
    assert lines[:3] == ["method,seed,dataset,psnr,ssim", "A,1,Set5,31.0000,0.91000", "A,1,B100,28.0000,0.80000"]
    assert len(lines) == 13


def test_a_run_that_diverged_is_part_of_the_table():
    rows = [("A", "1", "Set5", "nan", "0.1"), ("A", "2", "Set5", "30", "0.3")]
    assert "nan ± nan | 0.2000 ± 0.1414 | 2" in seed_statistics.to_markdown(rows)


def test_a_single_seed_has_no_standard_deviation(tmp_path):
    write_metrics(tmp_path, "A_1", "1,9,Set5,2,31.0,0.9\n")
    row = seed_statistics.to_markdown(seed_statistics.last_scores(tmp_path, "A", "1")).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["A", "Set5", "31.000", "0.9000", "1"]


@pytest.mark.parametrize("rows", ["", "1\n", "1,9,Set5,2,x,0.9\n", "1,9,Set5,2,30\n", None])
def test_a_run_without_scores_gets_one_line(rows, tmp_path):
    if rows is not None:
        write_metrics(tmp_path, "A_1", rows)
    with pytest.raises(UserError, match="--data_test") as caught:
        seed_statistics.last_scores(tmp_path, "A", "1")
    assert str(caught.value).startswith(f"{tmp_path / 'A_1' / 'metrics.csv'}: ") and "\n" not in str(caught.value)


def test_the_teacher_download_keeps_the_users_folder_and_flags(checkout):
    ran = subprocess.run(["bash", str(checkout / "scripts" / "download_teacher.sh"), "SwinIR_x2", "--dir", "here"],
                         capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout.splitlines() == [str(checkout / "code" / "download_teacher.py"), "SwinIR_x2", "--dir", "here"]
