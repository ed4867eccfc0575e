"""The published experiments: settings and scores typed from the papers and their code, scripts, presets, comparisons."""
import csv
import re
import subprocess
import sys

import pytest
import torch

import option
import published
from checkpoint import save_model
from conftest import ROOT
from model import make_model
from model.edsr import EDSR
from published import comparison, experiments
from reference.dukd import make_step
from released import TEACHERS
from schedule import learning_rate
from template import TEMPLATES

TRAININGS = [name for name, experiment in experiments().items() if experiment.script]
K = 1000


def parse(line):
    return option.parse(line.split())


# ---- numbers that do not come from the table: the papers' and their published settings

@pytest.mark.parametrize("name, line", [
    ("FAKD/RCAN/x4", "model RCAN, teacher [RCAN], patch_size 192, loss 0.5*DS+0.5*TS+10*SA, features [1,2,3], lr 1e-4, "
                     "betas 0.9,0.999, gamma 0.5, epochs 200, batch_size 16, ema 0, self_ensemble 0"),
    ("FAKD/RCAN/x3", "patch_size 144, loss 0.5*DS+0.5*TS+10*SA, features [2,3]"),
    ("FAKD/EDSR/x8", "model EDSR, n_resblocks 16, n_feats 64, res_scale 1, patch_size 384, features [1,2,3]"),
    ("FAKD/SAN/x8", "model SAN, n_resgroups 6, n_resblocks 10, teacher [SAN], loss 0.5*DS+0.5*TS+10*SA"),
    ("FAKD/SAN/x2/baseline", "model SAN, loss 1*DS, patch_size 96"),
    ("DCKD/NAFNet/deblur", "model NAFNet, n_feats 16, teacher [NAFNet_GoPro], scale 1, loss 1*DS+1*TS+25.5*DCR+0.255*DMM, "
                           "optimizer ADAMW, lr 1e-3, betas 0.9,0.9, weight_decay 1e-3, decay cosine, lr_end 1e-7, "
                           "decay_from 0, grad_norm 2.55, epochs 200, patch_size 256, batch_size 32, ema 0, "
                           "pair_dirs blur/sharp, metric_space rgb, tlc_size 384, history_every 1000-2000-3000"),
    ("DCKD/Restormer/deblur", "model Restormer, teacher [Restormer_deblur], metric_space rgb, pair_dirs blur/sharp"),
    ("DCKD/Restormer/derain", "model Restormer, n_feats 24, teacher [Restormer_derain], scale 1, optimizer ADAMW, lr 3e-4, "
                              "loss 1*DS+1*TS+25.5*DCR+0.255*DMM, betas 0.9,0.999, weight_decay 1e-4, decay cosine, "
                              "decay_from 92000, lr_end 1e-6, grad_norm 2.55, epochs 300, metric_space y, "
                              "pair_dirs input/target, progressive 128/64@0,160/40@92000,192/32@156000,256/16@204000,"
                              "320/8@240000,384/8@276000"),
    ("CSD/EDSR/x4/0.25", "model EDSR, n_feats 256, n_resblocks 32, width_mult 0.25, loss 1*DS+200*CSD+1*T_DS, neg_num 10, "
                         "patch_size 192, gamma 0.1, epochs 400, t_l_remove 400, betas 0.9,0.999, self_ensemble 1, ema 0"),
    ("CSD/EDSR/x2/0.25/J-T1", "width_mult 0.25, loss 1*DS+1*T_DS, self_ensemble 1, scale 2"),
    ("CSD/RCAN/x4/0.5", "model RCAN, n_resblocks 20, width_mult 0.5, teacher [RCAN], self_ensemble 1"),
    ("CSD/CARN/x4/0.5", "model CARN, width_mult 0.5, carn_variant CSD, gamma 0.1"),
    ("DUKD/EDSR/x2", "n_resblocks 32, n_feats 64, res_scale 0.1, loss 5*DS+1*TS, upcycle zoom_in+zoom_out, n_zoom_in 2, "
                     "zoom_in_tiles batch, label_consistency 0.3, label_consistency_views zoom_in, ema 0.999, "
                     "betas 0.9,0.99, gamma 0.1, epochs 250, batch_size 16, "
                     "self_ensemble 1, patch_size 96"),
    ("DUKD/EDSR/x3", "upcycle zoom_in+zoom_out, n_zoom_in 1, label_consistency 0.3, loss 5*DS+1*TS, patch_size 144"),
    ("DUKD/RCAN/x2", "loss 1*DS+1*TS, upcycle zoom_in, n_zoom_in 1, label_consistency 0, self_ensemble 0"),
    ("DUKD/RCAN/x3", "loss 2*DS+1*TS, upcycle zoom_in+zoom_out, n_zoom_in 1, zoom_in_tiles batch, label_consistency 0.3, "
                     "label_consistency_views zoom_in"),
    ("DUKD/RCAN/x4", "loss 1*DS+1*TS, upcycle zoom_in, label_consistency 0"),
    ("DUKD/SwinIR/x2", "n_feats 60, depths [6,6,6,6], loss 5*DS+1*TS, upcycle zoom_in, label_consistency 0.3"),
    ("DCKD/SwinIR/x4", "n_feats 60, teacher [SwinIR], loss 1*DS+1*TS+1*LC+25.5*DCR+0.255*DMM, lc_p 0.5, dcr_negatives 4, "
                       "dcr_noise 1, dcr_blur 0, dcr_resize 0, history_every 1000-2000-3000, ema 0.999, batch_size 16, "
                       "gamma 0.1, epochs 250"),
    ("DCKD/RCAN/x2", "model RCAN, n_resblocks 6, batch_size 16, ema 0.999, betas 0.9,0.99, upcycle "),
    ("DCKD_star/RCAN/x4", "loss 1*DS+1*TS+1*LC+25.5*DCR+0.255*DMM, upcycle zoom_in"),
    ("MCADKD/EDSR/x2", "n_resblocks 32, n_feats 64, res_scale 0.1, lr 1e-3, gan_lr 1e-3, gan_net unet, gan_update before, "
                       "ema 0, batch_size 32, epochs 500, gamma 0.5, betas 0.9,0.99, self_ensemble 1, "
                       "loss 3*DS+0.5*TS+12.75*NCE+2.55*GAN"),
    ("MCADKD/SwinIR/x3", "lr 1e-4, gan_lr 1e-4, gan_net unet, gan_update before, ema 0.999, batch_size 32, epochs 500, "
                         "self_ensemble 0, patch_size 144"),
])
def test_an_experiment_has_its_published_settings(name, line):
    args, parser = parse(f"--published {name}"), option.make_parser()
    assert f"x{args.scale}" == name.split("/")[2] if args.scale > 1 else name.split("/")[2] in ("deblur", "derain")
    assert args.test_every == 1000 and args.optimizer == ("ADAM" if args.scale > 1 else "ADAMW")
    for flag, text in (setting.split(" ", 1) for setting in line.split(", ")):
        value = text == "1" if flag == "self_ensemble" else getattr(parser.parse_args([f"--{flag}={text}"]), flag)
        assert getattr(args, flag) == value, flag


