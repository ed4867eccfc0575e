"""Resuming: flags that win over the state, states that do not fit or are damaged, losses and the best epoch."""
import csv
import math
import zipfile

import pytest
import torch

import evaluation
import option
from loss import Context, adversarial, build_loss
from schedule import make_optimizer
from system.state import load_optimizer
from test_training import flags, rows  # noqa: F401

RUN = "--loss 1*DS+1*GAN --test_every 2 --save_every 1000 "


def load(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- flags of the optimiser

@pytest.mark.parametrize("optimizer, changed", [
    ("ADAMW", "--weight_decay 0.1"), ("ADAMW", "--betas 0.5,0.6"), ("MUON", "--weight_decay 0.1"),
    ("ADAM", "--weight_decay 0.1"), ("ADAM", "--betas 0.5,0.6"), ("ADAM", "--epsilon 0.1"),
    ("SGD", "--momentum 0"), ("SGD", "--weight_decay 0.1"), ("RMSprop", "--epsilon 0.1"), ("RMSprop", "--momentum 0"),
    ("RMSprop", "--weight_decay 0.1")])
def test_changed_settings_of_the_optimiser_take_effect(optimizer, changed):
    """As in an optimiser made with them that has the moments of the first."""
    weights = {}
    for name, line in (("resumed", changed), ("unchanged", ""), ("expected", "")):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(3, 2))
        first = make_optimizer(option.parse(["--optimizer", optimizer]), [parameter])
        (parameter ** 2).sum().backward()
        first.step()
        second = make_optimizer(option.parse(["--optimizer", optimizer, *line.split()]), [parameter])
        load_optimizer(second, first.state_dict())
        if name == "expected":
            fresh = make_optimizer(option.parse(["--optimizer", optimizer, *changed.split()]), [parameter]).param_groups[0]
            second.param_groups[0].update({key: value for key, value in fresh.items() if key != "params"})
        second.step()
        weights[name] = parameter.detach().clone()
    assert torch.equal(weights["resumed"], weights["expected"]) and not torch.equal(weights["resumed"], weights["unchanged"])


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop"])
def test_a_momentum_may_begin_on_resuming(optimizer):
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    parameter.grad = torch.ones(3, 2)
    first = make_optimizer(option.parse(["--optimizer", optimizer, "--momentum", "0"]), [parameter])
    first.step()
    second = make_optimizer(option.parse(["--optimizer", optimizer]), [parameter])
    load_optimizer(second, first.state_dict())
    second.step()
    assert second.param_groups[0]["momentum"] == 0.9 and second.state[parameter]["momentum_buffer"].abs().sum() > 0


@pytest.mark.parametrize("optimizer", ["ADAM", "ADAMW", "MUON", "SGD", "RMSprop"])
@pytest.mark.parametrize("wrong", [
    lambda state: state["state"][0].update({key: torch.zeros(7) for key in state["state"][0] if key != "step"}),
    lambda state: state["state"].update({5: state["state"][0]}), lambda state: state["state"].update({"0": {}}),
    lambda state: state.pop("state"), lambda state: state.pop("param_groups"), lambda state: state.update(state=[1]),
    lambda state: state["param_groups"].append(state["param_groups"][0]), lambda state: state["state"].update({0: 3}),
    lambda state: state["state"][0].update(dict.fromkeys(state["state"][0], 1.0)),
    lambda state: state["state"][0].update({key: x.double() for key, x in state["state"][0].items()}),
    lambda state: state["state"][0].update({key: x.to("meta") for key, x in state["state"][0].items()}),
    lambda state: state["state"][0].update({key: x * math.nan for key, x in state["state"][0].items()}),
    lambda state: state["state"][0].update({key: x.to_sparse() for key, x in state["state"][0].items()}),
    lambda state: state["state"][0].update(unknown=torch.zeros(3, 2))])
def test_an_odd_state_of_the_optimiser_is_refused(optimizer, wrong):
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    parameter.grad = torch.ones(3, 2)
    first = make_optimizer(option.parse(["--optimizer", optimizer]), [parameter])
    first.step()
    state = first.state_dict()
    wrong(state)
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError, RuntimeError)):
        load_optimizer(make_optimizer(option.parse(["--optimizer", optimizer]), [parameter]), state)


# ---- states that are damaged or odd

