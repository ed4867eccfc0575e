"""Restoration at scale 1: data in paired folders, training, tests and comparisons, and trainings with growing patches."""
import csv
import shutil
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import loss
import option
import system.errors
from checkpoint import save_model
from data import Crops, Images, dataset
from data.source import find
from data.views import plan
from distiller import build_distiller
from loss import adversarial, vqgan
from metric import psnr
from model import load_model, make_model, slim
from model.edsr import EDSR
from option_types import crop_stages
from trainer import Trainer

TINY = "--model EDSR --n_resblocks 1 --n_feats 4 --cpu --n_threads 0"


def noisy(image, seed):
    """Add noise of sigma 25 to a uint8 image."""
    noise = np.random.RandomState(seed).normal(0, 25, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, tiny_data):
    """A data root with `rain/train` and `rain/test`, each with the folders input and target of the tiny images."""
    root = tmp_path_factory.mktemp("pairs")
    for part in ("train", "test"):
        for file in sorted((tiny_data / "tiny" / "HR").iterdir())[:4 if part == "train" else 2]:
            image = iio.imread(file)
            for folder, content in (("input", noisy(image, int(file.stem))), ("target", image)):
                (root / "rain" / part / folder).mkdir(parents=True, exist_ok=True)
                iio.imwrite(root / "rain" / part / folder / file.name, content)
    return root