@pytest.mark.parametrize("name, rates", [  # learning rate {iteration, counted from 0: value}
    ("FAKD/RCAN/x4", {0: 1e-4, 149 * K - 1: 1e-4, 149 * K: 5e-5, 150 * K: 5e-5, 200 * K - 1: 5e-5}),
    ("CSD/EDSR/x4/0.25", {0: 1e-4, 200 * K - 1: 1e-4, 200 * K: 1e-5, 400 * K - 1: 1e-5}),
    ("DUKD/EDSR/x2", {100 * K - 1: 1e-4, 100 * K: 1e-5, 200 * K: 1e-6, 250 * K - 1: 1e-6}),
    ("DCKD/RCAN/x3", {100 * K - 1: 1e-4, 100 * K: 1e-5, 200 * K: 1e-6}),
    ("MCADKD/EDSR/x2", {250 * K - 1: 1e-3, 250 * K: 5e-4, 399 * K: 5e-4, 400 * K: 2.5e-4, 450 * K: 1.25e-4,
                        475 * K: 6.25e-5}),
    ("MCADKD/SwinIR/x2", {250 * K: 5e-5, 375 * K - 1: 5e-5, 375 * K: 2.5e-5, 475 * K: 6.25e-6}),
])
def test_an_experiment_has_its_published_learning_rates(name, rates):
    args = parse(f"--published {name}")
    assert {k: learning_rate(args, k) for k in rates} == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize("name, step", [("DUKD/EDSR/x2", 100 * K), ("DCKD/SwinIR/x4", 100 * K), ("MCADKD/EDSR/x2", 250 * K)])
