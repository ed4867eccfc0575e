"""Diagnostics of a run: gradient norms of the terms of the loss, and the scores of each image."""
import csv
import math

import pytest
import torch

from checkpoint import Experiment
from loss import TERMS, Loss, LossInputs, Output
from test_distributed import CASES, float32_again, make_exact, make_small, make_trainer  # noqa: F401
from test_training import flags, rows, teacher  # noqa: F401

COMBINED = "--loss 1*DS+1*TS+1*fitnet+0.1*GAN --label_consistency 0.5 --upcycle 1*zoom_in+0.5*zoom_out "


def batch(trainer):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randint(0, 256, (4, 3, side, side), generator=generator, dtype=torch.uint8) for side in (16, 32))


def norms(line):
    """The gradient norms of the terms in one step, as the trainer logs them."""
    trainer = make_trainer(line + " --log_gradients 1")
    torch.manual_seed(7)
    trainer.step(*batch(trainer))
    found, logged = trainer.gradients.tolist()
    assert logged == [1] * len(found)
    return dict(zip(trainer.loss.names, found))


# ---- gradient norms

def images(*shape):
    return torch.rand(shape, requires_grad=True)


def squares(loss, *views):
    return loss(*views, log_gradients=True)[1][1].tolist()


def test_a_norm_is_that_of_the_weighted_gradient_at_the_outputs_of_all_views():
    """L1 between N numbers has a gradient of +-1/N at each, and thus the norm 1/sqrt(N)."""
    loss = Loss({"DS": TERMS["DS"](), "TS": TERMS["TS"]()}, [(math.inf, {"DS": 0.5, "TS": 3.0})])
    views = [LossInputs(torch.zeros(1), hr, Output(images(2, 3, side, side)), Output(torch.zeros(2, 3, side, side)),
                        view=view, weight=weight)
             for view, weight, side, hr in (("original", 1, 8, torch.zeros(2, 3, 8, 8)), ("zoom_in", 0.25, 4, None))]
    assert squares(loss, *views) == pytest.approx([0.5**2 / 384, 3**2 * (1 / 384 + 0.25**2 / 96)], rel=1e-5)


def test_the_norm_of_a_feature_term_is_that_at_the_feature_maps():
    """Without the path from the first feature map through the second."""
    first = images(2, 4, 6, 6)
    student = Output(images(2, 3, 12, 12), [images(1), first, 2 * first, images(1)])
    target = Output(torch.rand(2, 3, 12, 12), [torch.rand(x.shape) for x in student.features])
    fitnet = TERMS["fitnet"](features=(1, 2), student_feats=4, teacher_feats=(4,))
    loss = Loss({"fitnet": fitnet}, [(math.inf, {"fitnet": 7.0})])
    found = squares(loss, LossInputs(torch.zeros(1), torch.zeros(1), student, target))
    assert found == pytest.approx([2 * 7**2 / first.numel()], rel=1e-5)


def test_terms_of_the_teacher_have_the_norm_at_its_output():
    found = norms(CASES["slice"])
    assert found["T_DS"] == pytest.approx(1 / math.sqrt(4 * 3 * 32 * 32), rel=1e-3)


def test_a_term_without_a_gradient_has_the_norm_0():
    inputs = LossInputs(torch.zeros(1), torch.zeros(2), Output(images(2)), teacher_sr_with_grad=images(2))
    loss = Loss({"DS": TERMS["DS"](), "T_DS": TERMS["T_DS"](iterations=0)}, [(math.inf, {"DS": 1.0, "T_DS": 1.0})])
    assert squares(loss, inputs) == pytest.approx([1 / 2, 0])


@pytest.mark.parametrize("weight", [1e-6, 1, 1e6])
def test_gradients_of_float16_feature_maps_neither_vanish_nor_overflow(weight):
    maps = torch.rand(4, 64, 48, 48).half().requires_grad_()
    student, target = (Output(images(4, 3, 96, 96), [x] * 4) for x in (maps, torch.rand(maps.shape)))
    loss = Loss({"fitnet": TERMS["fitnet"](features=(3,), student_feats=64)}, [(math.inf, {"fitnet": weight})])
    inputs = LossInputs(torch.zeros(1), torch.zeros(1), student, target)
    assert squares(loss, inputs)[0] * maps.numel() / weight**2 == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("line", ["--loss 0.5*DS+0.5*TS+10*SA --upcycle zoom_out", "--loss 1*AT+1*CA+1*fitnet+1*FSP+1*RBF"])
def test_a_split_batch_has_the_norms_of_the_whole(monkeypatch, line):
    make_exact(monkeypatch)
    torch.set_default_dtype(torch.float64)
    whole, split = norms(line), norms(line + " --split_batch 2")
    assert min(whole.values()) > 0 and split == pytest.approx(whole, rel=1e-9)


def step(line, every):
    """All that two steps change, with or without the flag."""
    trainer = make_trainer(f"{line} --log_gradients {every}")
    torch.manual_seed(7)
    values = [trainer.step(*batch(trainer)) for _ in range(2)]
    networks = {**trainer.student.state_dict(), **{name: x for name, x in trainer.loss.state_dict().items()
                                                   if isinstance(x, torch.Tensor)}}
    return [*values, *(p.grad for p in trainer.distiller.trainable_parameters() if p.grad is not None),
            *networks.values(), torch.get_rng_state()]


@pytest.mark.parametrize("case", ["FAKD", "other features", "CSD", "slice", "DCKD", "NCE", "GAN", "DUKD", "combined, half",
                                  "features, bf16", "split"])
