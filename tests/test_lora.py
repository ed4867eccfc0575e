"""Low-rank adapters: what they compute and train, merged models, EMA, resuming, and mistakes."""
import pytest
import torch

import option
from checkpoint import save_model
from model import describe, load_model
from model.carn import CARN_M
from model.edsr import EDSR
from model.lora import LowRankAdapted, merged, merged_parameters
from model.reparameterisation import Reparameterised
from model.roles import make_networks
from model.san import SAN
from model.span import SPAN
from model.swinir import SwinIR
from system.errors import UserError
from test_distributed import make_trainer
from test_training import assert_same_weights, flags, rows, teacher  # noqa: F401

SIZES = dict(n_resblocks=2, n_feats=8)
LORA = "--loss 1*DS+1*TS+10*SA --lora_rank 2 --lr 1e-2 --test_every 3 "


@pytest.fixture
def line(flags, teacher, tmp_path):  # noqa: F811
    """Flags of a run that fine-tunes tmp_path/pretrained.pt, without the sizes of the network."""
    torch.manual_seed(5)
    save_model(EDSR(2, **SIZES), tmp_path / "pretrained.pt")
    kept = flags[flags.index("--dir_data"):]
    return (f"--scale 2 --patch_size 24 --batch_size 4 --cpu {kept} --pre_train {tmp_path / 'pretrained.pt'} "
            f"--teacher {teacher} {LORA}")


def randomised(net):
    with torch.no_grad():
        for adapter in net.adapters:
            adapter.B.normal_(std=0.05)
    return net


@pytest.mark.parametrize("build", [
    lambda: EDSR(2, **SIZES), lambda: CARN_M(2, 8), lambda: SAN(2, 1, 1, 8, 4),
    lambda: SwinIR(2, depths=[2], n_feats=8, num_heads=[2], window_size=4, mlp_ratio=2)])
def test_it_begins_as_the_network_and_its_merged_network_computes_the_same(build):
    plain, x = build().eval(), 255 * torch.rand(1, 3, 8, 8)
    net = LowRankAdapted(plain, 2).eval()
    with torch.no_grad():
        first = plain(x)
        assert torch.equal(net(x), first) and describe(net) == describe(plain)
        second, feature_maps = randomised(net)(x, features=True)
        full = merged(net)
        assert not torch.allclose(second, first, atol=1) and len(feature_maps) == 4
        assert torch.allclose(full(x), second, rtol=1e-4, atol=1e-3) and torch.equal(plain(x), first)
    assert type(full) is type(plain) and merged(full) is full
    assert all(torch.equal(a, b) for a, b in zip(merged_parameters(net), full.parameters(), strict=True))


def test_only_the_adapters_of_convolutions_are_trained():
    net = randomised(LowRankAdapted(EDSR(2, **SIZES), 2))
    net(torch.rand(1, 3, 8, 8)).sum().backward()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {f"adapters.{index}.{matrix}" for index in range(8) for matrix in "AB"}
    assert all(net.get_parameter(name).grad.abs().sum() > 0 for name in trained)
    head, body = net.adapters[0], net.adapters[1]
    assert [x.shape for x in (head.A, head.B, body.A, body.B)] == [(6, 9), (24, 6), (6, 24), (24, 6)]
    change = merged(net).body[0].body[0].weight - net.net.body[0].body[0].weight
    assert torch.allclose(change, (body.B @ body.A).view(8, 8, 3, 3), atol=1e-6)


def test_a_run_saves_merged_models_and_learns(run_main, line, tmp_path):
    status, out, _ = run_main("train", line + "--epochs 3")
    assert status == 0 and any("adapters of 8 convolutions are trained, with" in text for text in out)
    losses = [float(row["DS"]) for row in rows(tmp_path / "run" / "loss.csv")]
    assert losses[-1] < losses[0]
    net, before = (load_model(path) for path in (tmp_path / "run" / "model" / "model_latest.pt", tmp_path / "pretrained.pt"))
    assert type(net) is EDSR and net.config == before.config
    for (name, after), parameter in zip(net.named_parameters(), before.parameters()):
        if after.dim() == 4 and after.shape[-1] == 3:
            change = (after - parameter).reshape(3 * after.shape[0], 3 * after.shape[1])
            assert 0 < torch.linalg.matrix_rank(change, atol=1e-5) <= 6, name
        else:
            assert torch.equal(after, parameter), name
    assert "student" in torch.load(tmp_path / "run" / "state.pt", weights_only=True)