def test_the_learning_rate_falls_at_the_published_iteration_whatever_an_epoch_is(name, step):
    args = parse(f"--published {name} --test_every 250")
    assert learning_rate(args, step - 1) == args.lr and learning_rate(args, step) == args.lr * args.gamma


@pytest.mark.parametrize("line, epsilon", [
    ("--template DUKD", 2.55e-6), ("--published DCKD/RCAN/x4", 2.55e-6), ("--template MCADKD --rgb_range 1", 1e-8),
    ("--template FAKD", 1e-8), ("--template CSD --rgb_range 1", 1e-8 / 255), ("--template DCKD --epsilon 1e-7", 1e-7),
    ("--template EDSR --rgb_range 1", 1e-8)])
def test_the_epsilon_of_adam_is_converted_to_the_range_of_the_images(line, epsilon):
    assert parse(line).epsilon == pytest.approx(epsilon, rel=1e-5)


def test_a_preset_has_the_same_updates_in_any_range_of_the_images():
    """Images in [0, 255] and in [0, 1]; with one epsilon for both, three updates would differ by 3e-4."""
    torch.manual_seed(1)
    batch = [torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for side in (12, 24)]
    flags, found = "--template DUKD --scale 2 --patch_size 24 --batch_size 2", []
    for rgb_range in (255, 1):
        torch.manual_seed(0)
        student, teacher = (EDSR(2, n_resblocks=1, n_feats=8).double() for _ in range(2))
        start = [p.detach().clone() for p in student.parameters()]
        for net in (student, teacher):
            net.rgb_range = rgb_range
        step = make_step(student, teacher, f"{flags} --rgb_range {rgb_range}")
        for _ in range(3):
            step(*batch)
        found.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(student.parameters(), start)]))
    assert (found[0] - found[1]).norm() < 2e-5 * found[0].norm()


@pytest.mark.parametrize("name, scores", [
    ("FAKD/RCAN/x4", "32.462 28.750 27.678 26.422"), ("FAKD/RCAN/x4/baseline", "32.321 28.688 27.634 26.340"),
    ("CSD/EDSR/x4/0.25", "32.34 28.72 27.68 26.34"), ("CSD/EDSR/x4/0.25/baseline", "32.23 28.63 27.60 26.07"),
    ("CSD/RCAN/x4/0.5", "- - - 26.655"), ("DUKD/SwinIR/x4", "- - - 26.43"), ("MCADKD/EDSR/x2", "- - - -"),
    ("DCKD/RCAN/x4", "32.56 28.82 27.73 26.69"), ("DCKD_star/SwinIR/x4", "32.51 28.88 27.74 26.62")])
def test_an_experiment_has_its_published_scores(name, scores):
    found = experiments()[name].scores
    assert [found.get(dataset, "-")[0] for dataset in published.BENCHMARKS] == scores.split()


@pytest.mark.parametrize("name, parameters", [
    ("FAKD/RCAN/x4", 5_171_000), ("FAKD/SAN/x4", 4_996_000), ("DUKD/EDSR/x3", 2_736_000), ("DUKD/SwinIR/x2", 1_087_727),
    ("MCADKD/EDSR/x2", 2_551_555), ("DCKD/NAFNet/deblur", 2_683_059), ("DCKD/Restormer/derain", 3_813_230),
    ("MCADKD/SwinIR/x3", 1_272_000), ("CSD/EDSR/x4/0.25", 2_699_267),
    ("CSD/EDSR/x4/0.5", 10_780_675), ("CSD/RCAN/x4/0.5", 3_909_075), ("CSD/CARN/x4/0.5", 279_459)])
def test_a_student_has_the_published_number_of_parameters(name, parameters):
    from model.slicing import narrow_network  # noqa: PLC0415
    args = parse(f"--published {name}")
    with torch.device("meta"):
        net = make_model(args.model, args)
    net = narrow_network(net, args.width_mult) if args.width_mult else net
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == pytest.approx(parameters, abs=600)