def test_logging_leaves_every_bit_of_a_step(monkeypatch, case):
    make_small(monkeypatch)
    monkeypatch.setitem(CASES, "combined, half", COMBINED + "--precision half --ema 0.9 --lr 1e-3 --optimizer ADAM")
    monkeypatch.setitem(CASES, "features, bf16", "--loss 1*DS+10*SA+1*IA --precision bf16")
    monkeypatch.setitem(CASES, "split", COMBINED + "--split_batch 2")
    without, logged = step(CASES[case], 0), step(CASES[case], 1)
    assert len(without) == len(logged) and all(map(torch.equal, without, logged))


def test_the_columns_are_means_over_the_logged_iterations_and_survive_a_resume(run_main, flags, teacher, tmp_path,  # noqa: F811
                                                                               monkeypatch):
    """Iteration k, counted from 1, has norm k here."""
    iterations = []
    of_iteration = LossInputs.alias
    monkeypatch.setattr(LossInputs, "alias", lambda self: (iterations.append(self.iteration), of_iteration(self))[1])
    monkeypatch.setattr("loss.squared_gradient", lambda value, *_: value.new_tensor(iterations[-1] + 1.0).square())
    line = flags + f"--teacher {teacher} --loss 1*DS+1*TS --log_gradients 2 "
    assert run_main("train", line + "--test_every 4 --epochs 1")[0] == 0
    assert run_main("train", line + "--test_every 3 --epochs 2 --resume 1")[0] == 0  # iterations 5, 6
    assert run_main("train", line + "--test_every 3 --epochs 3 --resume 1 --log_gradients 0")[0] == 0
    table = rows(tmp_path / "run" / "loss.csv")
    assert list(table[0])[-2:] == ["DS_gradient", "TS_gradient"]
    assert [row["DS_gradient"] for row in table] == ["3", "6", ""]
    assert (tmp_path / "run" / "loss_TS_gradient.png").is_file()


@pytest.mark.parametrize("norm, logged", [(1.0, 1), (math.inf, 0), (math.nan, 0)])
def test_norms_that_are_not_finite_are_left_out(norm, logged):
    trainer = make_trainer("--loss 1*DS+1*TS")
    trainer.add_gradients(torch.tensor([2.0, norm]))
    assert trainer.gradients.tolist() == [[2.0 * logged, 1.0 * logged], [logged, logged]]


def test_the_norms_are_means_over_the_iterations_of_the_stage_of_each_term():
    trainer = make_trainer("--loss 1*DS@0-50%,1*DS+1*TS@50-100% --test_every 4 --log_gradients 1")
    for trainer.iteration in range(4):
        trainer.step(*batch(trainer))
    sums, counts = trainer.gradients.tolist()
    assert counts == [4, 2] and min(sums) > 0


def test_more_than_an_epoch_is_refused(run_main, flags):  # noqa: F811
    status, _, err = run_main("train", flags + "--test_every 5 --log_gradients 6")
    assert status == 2 and len(err) == 1 and "--log_gradients 6" in err[0] and "--test_every 5" in err[0]


# ---- scores of each image

def test_a_run_has_the_scores_of_each_image(run_main, flags, tmp_path):  # noqa: F811
    assert run_main("train", flags + "--loss 1*DS --epochs 3 --test_every 2 --lr 1e-3")[0] == 0
    table, metrics = rows(tmp_path / "run" / "images.csv"), rows(tmp_path / "run" / "metrics.csv")
    best = max(metrics, key=lambda row: float(row["psnr"]))["epoch"]
    for name, epoch in (("model_best.pt", best), ("model_latest.pt", "3")):
        found = [row for row in table if row["checkpoint"] == name]
        assert [(row["dataset"], row["scale"], row["image"], row["epoch"]) for row in found] == [
            ("tiny", "2", str(index), epoch) for index in range(4)]
        for key, digits in (("psnr", 1e-4), ("ssim", 1e-5)):
            mean = sum(float(row[key]) for row in found) / 4
            assert mean == pytest.approx(float(metrics[int(epoch) - 1][key]), abs=digits)

    history = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["history"]
    assert {row["epoch"] for row in history if "images" in row} == {int(best), 3}  # others would make the state large

    line = f"--cpu {flags[flags.index('--dir_data'):flags.index('--n_threads')]} --ckp_path "
    assert run_main("test", line + str(tmp_path / "run" / "model" / "model_latest.pt"))[0] == 0
    tested = rows(tmp_path / "run" / "results-tiny" / "images.csv")
    assert [{**row, "epoch": "3"} for row in tested] == [row for row in table if row["checkpoint"] == "model_latest.pt"]
    assert rows(tmp_path / "run" / "images.csv") == table


def test_images_are_those_of_the_best_and_the_latest_epoch(tmp_path):
    import option  # noqa: PLC0415
    from evaluation import best_epoch  # noqa: PLC0415
    psnrs = [30.0, 32.0, math.nan, 31.0]
    history = [dict(epoch=epoch, iteration=epoch, lr=1.0, loss={"DS": 1.0}, scores={"A": (psnr, 0.5)},
                    images={"A": [("a", psnr, 0.5), ('b, "c"', math.inf, 1.0)]}) for epoch, psnr in enumerate(psnrs, 1)]
    experiment = Experiment(option.parse(["--ckp_dir", str(tmp_path / "run")]))
    experiment.begin()
    experiment.write_history(history)
    experiment.end()
    assert best_epoch(history) == 2
    with (tmp_path / "run" / "images.csv").open() as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [
            ("model_best.pt", "2", "A", "4", "a", "32.000000", "0.50000000"),
            ("model_best.pt", "2", "A", "4", 'b, "c"', "inf", "1.00000000"),
            ("model_latest.pt", "4", "A", "4", "a", "31.000000", "0.50000000"),
            ("model_latest.pt", "4", "A", "4", 'b, "c"', "inf", "1.00000000")]
