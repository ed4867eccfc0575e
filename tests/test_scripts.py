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
from data.image import read_image
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
    assert status == 0 and set(re.findall(r"[A-Z_]+", logged)) == set(*loss.parse(terms))
    assert float((tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].split(",")[4]) > 0  # PSNR


def comparison(checkout, *flags, **environment):
    """Run compare_methods.sh with a python that prints its arguments; return its parts, titles and arguments."""
    ran = subprocess.run(["bash", str(checkout / "scripts" / "compare_methods.sh"), *flags], capture_output=True, text=True,
                         check=False, cwd="/", env={**os.environ, "LC_ALL": "C.UTF-8", **environment})
    return ran, [part.splitlines() for part in ran.stdout.split("== ")[1:]]


def test_the_comparison_of_methods_passes_valid_flags(checkout):
    _, parts = comparison(checkout, "--scale", "2", "--epochs", "3", "--teacher", "my_teacher.pt", "--template",
                          "Compact_S")
    *runs, (_, compare, *compare_flags), (_, entry, *argv) = parts
    found = {}
    for title, train, *flags in runs:
        assert train == str(checkout / "code" / "train.py")
        found[title] = args = option.parse(flags)
        assert loss.parse(args.loss) and (args.epochs, args.decay, args.ema, args.lr) == (3, "cosine", 0.999, 2e-4), title
        assert (args.model, args.n_convs) == ("Compact", 4) and not args.width_mult, title
        assert args.ckp_dir == "compare_methods/" + title.replace(", seed ", "_") and args.resume == "auto"
    assert len(found) == 30
    assert found["TS_cached, seed 3"].cache_teacher and found["TS_cached, seed 3"].seed == 3
    assert [title for title, args in found.items() if args.feature_net == "random" and args.seed == 1] == [
        "CSD, seed 1", "DCKD, seed 1"]
    assert compare == str(checkout / "code" / "compare.py")
    assert option.parse(compare_flags, training=False).ckp_path == "teacher=my_teacher.pt"
    args = seed_statistics.parse(argv)
    assert entry == str(checkout / "code" / "seed_statistics.py")
    assert args.folder == checkout / "experiment" / "compare_methods"
    assert len(args.methods) == 10 and args.seeds == ["1", "2", "3"] and args.random_features == ["CSD", "DCKD"]


def test_the_comparison_takes_methods_and_seeds_from_the_environment(checkout):
    _, parts = comparison(checkout, METHODS="TS FAKD", SEEDS="4")
    assert [title for title, *_ in parts[:-2]] == ["TS, seed 4", "FAKD, seed 4"]
    assert seed_statistics.parse(parts[-1][2:]).methods == ["TS", "FAKD"]
    ran, _ = comparison(checkout, METHODS="scratch magic")
    assert ran.returncode == 2 and "unknown method magic; the methods are scratch" in ran.stderr and not ran.stdout


def test_the_comparison_at_equal_time_measures_the_time_of_an_iteration_first(checkout, tmp_path):
    """The python of this checkout prints 1000 iterations for seed_statistics.py --iterations_in."""
    root = shutil.copytree(checkout, tmp_path / "checkout")
    (root / ".venv" / "bin" / "python").write_text(
        '#!/bin/sh\ncase "$*" in *--iterations_in*) echo 1000 ;; -c*) ;; *) printf "%s\\n" "$@" ;; esac\n')
    _, parts = comparison(root, "--scale", "2", METHODS="scratch FAKD", SEEDS="1", MINUTES="5")
    titles = [title for title, *_ in parts[:-2]]
    assert titles == ["scratch, time of an iteration", "FAKD, time of an iteration", "scratch, seed 1", "FAKD, seed 1"]
    trial, run = (option.parse(parts[index][2:]) for index in (1, 3))
    assert trial.ckp_dir == "compare_methods_5min/rate/FAKD" and trial.epochs * trial.test_every == 80
    assert run.ckp_dir == "compare_methods_5min/FAKD_1" and (run.epochs, run.test_every) == (5, 201)


def write_run(folder, name, scores, images=None, seconds=60.0):
    """Write the tables of a run: scores {dataset: (psnr, ssim)} of its last epoch, images {dataset: {image: psnr}}."""
    run = folder / name
    run.mkdir()
    rows = "".join(f"1,9,{dataset},2,99,0.1\n" for dataset in [*scores, "Old"])
    rows += "".join(f"2,18,{dataset},2,{psnr},{ssim}\n" for dataset, (psnr, ssim) in scores.items())
    (run / "metrics.csv").write_text("epoch,iteration,dataset,scale,psnr,ssim\n" + rows)
    images = images or {dataset: {"a": psnr} for dataset, (psnr, _) in scores.items()}
    rows = "".join(f"{model},1,{dataset},2,{image},{value},0.9\n" for dataset, values in images.items()
                   for image, psnr in values.items() for model, value in (("model_best.pt", 99), ("model_latest.pt", psnr)))
    (run / "images.csv").write_text("checkpoint,epoch,dataset,scale,image,psnr,ssim\n" + rows)
    (run / "time.csv").write_text(f"epoch,iteration,seconds\n1,9,{seconds / 2}\n2,18,{seconds}\n")


