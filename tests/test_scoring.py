"""Mistakes and names in test.py and compare.py, and a loading process that is killed."""
import pytest
import torch
from checkpoint import save_model
from model.edsr import EDSR
from system import errors


@pytest.fixture
def run_of(tmp_path):
    """run_of(name, scale) -> the checkpoint of a run of that name."""
    def make(name, scale=2, n_feats=8):
        torch.manual_seed(0)
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.txt").write_text("")
        save_model(EDSR(scale, n_resblocks=1, n_feats=n_feats), tmp_path / name / "model" / "model_best.pt")
        return tmp_path / name / "model" / "model_best.pt"
    return make


@pytest.fixture
def flags(tiny_data, tmp_path):
    return f"--cpu --dir_data {tiny_data} --data_test tiny --ckp_dir {tmp_path / 'out'} "


def test_checkpoints_of_one_name_are_compared_beside_each_other(run_main, run_of, flags):
    status, out, _ = run_main("compare", flags + f"--ckp_path {run_of('A')}+{run_of('B')}")
    assert status == 0 and [line.split()[0] for line in out[-4:-1]] == ["bicubic", "A/model/model_best.pt",
                                                                       "B/model/model_best.pt"]


@pytest.mark.parametrize("names, words", [
    ("bicubic={A}", "another label"), ("a={A}+b={x3}", "different scales, a x2, b x3;"), ("x=Nothing", "--ckp_path Nothing"),
    ("x={A}++", "not a list")])
def test_a_wrong_comparison_gets_one_line(run_main, run_of, flags, names, words):
    status, _, err = run_main("compare", flags + "--ckp_path " + names.format(A=run_of("A"), x3=run_of("x3", 3)))
    assert status == 2 and len(err) == 1 and words in err[0]


def test_a_file_in_the_place_of_the_folder_is_named_before_anything_is_scored(run_main, run_of, flags, tmp_path):
    (tmp_path / "out").write_text("")
    for script, extra in (("compare", ""), ("test", " --save_results")):
        status, _, err = run_main(script, flags + f"--ckp_path {run_of(script)}{extra}")
        assert status == 2 and len(err) == 1 and "out" in err[0] and "cannot write" in err[0]


def test_images_of_a_runs_checkpoint_go_to_the_run(run_main, run_of, tiny_data, tmp_path):
    flags = f"--cpu --dir_data {tiny_data} --data_test tiny --save_results --ckp_path {run_of('A')}"
    assert run_main("test", flags)[0] == 0
    assert len(list((tmp_path / "A" / "results-tiny").iterdir())) == 4


def test_a_teacher_to_score_is_one_file_of_any_name(run_main, run_of, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_of("A").rename(tmp_path / "weights")
    assert run_main("test", flags + "--TS T --teacher weights --patch_size 7")[0] == 0
    status, _, err = run_main("test", flags + "--TS T --teacher [weights,RCAN]")
    assert status == 2 and "one at a time" in err[-1]


def test_the_width_of_a_preset_scores_the_slice(run_main, run_of, flags):
    status, out, _ = run_main("test", flags + f"--template CSD --ckp_path {run_of('A', n_feats=16)}")
    assert status == 0 and any("n_feats 4," in line for line in out)


def test_a_killed_worker_is_one_line(capsys):
    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == 2 and "--n_threads" in capsys.readouterr().err
