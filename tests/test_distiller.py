"""The training step as a module: what it returns, and that it can be wrapped as one."""
import pytest
import torch

import loss
import option
from data.views import plan
from distiller import build_distiller
from model import slim
from model.edsr import EDSR
from model.rcan import RCAN

SMALL = dict(n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4)
FLAGS = "--scale 2 --patch_size 16 --loss 1*DS+1*TS+10*SA --upcycle zoom_in+zoom_out --label_consistency 0.5 "


def make_distiller(more="", teachers=1):
    torch.manual_seed(0)
    args = option.parse((FLAGS + more).split())
    student, *others = RCAN(2, **SMALL), *(EDSR(2, n_resblocks=3, n_feats=12) for _ in range(teachers))
    criterion = loss.build_loss(args.loss, loss.Context(args, student, others, views=plan(args)))
    return build_distiller(args, student, others, criterion)


def batch():
    return tuple(torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8) for side in (8, 16))


def step(module, *tensors):
    """Run forward and backward with the same random numbers; return what forward returned."""
    torch.manual_seed(3)
    total, values, inputs = module(*tensors)
    total.backward()
    return total, values, inputs


def test_a_step_returns_the_loss_its_terms_and_detached_inputs():
    distiller = make_distiller()
    total, values, inputs = step(distiller, *batch())
    assert total.item() == pytest.approx(values.sum().item()) and not values.requires_grad
    assert inputs.view == "original" and inputs.student.sr.shape == (4, 3, 16, 16)
    assert not inputs.student.sr.requires_grad and not inputs.student.features and not inputs.teacher.features


def test_the_student_is_trained_and_teachers_are_not():
    distiller = make_distiller(teachers=2)
    step(distiller, *batch())
    trained = set(distiller.trainable_parameters())
    assert trained == {p for p in distiller.student.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained)
    assert not any(p.requires_grad for p in distiller.teachers.parameters())
    distiller.train()
    assert distiller.student.training and not any(net.training for net in distiller.teachers)


def test_cached_teacher_outputs_take_the_place_of_the_teacher(monkeypatch):
    distiller = make_distiller("--loss 1*TS --upcycle= --label_consistency 0")
    lr, hr = batch()
    monkeypatch.setattr(distiller.teachers[0], "forward", None)
    _, _, inputs = step(distiller, lr, hr, torch.full((4, 3, 16, 16), 128 * 10, dtype=torch.int16))
    assert (inputs.teacher.sr == 138).all()  # 128 + 10, in the fixed point of data/teacher_cache.py


@pytest.mark.parametrize("more", ["", "--teacher_choice mean"])
def test_of_several_cached_outputs_one_is_used_or_their_mean(more):
    distiller = make_distiller(f"--loss 1*TS --upcycle= --label_consistency 0 --teacher A+B+C {more}", teachers=3)
    outputs = torch.tensor([0, 10, 26], dtype=torch.int16).repeat_interleave(3).view(1, 9, 1, 1).expand(4, 9, 16, 16) * 128
    found = {step(distiller, *batch(), outputs)[2].teacher.sr.unique().item() for _ in range(3)}
    assert found == {140} if more else found < {128, 138, 154} and len(found) == 1  # `step` draws equal random numbers


def test_the_mean_of_running_teachers_on_every_view_and_for_other_inputs():
    line = "--loss 1*TS+1*LC --label_consistency 0 --teacher A+B --teacher_choice mean"
    distiller, (lr, hr) = make_distiller(line, teachers=2), batch()
    _, _, inputs = step(distiller, lr, hr)
    a, b = (net(lr.float()) for net in distiller.teachers[0].teachers)
    assert torch.allclose(inputs.teacher.sr, (a + b) / 2, atol=1e-3) and not torch.allclose(a, b, atol=1)
    assert torch.allclose(inputs.forward(inputs.teacher_net, lr.float()), (a + b) / 2, atol=1e-3)
    assert not any(p.requires_grad for p in distiller.teachers.parameters())


@pytest.mark.parametrize("line, words", [
    ("--teacher RCAN --teacher_choice mean", "applies to several teachers"),
    ("--teacher RCAN+EDSR --teacher_choice mean --loss 1*TS+1*SA", "1*TS+1*SA compares feature maps"),
])
def test_what_has_no_mean_is_refused(run_main, line, words):
    status, _, err = run_main("train", f"--cpu --scale 2 --ckp_dir absent {line}")
    assert status == 2 and len(err) == 1 and words in err[0]


def test_torch_compile_wraps_it():
    tensors, found = batch(), []
    for wrap in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        distiller = make_distiller()
        total, values, _ = step(wrap(distiller), *tensors)
        found.append([total, values, *(parameter.grad for parameter in distiller.trainable_parameters())])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found))


@pytest.mark.parametrize("line, student, teacher", [
    ("", None, None), ("--precision bf16", torch.bfloat16, torch.bfloat16),
    ("--teacher_precision bf16", None, torch.bfloat16),
    ("--precision bf16 --teacher_precision single", torch.bfloat16, None)])
def test_each_network_runs_in_its_precision(line, student, teacher):
    distiller = make_distiller(f"--loss 1*DS+1*TS+1*LC {line}")
    found = {}
    for net in (distiller.student, distiller.teachers[0]):
        net.register_forward_pre_hook(lambda net, _: found.setdefault(type(net), set()).add(
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
    _, _, inputs = step(distiller, *batch())
    assert found == {RCAN: {student}, EDSR: {teacher}} and inputs.teacher.sr.dtype == torch.float32


def test_a_teacher_that_is_trained_too_runs_in_the_precision_of_the_student():
    torch.manual_seed(0)
    teacher = EDSR(2, n_resblocks=1, n_feats=8)
    args = option.parse([*FLAGS.split()[:4], "--loss", "1*DS+1*T_DS", "--width_mult", "0.5", "--teacher_precision", "bf16"])
    student = slim(teacher, 0.5)
    distiller = build_distiller(args, student, [teacher], loss.build_loss(args.loss, loss.Context(args, student, [teacher])))
    enabled = []
    teacher.register_forward_pre_hook(lambda *_: enabled.append(torch.is_autocast_enabled("cpu")))
    step(distiller, *batch())
    assert enabled == [False]