def test_the_table_of_methods_has_mean_and_sample_standard_deviation(tmp_path):
    for method, values in {"A": (31, 32, 34.5), "B": (30, 30, 30)}.items():
        for seed, psnr in enumerate(values, 1):
            write_run(tmp_path, f"{method}_{seed}", {"Set5": (psnr, f"0.9{seed}"), "B100": (28, 0.8)})
    (tmp_path / "compare.csv").write_text("network,dataset,psnr\n" + "".join(
        f"bicubic,{dataset} x2,25\nteacher,{dataset} x2,38\n" for dataset in ("Set5", "B100")))
    ran = subprocess.run([sys.executable, ROOT / "code" / "seed_statistics.py", tmp_path, "--methods", "B", "A", "--seeds",
                          "1", "2", "3", "--random_features", "A"], capture_output=True, encoding="utf-8", check=True,
                         env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert ran.stdout == (tmp_path / "methods.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ran.stdout.splitlines()]
    assert rows[0] == list(seed_statistics.TITLES)
    assert rows[2:] == [["A (random features)", "Set5", "32.500 ± 1.803", "0.9200 ± 0.0100", "3", "1.0", "-"],
                        ["B", "Set5", "30.000 ± 0.000", "0.9200 ± 0.0100", "3", "1.0", "-2.500 [-4.500, -1.000]"],
                        ["B", "B100", "28.000 ± 0.000", "0.8000 ± 0.0000", "3", "1.0", "-"],
                        ["A (random features)", "B100", "28.000 ± 0.000", "0.8000 ± 0.0000", "3", "1.0",
                         "0.000 [0.000, 0.000]"]]
    lines = (tmp_path / "methods.csv").read_text().splitlines()
    assert lines[:3] == ["method,seed,dataset,psnr,ssim,seconds", "B,1,Set5,30.0000,0.91000,60.0",
                         "B,1,B100,28.0000,0.80000,60.0"]
    assert len(lines) == 13
    for name in ("methods_gap.png", "methods_time.png"):
        assert read_image(tmp_path / name)[0].shape[0] > 100


def test_the_bootstrap_is_paired():
    """Images differ by far more than the methods do: only a comparison image by image finds the difference."""
    names = [str(number) for number in range(12)]

    def runs(shift):
        return [seed_statistics.Run("A", seed, "Set14", 0, 0, 0, {name: 20 + 2 * int(name) + shift + 0.01 * (int(name) % 3)
                                                                  for name in names}) for seed in "12"]
    mean, low, high = (float(word.strip("[],")) for word in seed_statistics.bootstrap(runs(-0.05), runs(0)).split())
    assert low <= mean == -0.05 <= high < 0


def test_a_run_that_diverged_is_part_of_the_table():
    rows = [seed_statistics.Run("A", seed, "Set5", psnr, ssim, 0, {"a": psnr})
            for seed, psnr, ssim in (("1", float("nan"), 0.1), ("2", 30, 0.3))]
    assert "nan ± nan | 0.2000 ± 0.1414 | 2" in seed_statistics.to_markdown(rows)


def test_a_single_seed_has_no_standard_deviation(tmp_path):
    write_run(tmp_path, "A_1", {"Set5": (31.0, 0.9)})
    row = seed_statistics.to_markdown(seed_statistics.last_test(tmp_path, "A", "1")).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["A", "Set5", "31.000", "0.9000", "1", "1.0", "-"]


def test_the_iterations_in_a_time_follow_from_the_fastest_epoch_but_the_first(tmp_path, capsys):
    (tmp_path / "time.csv").write_text("epoch,iteration,seconds\n1,20,2\n2,40,22\n3,60,32\n4,80,48\n")
    assert seed_statistics.seconds_per_iteration(tmp_path) == 0.5
    ran = subprocess.run([sys.executable, ROOT / "code" / "seed_statistics.py", tmp_path, "--iterations_in", "1.5"],
                         capture_output=True, text=True, check=True)
    assert ran.stdout == "180\n"
    (tmp_path / "time.csv").write_text("epoch,iteration,seconds\n1,20,2\n")
    with pytest.raises(UserError, match="a single epoch"):
        seed_statistics.seconds_per_iteration(tmp_path)


@pytest.mark.parametrize("rows", ["", "1\n", "1,9,Set5,2,x,0.9\n", "1,9,Set5,2,30\n", None])
def test_a_run_without_scores_gets_one_line(rows, tmp_path):
    write_run(tmp_path, "A_1", {"Set5": (31.0, 0.9)})
    if rows is None:
        (tmp_path / "A_1" / "metrics.csv").unlink()
    else:
        (tmp_path / "A_1" / "metrics.csv").write_text("epoch,iteration,dataset,scale,psnr,ssim\n" + rows)
    with pytest.raises(UserError, match=r"--data_test|no number") as caught:
        seed_statistics.last_test(tmp_path, "A", "1")
    assert str(caught.value).startswith(str(tmp_path / "A_1")) and "\n" not in str(caught.value)


def test_the_teacher_download_keeps_the_users_folder_and_flags(checkout):
    ran = subprocess.run(["bash", str(checkout / "scripts" / "download_teacher.sh"), "SwinIR_x2", "--dir", "here"],
                         capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout.splitlines() == [str(checkout / "code" / "download_teacher.py"), "SwinIR_x2", "--dir", "here"]