@pytest.fixture(scope="module", autouse=True)
def small_discriminator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversarial, "WIDTHS", (4,) * 8)
        patch.setattr(adversarial, "HIDDEN", 4)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_data):
    """The folder of a run of one epoch, and its flags without --ckp_dir."""
    import sys  # noqa: PLC0415

    import train  # noqa: PLC0415
    from test_training import TINY  # noqa: PLC0415
    folder = tmp_path_factory.mktemp("saved") / "run"
    line = f"{TINY} --dir_data {tiny_data} --data_train tiny --data_test tiny --n_threads 0 {RUN}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *line.split(), "--epochs", "1", "--ckp_dir", str(folder)])
        assert train.main() == 0
    return folder, line


def at(*path):
    """Function that replaces the entry at that path by what it is given."""
    def put(state, value):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value
    return put


FIELDS = "identity", "iteration", "history", "sums", "student", "loss", "optimizer", "scaler", "random"
ODD = {
    **{f"no {name}": (lambda state, name=name: state.pop(name)) for name in FIELDS},
    **{f"{name} is {value!r}": (lambda state, name=name, value=value: state.update({name: value}))
       for name in FIELDS for value in (None, "text", 7.5, [1]) if name != "scaler"},
    "empty": lambda state: state.clear(),
    "iteration -1": lambda state: state.update(iteration=-1),
    "iteration True": lambda state: state.update(iteration=True),
    "iteration far": lambda state: state.update(iteration=10**30),
    "weights of another shape": lambda state: at("student", next(iter(state["student"])))(state, torch.zeros(5)),
    "weights of int8": lambda state: state["student"].update({k: v.to(torch.int8) for k, v in state["student"].items()}),
    "weights of NaN": lambda state: state["student"].update({k: v * math.nan for k, v in state["student"].items()}),
    "weights of float64": lambda state: state["student"].update({k: v.double() for k, v in state["student"].items()}),
    "weights sparse": lambda state: state["student"].update({k: v.to_sparse() for k, v in state["student"].items()}),
    "an unknown weight": lambda state: state["student"].update(more=torch.zeros(1)),
    "a weight missing": lambda state: state["student"].pop(next(iter(state["student"]))),
    "sums of another number": lambda state: state.update(sums=torch.zeros(5, dtype=torch.float64)),
    "sums of float32": lambda state: state.update(sums=torch.zeros(2)),
    "random state of another size": lambda state: state.update(random=torch.zeros(8, dtype=torch.uint8)),
    "random state of zeros": lambda state: state.update(random=torch.zeros_like(state["random"])),
    "random state of floats": lambda state: state.update(random=state["random"].float()),
    "moments of another shape": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "squared moments of another shape": lambda state: state["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(10**6)),
    "no moments": lambda state: state["optimizer"]["state"].update({0: {}}),
    "step of another shape": lambda state: state["optimizer"]["state"][0].update(step=torch.zeros(9)),
    "discriminator's moments of another shape":
        lambda state: state["loss"]["terms.GAN._extra_state"]["state"][0].update(exp_avg=torch.ones(3)),
    "discriminator's optimiser is text":
        lambda state: state["loss"].update({"terms.GAN._extra_state": "text"}),
    "discriminator of another shape": lambda state: state["loss"].update(
        {key: torch.zeros(2) for key in state["loss"] if key.endswith("weight")}),
    "history of numbers": lambda state: state.update(history=[1]),
    "history without scores": lambda state: state["history"][0].pop("scores"),
    "history with text": lambda state: state["history"][0].update(lr="text"),
    "history of epoch 3": lambda state: state["history"][0].update(epoch=3),
    "history of a later iteration": lambda state: state["history"][0].update(iteration=3),
    "history with a path": lambda state: state["history"][0].update(scores={"../../x": (1.0, 1.0)}),
    "history with another term": lambda state: state["history"][0].update(loss={"../x": 1.0}),
    "history with a NaN loss": lambda state: state["history"][0]["loss"].update(DS=math.nan),
    "gradients of another number": lambda state: state.update(gradients=torch.zeros(2, dtype=torch.float64)),
    "gradients of NaN": lambda state: state["gradients"].fill_(math.nan),
    "history with gradients of another term": lambda state: state["history"][0].update(gradients={"CSD": 1.0}),
    "history with a NaN gradient": lambda state: state["history"][0].update(gradients={"DS": 1.0, "GAN": math.nan}),
    "history with images of another set": lambda state: state["history"][0].update(images={"x": [("0", 1.0, 1.0)]}),
    "history with images without SSIM": lambda state: state["history"][0].update(images={"tiny": [("0", 1.0)]}),
    "history with an image of a number": lambda state: state["history"][0].update(images={"tiny": [(0, 1.0, 1.0)]}),
    "history with images of numbers": lambda state: state["history"][0].update(images={"tiny": [1.0]}),
    "history with three scores": lambda state: state["history"][0].update(scores={"tiny": (1.0, 1.0, 1.0)}),
    "history with no pair": lambda state: state["history"][0].update(scores={"tiny": 1.0}),
    "identity of another network": lambda state: state["identity"].update(network="EDSR"),
    "identity of a tensor": lambda state: state["identity"].update(network=torch.zeros(3)),
}


@pytest.fixture(scope="module")
def resume(saved):
    """resume(bytes of state.pt) -> message of the UserError, without training; the networks are made once."""
    from types import SimpleNamespace  # noqa: PLC0415

    from checkpoint import load_state_file  # noqa: PLC0415
    from data import Crops, make_benchmarks  # noqa: PLC0415
    from distiller import build_distiller  # noqa: PLC0415
    from model.roles import make_networks  # noqa: PLC0415
    from system.errors import UserError  # noqa: PLC0415
    from trainer import Trainer  # noqa: PLC0415
    folder, line = saved
    args = option.parse(f"{line} --epochs 2".split())
    crops, benchmarks = Crops(args), make_benchmarks(args)

    def make(path):
        student, _ = make_networks(args, set())
        criterion = build_loss(args.loss, Context(args, student, []))
        try:
            experiment = SimpleNamespace(state=load_state_file(path), folder=path.parent)
            Trainer(args, build_distiller(args, student, [], criterion), crops, benchmarks, experiment,
                    torch.device("cpu"))
        except UserError as error:
            return str(error)
    assert make(folder / "state.pt") is None
    return make


@pytest.mark.parametrize("name", ODD)
def test_an_odd_state_gets_one_line(saved, resume, tmp_path, name):
    state = load(saved[0])
    ODD[name](state)
    torch.save(state, tmp_path / "state.pt")
    message = resume(tmp_path / "state.pt")
    assert len(message) < 500
    assert any(words in message for words in ("state.pt: not the state", "is another one", "does not fit"))


def test_a_state_of_an_earlier_version_is_resumed(saved, resume, tmp_path):
    state = load(saved[0])
    del state["gradients"], state["history"][0]["images"]
    torch.save(state, tmp_path / "state.pt")
    assert resume(tmp_path / "state.pt") is None


@pytest.mark.parametrize("content", [None, [], 0, "text", torch.zeros(3)])
def test_a_state_that_is_no_dict_gets_one_line(resume, tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    assert "not the state of a run" in resume(tmp_path / "state.pt")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"half a file", lambda data: data[:len(data) // 2],
                                    lambda data: data[:-1], lambda data: b"PK\3\4" + bytes(100)])
def test_a_damaged_file_gets_one_line_without_advice_to_run_code(saved, resume, tmp_path, damage):
    (tmp_path / "state.pt").write_bytes(damage((saved[0] / "state.pt").read_bytes()))
    message = resume(tmp_path / "state.pt")
    assert "state.pt" in message and "--reset starts the run anew" in message and "weights_only" not in message


def test_a_flipped_bit_is_found(saved, resume, tmp_path):
    data = bytearray((saved[0] / "state.pt").read_bytes())
    with zipfile.ZipFile(saved[0] / "state.pt") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    data[largest.header_offset + 300 + largest.file_size // 2] ^= 1
    (tmp_path / "state.pt").write_bytes(data)
    assert "checksum" in resume(tmp_path / "state.pt")


def test_nothing_is_overwritten_by_a_refused_state(run_main, flags, saved, tmp_path):  # noqa: F811
    folder, line = tmp_path / "run", saved[1] + f"--ckp_dir {tmp_path / 'run'} --epochs 2 --resume "
    folder.mkdir()
    for change in (lambda state: state.clear(), lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3))):
        state = load(saved[0])
        change(state)
        torch.save(state, folder / "state.pt")
        before = contents(folder)
        for resuming in ("1", "auto"):
            status, _, err = run_main("train", line + resuming)
            assert status == 2 and len(err) == 1 and err[0].startswith("error: ") and "state.pt: not the state" in err[0]
        assert contents(folder) == before


