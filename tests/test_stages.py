"""Stages of the loss: the string, what each iteration computes, what is written, resuming."""
import pytest
import torch

import loss
import option
import option_types
import trainer
from config import to_text
from loss import adversarial
from test_distributed import make_trainer
from test_training import assert_same_weights, flags, rows, teacher  # noqa: F401

STAGED = "1*DS+1*TS@0-80%,2*DS_MSE@80-100%"


@pytest.fixture(autouse=True)
def small_discriminator(monkeypatch):
    monkeypatch.setattr(adversarial, "WIDTHS", (4,) * 8)
    monkeypatch.setattr(adversarial, "HIDDEN", 4)


def batch():
    return tuple(torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8) for side in (16, 32))


def test_the_string_is_read_stage_by_stage():
    assert option_types.parse_stages(STAGED) == [(80, [(1, "DS"), (1, "TS")]), (100, [(2, "DS_MSE")])]
    assert option_types.parse_stages("DS @ 0-33.3% , 0.5*TS@33.3-100%") == [(33.3, [(1, "DS")]), (100, [(0.5, "TS")])]
    assert option_types.parse_stages("1*DS+2*TS") == [(100, [(1, "DS"), (2, "TS")])]
    assert option_types.stage_ends([(33.3, []), (80, []), (100, [])], 1000) == [333, 800, 1000]