@pytest.fixture
def experiments(monkeypatch, tmp_path):
    """A folder for runs in place of experiment/; returns function(line) of a tiny training's flags."""
    monkeypatch.setattr("checkpoint.draw_curve", lambda *_: b"")  # takes longer than the training
    for module in ("checkpoint", "option"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    return tmp_path / "experiment"


def flags(root, line=""):
    return f"--scale 1 --pair_dirs input/target --dir_data {root} --data_train rain --data_test rain {TINY} {line}"


def parsed(root, line):
    return option.parse(f"--dir_data {root} {line}".split())


def write(folder, *names, size=(24, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        iio.imwrite(folder / name, np.full((*size, 3), len(name), np.uint8))


# ---- paired folders

@pytest.mark.parametrize("place, name, train", [
    ("A/train", "A", True), ("A/test", "A", False), ("A", "A", True), ("benchmark/A", "A", False), ("train/A", "A", True),
    ("test/A", "A", False), ("A/x", "A/x", True)])
def test_folders_of_pairs_are_found(place, name, train, tmp_path):
    for folder in ("input", "target"):
        write(tmp_path / place / folder, "1.png", "2.png")
    (pair, _) = find(name, parsed(tmp_path, "--pair_dirs b/s+input/target"), train).pairs
    assert (pair.name, pair.lr, pair.hr) == ("1", *(tmp_path / place / folder / "1.png" for folder in ("input", "target")))


def test_a_test_is_not_made_on_the_training_set(tmp_path):
    for folder in ("blur", "sharp"):
        write(tmp_path / "A" / "train" / folder, "1.png")
    with pytest.raises(system.errors.UserError, match="no dataset A with the folders of --pair_dirs blur/sharp: looked in "):
        find("A", parsed(tmp_path, "--pair_dirs blur/sharp"), train=False)


def test_sequences_of_a_video_are_joined_and_cached_apart(tmp_path):
    for number, sequence in enumerate(("S1", "S2")):
        for folder in ("blur", "sharp"):
            write(tmp_path / "A" / "train" / sequence / folder, "000.png", size=(24 + number, 20 + len(folder)))
    shutil.copytree(tmp_path / "A" / "train" / "S2" / "blur", tmp_path / "A" / "train" / "S2" / "sharp", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "A" / "train" / "S1" / "sharp", tmp_path / "A" / "train" / "S1" / "blur", dirs_exist_ok=True)
    args = parsed(tmp_path, "--pair_dirs blur/sharp --scale 1")
    for _ in range(2):  # decoded, then from the cache
        images = Images("A", args, train=True)
        images.prepare()
        assert [pair.name for pair in images.pairs] == ["S1_000", "S2_000"]
        assert [images.hr(index).shape for index in (0, 1)] == [(24, 25, 3), (25, 24, 3)]


@pytest.mark.parametrize("lr, hr, name", [
    ("Canon_001_LR4.png", "Canon_001_HR.png", "Canon_001"), ("rain-001.png", "norain-001.png", "001"),
    ("0001_NOISY_SRGB_010.PNG", "0001_GT_SRGB_010.PNG", "0001_SRGB_010"), ("0_rain.png", "0_clean.jpg", "0"),
    ("0001x4.png", "0001.png", "0001"), ("7.jpg", "7.png", "7")])
def test_names_are_paired_by_the_conventions_of_the_datasets(lr, hr, name, tmp_path):
    for folder, file in (("LR", lr), ("HR", hr)):
        write(tmp_path / "A" / folder, file)
    (pair,) = find("A", parsed(tmp_path, "--pair_dirs LR/HR"), train=True).pairs
    assert (pair.name, pair.lr.name, pair.hr.name) == (name, lr, hr)


@pytest.mark.parametrize("inputs, targets, words", [
    (["1.png", "2.png"], ["1.png"], "input/2.png: no image of that name in .*target; complete the pair, or remove it"),
    (["1.png"], ["1.png", "2.png"], "target/2.png: no image of that name in .*input; complete"),
    (["a_1_rain.png"], ["b_1_clean.png"], "a_1_rain.png: no image of that name"),
    (["rain-1.png", "rainy-1.png"], ["clean-1.png"], "the same name"), (["1.png", "1.jpg"], ["1.png"], "the same name"),
    ([], ["1.png"], "no images there"), (["1.png"], None, "no such folder; training needs the ground truth")])
def test_pairs_that_are_incomplete_get_one_line(inputs, targets, words, tmp_path):
    write(tmp_path / "A" / "input", *inputs)
    if targets is not None:
        write(tmp_path / "A" / "target", *targets)
    with pytest.raises(system.errors.UserError, match=words):
        find("A", parsed(tmp_path, "--pair_dirs input/target"), train=True)


@pytest.mark.parametrize("value", ["input", "a/b/c", "../x", "a/..", "a/.", "/b", "a/", "a/b+", "a/a", "+", " /b"])
def test_pair_dirs_are_names_of_two_folders(value, capsys):
    with pytest.raises(SystemExit) as ended:
        option.parse([f"--pair_dirs={value}"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "--pair_dirs" in err and "input/target" in err and err.count("\n") == 1


def test_pairs_of_two_sizes_are_for_the_scale_between_them(tmp_path):
    write(tmp_path / "A" / "LR", "1_LR2.png", size=(24, 20))
    write(tmp_path / "A" / "HR", "1_HR.png", size=(48, 40))
    images = Images("A", parsed(tmp_path, "--pair_dirs LR/HR --scale 2"), train=True)
    assert images.prepare() == [(48, 40)] and images.lr(0).shape == (24, 20, 3)
    with pytest.raises(system.errors.UserError, match=r"20 x 24 pixels do not match the 40 x 48 of .*at scale 1"):
        Images("A", parsed(tmp_path, "--pair_dirs LR/HR --scale 1"), train=True).prepare()


# ---- crops and batches that grow

STAGES = "16/8@0,24/4@3,32/2@50%"  # of 10 iterations


def test_stages_in_iterations_and_percent():
    args = option.parse(f"--progressive {STAGES} --epochs 2 --test_every 5 --scale 2".split())
    assert crop_stages(args) == [(0, 0, 16, 8), (3, 24, 24, 4), (5, 32, 32, 2)]
    assert (args.patch_size, args.batch_size) == (16, 2)  # the smallest: what terms and views require
    args = option.parse(["--progressive", "16/8@0,24/4@3", "--epochs", "1", "--test_every", "3"])
    assert crop_stages(args) == [(0, 0, 16, 8)]


@pytest.mark.parametrize("line, words", [
    ("--progressive 16/8", "PATCH/BATCH@ITERATION"), ("--progressive 16/8@1", "the first of them @0"),
    ("--progressive 16/8@0,24/4@0", "the first of them @0"), ("--progressive 16/8@0,,24/4@5", "not of the form"),
    ("--progressive 16/8@0,24/4@5,32/2@4", "begins at iteration 4, which must be after 5"),
    ("--progressive 16/8@0,24/4@1% --epochs 1 --test_every 10", "begins at iteration 0"),
    ("--progressive 16/8@0,24/4@100%", "not of the form"), ("--progressive 0/8@0", "whole number in 1"),
    ("--progressive 16/8@0,22/4@5", "crops of 22 (HR pixels) is not a multiple of --scale 4"),
    ("--progressive 16/8@0,24/2@5 --split_batch 4", "batches of 2 cannot be divided evenly"),
    ("--progressive 16/8@0 --patch_size 16", "--patch_size cannot be combined with --progressive"),
    ("--progressive 16/8@0 --batch_size 8 --patch_size 8", "--patch_size and --batch_size cannot")])
def test_stages_that_cannot_be_get_one_line(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        option.parse(line.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_of_stages_use_each_crop_once_from_any_start(parts):
    stages = crop_stages(option.parse(f"--progressive {STAGES} --epochs 2 --test_every 5 --scale 2".split()))

    def batches(start, stop):
        shards = [list(dataset.Batches(start, stop, stages, part, parts)) for part in range(parts)]
        return [[number for shard in batch for number in shard] for batch in zip(*shards)]

    whole = batches(0, 10)
    assert [len(batch) for batch in whole] == [8, 8, 8, 4, 4, 2, 2, 2, 2, 2]
    assert [number for batch in whole for number in batch] == list(range(42))
    assert all(batches(start, 10) == whole[start:] and batches(0, start) == whole[:start] for start in range(11))


def test_a_crop_has_the_size_of_its_stage(tiny_data):
    line = f"--progressive {STAGES} --epochs 2 --test_every 5 --scale 2 --data_train tiny"
    crops = Crops(parsed(tiny_data, line))
    assert [crops[number][1].shape[1] for number in (0, 23, 24, 31, 32, 41)] == [16, 16, 24, 24, 32, 32]
    assert all(2 * lr.shape[1] == hr.shape[1] for lr, hr in (crops[number] for number in (0, 24, 32)))
    with pytest.raises(system.errors.UserError, match=r"--progressive: a crop of 72 .HR pixels. is larger than"):
        Crops(parsed(tiny_data, line.replace("32/2@50%", "72/2@50%")))


def test_a_run_interrupted_in_a_stage_and_resumed_ends_bit_identical(pairs, experiments, run_main, monkeypatch, tmp_path):
    save_model(make_model("EDSR", parsed(pairs, f"--scale 1 {TINY}")), tmp_path / "teacher.pt")
    line = flags(pairs, "--progressive 16/8@0,24/4@2,32/2@67% --split_batch 2 --optimizer ADAMW --lr 1e-3 --decay cosine "
                        "--decay_from 2 --lr_end 1e-6 --weight_decay 1e-3 --grad_norm 0.01 --test_every 3 "
                        f"--loss 1*DS_PSNR+1*TS --cache_teacher --teacher {tmp_path / 'teacher.pt'} "
                        f"--dir_cache {tmp_path / 'cache'}")
    assert run_main("train", f"{line} --epochs 2 --ckp_dir whole")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "interrupted", lambda trainer: 143 * (trainer.iteration == 3))
        assert run_main("train", f"{line} --epochs 2 --ckp_dir parts")[0] == 143
    assert run_main("train", f"{line} --epochs 2 --ckp_dir parts --resume 1")[0] == 0
    weights = [torch.load(experiments / name / "state.pt", weights_only=True)["student"] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ---- scale 1

@pytest.mark.parametrize("name", ["Sample", "tiny"])
def test_hr_is_no_input(name, tiny_data):
    with pytest.raises(system.errors.UserError, match=f"--scale 1: {name} has no degraded images.*--pair_dirs.*--degrade"):
        find(name, parsed(tiny_data, "--scale 1"), train=True)


@pytest.mark.parametrize("line, words", [
    ("--upcycle 1*zoom_in", "--upcycle needs a scale of 2"), ("--template DUKD", "where a preset such as DUKD"),
    ("--published DUKD/EDSR/x2", "--upcycle needs"), ("--eco", "--eco needs a scale of 2")])
def test_changes_of_scale_are_refused(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        option.parse(["--scale", "1", *line.split()])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and words in err and err.count("\n") == 1
    assert option.parse(["--scale", "1", "--template", "DUKD", "--upcycle="]).scale == 1


@pytest.mark.parametrize("name", ["EDSR", "RCAN", "CARN", "IMDN", "Compact", "SPAN", "SAN", "SwinIR"])
def test_networks_at_scale_1(name, tmp_path):
    small = "--n_resblocks 1 --n_resgroups 3 --n_feats 16 --reduction 4 --depths 1,1 --num_heads 2,2"
    net = make_model(name, option.parse(f"--scale 1 --model {name} {small}".split()))
    save_model(net, tmp_path / "net.pt")
    x = 255 * torch.rand(1, 3, 11, 13)
    assert torch.equal(load_model(tmp_path / "net.pt")(x), net(x)) and net(x).shape == x.shape


def test_a_network_without_scale_1_gets_one_line():
    with pytest.raises(system.errors.UserError, match="RDN: there is no RDN for scale 1"):
        make_model("RDN", option.parse(["--scale", "1"]))


def test_training_at_scale_1_end_to_end(pairs, experiments, run_main, tmp_path):
    teacher = make_model("SwinIR", parsed(pairs, "--scale 1 --depths 1 --num_heads 2 --n_feats 8 --window_size 4"))
    save_model(teacher, tmp_path / "teacher.pt")
    line = flags(pairs, f"--teacher {tmp_path / 'teacher.pt'} --epochs 2 --test_every 2 --patch_size 24 --batch_size 2 "
                        "--loss 1*DS+1*TS+1*LC+1*NCE+10*SA --features [1,2] --nce_patch_size 16 --ckp_dir run")
    assert run_main("train", line)[0] == 0
    rows = list(csv.DictReader((experiments / "run" / "metrics.csv").open()))
    assert [row["dataset"] for row in rows] == ["rain", "rain"]

    path = experiments / "run" / "model" / "model_latest.pt"
    status, out, _ = run_main("test", f"--ckp_path {path} --data_test rain --dir_data {pairs} --pair_dirs input/target "
                                        "--cpu --save_results --chop --ckp_dir tested")
    assert status == 0 and len(list((experiments / "tested" / "results-rain").glob("*_x1_SR.png"))) == 2
    assert float(out[-2].split()[2]) == pytest.approx(float(rows[-1]["psnr"]), abs=1e-3)



def test_training_and_test_on_degraded_hr(tiny_data, experiments, run_main, tmp_path):
    line = (f"--scale 1 --degrade noise25 --metric_space rgb --dir_data {tiny_data} --dir_cache {tmp_path / 'cache'} "
            f"--data_train tiny --data_test tiny {TINY} --loss 1*DS --epochs 1 --test_every 2 --patch_size 24 "
            "--batch_size 2")
    assert run_main("train", f"{line} --ckp_dir run")[0] == 0
    path = experiments / "run" / "model" / "model_latest.pt"
    assert run_main("compare", f"{line.partition('--model')[0]} --ckp_path a={path} --cpu --ckp_dir c")[0] == 0
    first = next(csv.DictReader((experiments / "c" / "compare.csv").open()))
    assert first["network"] == "input" and 20 < float(first["psnr"]) < 21  # 20.17 dB without the clipped values


def test_comparison_and_figures_name_the_input(pairs, experiments, run_main, tmp_path):
    save_model(make_model("EDSR", parsed(pairs, f"--scale 1 {TINY}")), tmp_path / "a.pt")
    line = f"--ckp_path a={tmp_path / 'a.pt'} --data_test rain --dir_data {pairs} --pair_dirs input/target --cpu "
    assert run_main("compare", f"{line} --ckp_dir c")[0] == 0
    first = next(csv.DictReader((experiments / "c" / "compare.csv").open()))
    folder = pairs / "rain" / "test"
    expected = [psnr(iio.imread(folder / "input" / name), iio.imread(folder / "target" / name), 0)
                for name in ("0.png", "1.png")]
    assert first["network"] == "input" and float(first["psnr"]) == pytest.approx(np.mean(expected), abs=1e-3)
    assert run_main("visualize", f"{line} --teacher {tmp_path / 'a.pt'} --crop 16 --ckp_dir v")[0] == 0
    status, _, err = run_main("compare", line.replace("a=", "input="))
    assert status == 2 and "the label input is in use for the input itself" in err[0]


def test_inputs_without_ground_truth_give_images_and_no_scores(pairs, experiments, run_main, tmp_path):
    write(tmp_path / "real" / "input", "1.png")
    save_model(make_model("EDSR", parsed(pairs, f"--scale 1 {TINY}")), tmp_path / "a.pt")
    status, out, _ = run_main("test", f"--ckp_path {tmp_path / 'a.pt'} --data_test real --dir_data {tmp_path} --cpu "
                                        "--pair_dirs input/target --ckp_dir t")
    assert status == 0 and any(line.split()[:4] == ["real", "1", "-", "-"] for line in out)
    assert (experiments / "t" / "results-real" / "1_x1_SR.png").exists()


def test_costs_at_scale_1(run_main):
    status, out, err = run_main("summary", "--model Compact --scale 1 --n_feats 4 --n_convs 1 --output_size 40x30")
    assert (status, err) == (0, []) and "x1" in out[1]



# ---- terms of the loss at scale 1

STEP = "--scale 1 --patch_size 32 --batch_size 4 --feature_net random --epochs 1 --test_every 1 --n_threads 0 --cpu "


@pytest.mark.parametrize("line", [
    "--loss 0.5*DS+0.5*TS+10*SA+1*CA+1*FSP", "--loss 1*DS+200*CSD --neg_num 2", "--loss 1*DS+1*TS+1*T_DS --width_mult 0.5",
    "--loss 1*DS+1*TS+1*LC+25.5*DCR+0.255*DMM --dcr_negatives 1 --dcr_blur 0.5 --dcr_resize 0.5",
    "--loss 3*DS+0.5*TS+12.75*NCE+2.55*GAN --gan_net unet --gan_update before --nce_patches 3 --nce_patch_size 16",
    "--loss 1*DS_PSNR+1*TS_PSNR --label_consistency 0.5"])
def test_the_terms_of_all_methods_train_a_student(line, monkeypatch):
    monkeypatch.setattr(vqgan, "F16_1024", dict(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attention=(4,),
                                                z_channels=8, embed_dim=8, n_embed=16))
    monkeypatch.setitem(adversarial.DISCRIMINATORS, "unet", lambda: adversarial.UNetDiscriminator(4))
    torch.manual_seed(0)
    args = option.parse([*STEP.split(), *line.split()])
    teacher = EDSR(1, n_resblocks=3, n_feats=8)
    student = slim(teacher, args.width_mult) if args.width_mult else EDSR(1, n_resblocks=3, n_feats=8)
    criterion = loss.build_loss(args.loss, loss.Context(args, student, [teacher], "cpu", plan(args)))
    trainer = Trainer(args, build_distiller(args, student, [teacher], criterion), None, [], SimpleNamespace(state=None),
                      torch.device("cpu"))
    before = {name: x.clone() for name, x in student.state_dict().items()}
    values = trainer.step(*(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8) for _ in range(2)))
    assert values.isfinite().all() and (values != 0).all()
    assert all(not torch.equal(before[name], x) for name, x in student.named_parameters() if x.requires_grad)