# ---- losses and scores

def test_the_losses_of_an_epoch_are_means_over_its_own_iterations(run_main, flags, tmp_path, monkeypatch):  # noqa: F811
    """Whatever --test_every was when the epoch began: iteration k has loss k here."""
    from loss.pixel import DataSupervision  # noqa: PLC0415
    forward = DataSupervision.forward
    monkeypatch.setattr(DataSupervision, "forward", lambda self, step: 0 * forward(self, step) + step.iteration)
    line = flags + "--loss 1*DS --print_every 1 "
    assert run_main("train", line + "--test_every 5 --epochs 1")[0] == 0
    assert run_main("train", line + "--test_every 4 --epochs 2 --resume 1")[0] == 0  # 3 iterations more
    assert run_main("train", line + "--test_every 6 --epochs 3 --resume 1")[0] == 2  # 8 iterations are not 2 x 6
    assert run_main("train", line + "--test_every 3 --epochs 4 --resume 1")[0] == 0  # 1 and 3 more
    found = [float(row["DS"]) for row in rows(tmp_path / "run" / "loss.csv")]
    assert found == [2, 6, 8, 10]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "[7/8] loss 5.5000 DS 5.5000" in log and "[8/8] loss 6.0000" in log and "[9/12] loss 8.0000" in log