def test_the_table_agrees_with_the_collected_facts(shared):
    """Where the collection of published facts is at hand: as many rows, all scores, patch, batch and schedule of each."""
    path = shared / "published" / "experiments.csv"
    if not path.is_file():
        pytest.skip("no collection of published facts here")
    with path.open() as file:
        facts = list(csv.DictReader(file))
    assert len(facts) == len(experiments())
    for fact, experiment in zip(facts, experiments().values()):
        assert experiment.scores == {key[:-5]: (value, fact[f"{key[:-5]}_ssim"]) for key, value in fact.items()
                                     if key.endswith("_psnr") and value}
        if not experiment.script:
            continue
        args = parse(f"--published {experiment.name}")
        assert experiment.name.split("/")[1] == fact["network"].rstrip("+") and str(args.scale) == fact["scale"]
        assert not fact["total_iterations"] or args.epochs * args.test_every == int(fact["total_iterations"])
        assert not fact["hr_patch"] or args.patch_size == int(fact["hr_patch"].split(",")[0])
        assert args.lr == float(fact["lr"].split()[0]) and args.betas == tuple(map(float, fact["betas"].split(",")))
        assert args.ema == float(re.match(r"0\.999|", fact["ema"])[0] or 0)
        channels = fact["student_channels"].replace("18 (as published; 60 by the file name)", "60")
        assert args.n_feats * (args.width_mult or 1) == int(channels)


# ---- table, presets, scripts and README cannot disagree

@pytest.mark.parametrize("name", TRAININGS)
def test_an_experiment_trains_from_its_script(name):
    experiment = experiments()[name]
    script = ROOT / "scripts" / f"{experiment.script}.sh"
    assert script.read_text() == published.script_text(experiment)
    args = parse(f"--published {name}")
    assert args.scale == 1 or args.patch_size == 48 * args.scale
    assert args.ckp_dir.startswith("published/") and name.split("/")[1] == args.model
    assert args.teacher[0].split("_")[0] == args.model
    assert args.teacher[0] in {args.model, *(release.name for release in TEACHERS)}
    assert "teacher" in args.given or args.loss == "1*DS" or name.startswith("CSD/CARN")  # whose teacher was not published


def test_there_is_a_script_for_each_experiment_and_an_experiment_for_each_script():
    scripts = {file.stem for file in (ROOT / "scripts").glob("*.sh") if re.search(r"_x[12348](_|$)", file.stem)}
    assert scripts == {experiments()[name].script for name in TRAININGS}
    assert len({experiments()[name].ckp_dir for name in TRAININGS}) == len(scripts) == len(TRAININGS)


def test_what_was_not_published_has_no_training():
    assert "dckd_star_rcan_x2" not in {experiment.script for experiment in experiments().values()}
    for name in experiments():
        if name not in TRAININGS:
            with pytest.raises(ValueError, match="scores alone"):
                published.find_training(name)
    assert {"DCKD/RCAN/x4/MiPKD", "DCKD/RCAN/x2/FAKD"} <= experiments().keys() - set(TRAININGS)


@pytest.mark.parametrize("template, name", [
    ("FAKD", "FAKD/RCAN/x4"), ("CSD", "CSD/EDSR/x4/0.25"), ("DCKD", "DCKD/SwinIR/x4"), ("DUKD", "DUKD/EDSR/x2"),
    ("DUKD_RCAN", "DUKD/RCAN/x4"), ("DUKD_SwinIR", "DUKD/SwinIR/x4"), ("MCADKD", "MCADKD/SwinIR/x2")])
def test_a_preset_of_a_paper_is_the_training_of_an_experiment(template, name):
    preset, whole = vars(parse(f"--template {template}")), vars(parse(f"--published {name}"))
    others = {"template", "published", "given", "ckp_dir", "teacher", "scale", "patch_size", "self_ensemble"}
    assert {flag for flag in preset if preset[flag] != whole[flag]} <= others | option.SIZES


def test_every_preset_with_a_papers_name_is_tested_above():
    papers = {name for name, preset in TEMPLATES.items() if "model" not in preset} - {
        "inherit", "best", "best_running", "RealESRNet_student", "RealESRGAN_student"}
    assert papers == {"FAKD", "CSD", "DCKD", "DUKD", "DUKD_RCAN", "DUKD_SwinIR", "MCADKD"}