@pytest.mark.parametrize("string, words", [
    ("1*DS@0-80%", "must end at 100%, not at 80%"), ("1*DS@0-80%,1*TS", "not of the form TERMS@FROM-TO%"),
    ("1*DS@0-80%,1*TS@90-100%", "must begin at 80%"), ("1*DS@0-80%,1*TS@70-100%", "must begin at 80%"),
    ("1*DS@10-100%", "must begin at 0%"), ("1*DS@0-120%", "at 100% at most"), ("1*DS@0-0%,1*TS@0-100%", "end later"),
    ("1*DS@0-80,1*TS@80-100%", "not of the form"), ("1*DS@80%,1*TS@80-100%", "not of the form"), ("1*DS+@0-100%", "WEIGHT"),
    ("1*DS+1*DS@0-100%", "duplicate term DS"), ("1*DS,1*TS", "WEIGHT"), ("1*DS@0-1.2.3%", "not of the form"),
    ("1*DS@0-99.9%,1*TS@99.9-100%", "has none in one of the stages"), ("1*DS@0-nan%", "not of the form"),
])
def test_a_string_that_cannot_be_gets_a_line(string, words, capsys):
    with pytest.raises(SystemExit) as ended:
        option.parse(["--loss", string, "--epochs", "1", "--test_every", "100"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_weights_are_converted_and_config_repeats_it(tmp_path):
    assert option.convert_weights(STAGED + "", 0.5) == "1*DS+1*TS@0-80%,4*DS_MSE@80-100%"
    assert option.convert_weights("10*SA@0-12.5%,3*LC@12.5-100%", 0.5) == "5*SA@0-12.5%,3*LC@12.5-100%"
    args = option.parse(["--loss", STAGED])
    (tmp_path / "config.txt").write_text(to_text(args, option.make_parser()._actions))
    assert f"--loss {STAGED}\n" in (tmp_path / "config.txt").read_text()
    assert option.parse([f"@{tmp_path / 'config.txt'}"]).loss == STAGED


def test_needs_are_those_of_all_stages_and_zero_weights_are_left_out_of_each():
    assert loss.needs_of("1*DS+0*SA@0-50%,1*TS@50-100%") == {"hr", "teacher"}
    assert loss.parse("1*DS+0*SA@0-50%,1*TS@50-100%") == [{"DS": 1}, {"TS": 1}]
    with pytest.raises(loss.UserError, match="every weight is 0"):
        loss.parse("0*DS@0-50%,1*TS@50-100%")


def test_each_iteration_computes_the_terms_of_its_stage_and_no_others(monkeypatch):
    own = make_trainer("--loss 2*DS+1*TS@0-50%,3*DS@50-80%,1*DS+1*SA@80-100% --epochs 2 --test_every 5")
    assert own.loss.names == ["DS", "TS", "SA"]
    runs = []
    run = own.distiller.run
    monkeypatch.setattr(own.distiller, "run", lambda net, lr, features, **precision: runs.append(
        ("student" if net is own.student else "teacher", features)) or run(net, lr, features, **precision))
    lr, hr = batch()
    values = []
    for own.iteration in range(10):
        runs.clear()
        values.append((own.step(lr, hr) > 0).tolist())
        assert runs == [("student", own.iteration >= 8)] + [("teacher", own.iteration >= 8)] * (not 5 <= own.iteration < 8)
    assert values == [[True, True, False]] * 5 + [[True, False, False]] * 3 + [[True, False, True]] * 2
    weights = [own.loss.weights_at(iteration)["DS"] for iteration in (0, 4, 5, 7, 8, 9, 10)]
    assert weights == [2, 2, 3, 3, 1, 1, 1]
    assert [own.loss.count("TS", *span) for span in ((0, 10), (0, 3), (3, 7), (6, 10))] == [5, 3, 2, 0]
    assert [own.loss.count("DS", *span) for span in ((0, 10), (3, 9))] == [10, 6]


def test_a_single_stage_is_the_loss_without_stages():
    found = []
    for string in ("1*DS+1*TS", "1*DS+1*TS@0-100%", "1*DS+1*TS@0-50%,1*DS+1*TS@50-100%"):
        own = make_trainer(f"--loss {string} --test_every 2")
        torch.manual_seed(0)
        found.append([own.step(*batch()), *own.student.state_dict().values()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_views_without_terms_in_a_stage_are_not_computed(monkeypatch):
    own = make_trainer("--loss 1*DS+1*TS@0-50%,1*DS@50-100% --test_every 2 --upcycle zoom_in")
    sizes = []
    run = own.distiller.run
    monkeypatch.setattr(own.distiller, "run", lambda net, lr, features, **precision: sizes.append(len(lr)) or run(
        net, lr, features, **precision))
    for own.iteration in range(2):
        own.step(*batch())
    assert sizes == [8, 8, 4]


def test_terms_of_other_stages_are_not_updated(monkeypatch):
    own = make_trainer("--loss 1*DS@0-50%,1*DS+1*GAN@50-100% --test_every 2")
    seen = []
    monkeypatch.setattr(own.loss.terms["GAN"], "update", lambda inputs: seen.append(inputs.iteration))
    for own.iteration in range(2):
        own.step(*batch())
    assert seen == [1]


def test_loss_csv_has_the_mean_over_the_iterations_of_each_term(run_main, flags, teacher, tmp_path):  # noqa: F811
    line = flags + f"--teacher {teacher} --lr 1e-30 --epochs 3 --test_every 4 --print_every 1 "
    means = {}
    for name, string in (("single", "1*DS+1*TS"), ("staged", "1*DS@0-50%,3*DS+1*TS@50-100%")):
        status, out, _ = run_main("train", line + f"--loss {string} --ckp_dir {tmp_path / name}")
        assert status == 0
        means[name] = rows(tmp_path / name / "loss.csv")
    staged = means["staged"]
    assert list(staged[0]) == ["epoch", "iteration", "lr", "total", "DS", "TS"]
    assert staged[0]["TS"] == "" and staged[0]["DS"] == staged[0]["total"] == means["single"][0]["DS"]
    assert float(staged[1]["total"]) == pytest.approx(float(staged[1]["DS"]) + float(staged[1]["TS"]) / 2, rel=1e-5)
    assert float(staged[2]["DS"]) == pytest.approx(3 * float(means["single"][2]["DS"]), rel=1e-5)
    assert staged[2]["TS"] == means["single"][2]["TS"]
    assert [("TS" in text) for text in out if "it/s" in text] == [False] * 6 + [True] * 6
    assert (tmp_path / "staged" / "loss_TS.png").exists()


@pytest.mark.parametrize("string, more", [
    ("1*DS+1*TS@0-40%,1*DS_MSE+1*fitnet@40-70%,1*TS+0.1*GAN@70-100%", "--label_consistency 0.3"),
    ("1*DS+1*TS", "--upcycle zoom_in+zoom_out --upcycle_every 3"),
    ("1*DS+1*TS", "--eco"), ("1*DS", "--eco --cache_teacher --decay cosine --lr_end 1e-5 --optimizer ADAMW"),
])
def test_a_run_stopped_anywhere_and_resumed_ends_bit_identical(run_main, flags, teacher, tmp_path, monkeypatch,  # noqa: F811
                                                               string, more):
    line = flags + f"--teacher [{teacher},{teacher}] --loss {string} {more} --epochs 2 --test_every 5 --save_every 1000 "
    assert run_main("train", line + f"--ckp_dir {tmp_path / 'whole'}")[0] == 0
    for stop in (3, 7):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "interrupted", lambda self, stop=stop: 130 * (self.iteration == stop))
            assert run_main("train", line + "--resume auto")[0] == 130
    assert run_main("train", line + "--resume 1")[0] == 0
    assert_same_weights(*(tmp_path / name / "model" / "model_latest.pt" for name in ("whole", "run")))
    for name in ("metrics.csv", "loss.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "run" / name).read_text()


def test_a_history_without_totals_is_that_of_an_older_run(run_main, flags, tmp_path):  # noqa: F811
    line = flags + "--loss 1*DS --lr 1e-30 --test_every 2 "
    assert run_main("train", line + "--epochs 1")[0] == 0
    before = rows(tmp_path / "run" / "loss.csv")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    del state["history"][0]["total"]
    torch.save(state, tmp_path / "run" / "state.pt")
    assert run_main("train", line + "--epochs 2 --resume 1")[0] == 0
    assert rows(tmp_path / "run" / "loss.csv")[:1] == before