def test_another_first_test_set_is_refused(run_main, flags, tiny_data, tmp_path):  # noqa: F811
    for name, images in (("fewer", 2), ("same", 4)):
        (tiny_data / name / "HR").mkdir(parents=True, exist_ok=True)
        for index in range(images):
            (tiny_data / name / "HR" / f"{index}.png").write_bytes((tiny_data / "tiny" / "HR" / f"{index}.png").read_bytes())
    line = flags + "--loss 1*DS --test_every 1 "
    assert run_main("train", line + "--epochs 1")[0] == 0
    before = contents(tmp_path / "run")
    for other in ("same", "same+tiny"):
        status, _, err = run_main("train", line + f"--epochs 2 --resume 1 --data_test {other}")
        assert status == 2 and "first test set: tiny, 4 images, not same, 4 images" in err[-1]
    assert contents(tmp_path / "run") == before
    assert run_main("train", line + "--epochs 2 --resume 1 --data_test tiny+fewer")[0] == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [row["dataset"] for row in csv.DictReader(file)] == ["tiny", "tiny", "fewer"]


def history(*psnrs):
    return [dict(epoch=epoch, scores={"A": (psnr, 0.9)}) for epoch, psnr in enumerate(psnrs, 1)]


@pytest.mark.parametrize("psnrs, found", [
    ((30.0, 31.0, 29.0), {"A": (31.0, 2)}), ((30.0, 30.0), {"A": (30.0, 1)}), ((math.nan, 30.0, math.nan), {"A": (30.0, 2)}),
    ((math.nan,), {})])
def test_the_best_epoch_is_the_first_highest_and_never_nan(psnrs, found):
    assert evaluation.best(history(*psnrs)) == found


@pytest.mark.parametrize("exact, psnr", [(0, 31.5), (1, 32.0), (4, math.inf)])
def test_exact_images_are_left_out_of_the_mean_and_the_log_has_their_number(monkeypatch, caplog, exact, psnr):
    from types import SimpleNamespace  # noqa: PLC0415
    values = iter([math.inf] * exact + [30.0, 31.0, 32.0, 33.0][exact:])
    monkeypatch.setattr(evaluation, "psnr", lambda *_: next(values))
    monkeypatch.setattr(evaluation, "ssim", lambda *_: 0.5)
    monkeypatch.setattr(evaluation.log, "propagate", True)
    images = type("Images", (), dict(name="A", shave=2, pairs=[SimpleNamespace(name="x", hr="x")] * 4, lr=lambda *_: 0,
                                     hr=lambda *_: 0, __len__=lambda _: 4))()
    with caplog.at_level("INFO", "sr"):
        score = evaluation.score(lambda lr: lr, images)
    assert (score.psnr, score.ssim) == (psnr, 0.5)
    lines = {record.getMessage() for record in caplog.records}
    assert lines == ({f"A: {exact} of 4 images are exact; their infinite PSNR is left out of the mean"} if exact else set())