def test_the_readme_has_the_table():
    text = (ROOT / "scripts" / "README.md").read_text()
    assert text.split(published.BEGIN)[1].split(published.END)[0] == published.markdown()


def test_every_column_between_student_and_self_ensemble_is_a_flag():
    flags = {flag for name in TRAININGS for flag in experiments()[name].flags}
    assert flags <= set(vars(parse(""))) | {"student", "image_range"}


# ---- the flag

@pytest.mark.parametrize("template, loss, published_loss", [
    ("DCKD", "1*DS+1*TS+1*LC+25.5*DCR+0.255*DMM", "1*DS+1*TS+1*LC+0.1*DCR+0.001*DMM"),
    ("MCADKD", "3*DS+0.5*TS+12.75*NCE+2.55*GAN", "3*DS+0.5*TS+0.05*NCE+0.01*GAN"),
    ("FAKD", "0.5*DS+0.5*TS+10*SA", "0.5*DS+0.5*TS+0.0392157*SA"),
    ("CSD", "1*DS+200*CSD+1*T_DS", "1*DS+0.784314*CSD+1*T_DS")])
def test_published_weights_are_converted_to_the_range_of_the_images(template, loss, published_loss):
    assert parse(f"--template {template}").loss == loss
    assert parse(f"--template {template} --rgb_range 1").loss == published_loss
    assert parse(f"--template {template} --rgb_range 1 --loss 7*GAN").loss == "7*GAN"


def test_explicit_flags_and_presets_override_an_experiment():
    args = parse("--published FAKD/RCAN/x3 --epochs 3 --alpha 0.25 --teacher a.pt --template EDSR_baseline --ckp_dir x")
    assert (args.epochs, args.loss, args.features, args.patch_size) == (3, "0.75*DS+0.25*TS+10*SA", [2, 3], 144)
    assert (args.teacher, args.model, args.n_resblocks, args.n_resgroups, args.ckp_dir) == (["a.pt"], "EDSR", 16, None, "x")


def test_gradient_clipping_is_converted_to_the_range_of_the_images():
    assert parse("--published DCKD/NAFNet/deblur --rgb_range 1").grad_norm == 0.01
    assert parse("--published DCKD/NAFNet/deblur --grad_norm 0.01").grad_norm == 0.01


@pytest.mark.parametrize("iteration, rate", [(0, 3e-4), (91_999, 3e-4), (196_000, 1.505e-4), (299_999, 1e-6)])
def test_restormers_learning_rate_is_fixed_and_then_half_a_cosine(iteration, rate):
    assert learning_rate(parse("--published DCKD/Restormer/deblur"), iteration) == pytest.approx(rate, rel=1e-3)
    assert learning_rate(parse("--published DCKD/Restormer/deblur --epochs 3"), 2999) == 3e-4  # a short trial has no decay


def test_the_run_of_an_experiment_repeats_from_its_config(tmp_path):
    from config import to_text  # noqa: PLC0415
    for name in TRAININGS:
        args = parse(f"--published {name} --test_every 3")
        (tmp_path / "config.txt").write_text(to_text(args, option.make_parser()._actions))
        assert vars(option.parse([f"@{tmp_path / 'config.txt'}"])) == vars(args)