@pytest.mark.parametrize("more", ["", "--ema 0.5"])
def test_a_resumed_run_ends_bit_identical(run_main, line, tmp_path, more):
    whole, parts = (line + f"{more} --ckp_dir {tmp_path / name} " for name in ("whole", "parts"))
    assert run_main("train", whole + "--epochs 2")[0] == 0
    assert run_main("train", parts + "--epochs 1")[0] == 0
    assert run_main("train", parts + "--epochs 2 --resume 1")[0] == 0
    for name in ("latest", "raw") if more else ("latest",):
        assert_same_weights(*(tmp_path / run / "model" / f"model_{name}.pt" for run in ("whole", "parts")))
    assert (tmp_path / "whole" / "loss.csv").read_text() == (tmp_path / "parts" / "loss.csv").read_text()


def test_an_average_may_begin_on_resuming_and_another_rank_is_refused(run_main, line, tmp_path):
    assert run_main("train", line + "--epochs 1")[0] == 0
    status, _, err = run_main("train", line + "--epochs 2 --resume 1 --lora_rank 3")
    assert status == 2 and len(err) == 1 and "resume it with its own flags" in err[0]
    assert run_main("train", line + "--epochs 2 --resume 1 --ema 0.999999")[0] == 0
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    ema, raw = (load_model(tmp_path / "run" / "model" / f"model_{name}.pt") for name in ("latest", "raw"))
    assert state["ema"].keys() == ema.state_dict().keys()
    assert not torch.equal(ema.body[0].body[0].weight, raw.body[0].body[0].weight)


def test_the_average_is_that_of_the_merged_weights():
    trainer = make_trainer("--loss 1*DS --lora_rank 2 --pre_train p.pt --ema 0.75 --optimizer ADAM --lr 0.1")
    expected = [x.clone() for x in trainer.ema.parameters()]
    for _ in range(3):
        trainer.step(*(torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8) for side in (16, 32)))
        weights = merged_parameters(trainer.student)
        expected = [0.75 * average + 0.25 * x for average, x in zip(expected, weights, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trainer.ema.parameters(), expected, strict=True))
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, trainer.student.net.parameters()))


@pytest.mark.parametrize("more, words", [
    ("--lora_rank 9", "the convolutions of EDSR have at most 8 channels"),
    ("--pre_train=", "give --pre_train FILE"),
    ("--width_mult 0.5", "--width_mult trains them"),
    ("--init_from_teacher", "--init_from_teacher replaces them"),
    ("--scale 3", "is a network for scale 2, whose upsampler does not fit --scale 3"),
    ("--lora_rank 0", "--lora_rank"),
])
def test_mistakes_get_one_line(run_main, line, tmp_path, more, words):
    status, _, err = run_main("train", line + more)
    assert status == 2 and len(err) == 1 and words in err[0] and not (tmp_path / "run").exists()


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(UserError, match="at most 0 channels"):
        LowRankAdapted(torch.nn.Linear(2, 2), 1)


def test_adapters_of_span_are_those_of_its_fused_convolutions(tmp_path):
    save_model(SPAN(2, 8), tmp_path / "span.pt")
    line = f"--pre_train {tmp_path / 'span.pt'} --model SPAN --n_feats 8 --scale 2 --loss 1*DS --lora_rank 2"
    args = option.parse(line.split())
    student, _ = make_networks(args, set())
    x = 255 * torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(student.eval()(x), load_model(tmp_path / "span.pt")(x), rtol=1e-4, atol=0.05)
    assert not any(isinstance(module, Reparameterised) for module in student.modules())