def test_list_shows_every_experiment_with_its_scores():
    ran = subprocess.run([sys.executable, "train.py", "--published", "list"], cwd=ROOT / "code", capture_output=True,
                         text=True, check=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == len(experiments()) + 1
    assert re.search(r"\nFAKD/RCAN/x4 +32.462 +28.750 +27.678 +26.422\n", ran.stdout)
    assert re.search(r"\nDCKD/Restormer/derain  .* Test100 31.08  Rain100H 30.54  Rain100L 38.02  Test2800 33.91  "
                     r"Test1200 33.95\n", ran.stdout)
    assert re.search(r"\nDCKD/RCAN/x4/MiPKD .* scores only\n", ran.stdout)


@pytest.mark.parametrize("line, words", [
    ("--published FAKD/RCAN/x5", "--published list shows all"), ("--published FAKD", "no such experiment"),
    ("--published DCKD/RCAN/x4/MiPKD", "scores alone are known"), ("--published ../x", "no such experiment"),
    ("--published FAKD/RCAN/x4 --model EDSR", "--published FAKD")])
def test_a_wrong_experiment_gets_one_line(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(line)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_missing_student_to_start_from_gets_one_line(run_main):
    start = ROOT / "experiment" / "published" / "DUKD_EDSR_x2" / "model" / "model_latest.pt"
    assert parse("--published DUKD/EDSR/x4").pre_train == str(start)
    if start.exists():
        pytest.skip("there is one here")
    status, _, err = run_main("train", "--published DUKD/EDSR/x4")
    assert status == 2 and len(err) == 1 and str(start) in err[0] and "scripts/dukd_edsr_x2.sh" in err[0]


# ---- scores beside the published ones

@pytest.mark.parametrize("name, flags, lines", [
    ("FAKD/RCAN/x4", "", ["Set5 32.41 (published FAKD RCAN x4: 32.462, -0.05)",
                          "Urban100 26.50 (published FAKD RCAN x4: 26.422, +0.08)"]),
    ("FAKD/RCAN/x4", "--scale 2", []), ("FAKD/EDSR/x4", "", []), ("", "", []), ("gone/x", "", []),
    ("CSD/EDSR/x4/0.25", "--width_mult 0.25 --self_ensemble", ["Set5 32.41 (published CSD EDSR x4 0.25: 32.34, +0.07)",
                                                              "Urban100 26.50 (published CSD EDSR x4 0.25: 26.34, +0.16)"]),
    ("CSD/RCAN/x4/0.5", "--width_mult 0.5",
     ["Urban100 26.50 (published CSD RCAN x4 0.5 with self-ensemble: 26.655, -0.16)"]),
    ("CSD/EDSR/x4/0.25", "--self_ensemble", []), ("FAKD/RCAN/x4", "--metric_space rgb", []),
    ("FAKD/RCAN/x4", "--shave 0", []), ("DCKD/NAFNet/deblur", "--scale 1", []),
    ("DCKD/NAFNet/deblur", "--scale 1 --metric_space rgb", ["GoPro 31.50 (published DCKD NAFNet deblur: 31.43, +0.07)"]),
    ("DCKD/Restormer/derain", "--scale 1 --shave 0", ["Rain100L 38.00 (published DCKD Restormer derain: 38.02, -0.02)"]),
    ("DCKD/Restormer/derain", "--scale 1 --metric_space rgb", []),
])
def test_scores_are_compared_with_the_published_ones(name, flags, lines):
    psnrs = {"Set5": 32.41, "mine": 30.0, "Urban100": 26.499, "Demo": None, "DIV2K": 29.0, "GoPro": 31.5, "Rain100L": 38.0}
    assert comparison(name, psnrs, parse(flags)).splitlines() == lines


def test_a_run_and_a_test_of_its_checkpoint_compare(run_main, tiny_data, tmp_path):
    root = tmp_path / "data"
    (root / "benchmark").mkdir(parents=True)
    (root / "benchmark" / "Set5").symlink_to(tiny_data / "tiny")
    (root / "tiny").symlink_to(tiny_data / "tiny")
    save_model(EDSR(2, n_resblocks=1, n_feats=8), tmp_path / "teacher.pt")
    data = f"--cpu --n_threads 0 --dir_data {root} --dir_cache {tmp_path / 'cache'} --data_test Set5 "
    status, out, _ = run_main("train", data + "--published CSD/EDSR/x2/0.25 --data_train tiny --epochs 2 --test_every 1 "
                              "--batch_size 2 --patch_size 32 --loss 1*DS+1*T_DS "
                              f"--teacher {tmp_path / 'teacher.pt'} --ckp_dir {tmp_path / 'run'}")
    compared = [line for line in out if "published CSD EDSR x2 0.25: 38.19, " in line]
    assert status == 0 and len(compared) == 1 and compared[0] == out[-1]
    assert any("published CSD/EDSR/x2/0.25: Booooooooooo/CSD@f479c8f" in line and "LR patch 48" in line for line in out)
    model = tmp_path / "run" / "model" / "model_latest.pt"
    status, out, _ = run_main("test", data + f"--ckp_path {model} --published CSD/EDSR/x2/0.25")
    assert status == 0 and out[-1] == compared[0]
    status, out, _ = run_main("test", data + f"--ckp_path {model}")
    assert status == 0 and not [line for line in out if "published" in line]
