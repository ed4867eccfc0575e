"""ECO: the schedule, the mixtures, what the student and the teacher are given, with and without a cache."""
import numpy as np
import pytest
import torch

from data import degrade, eco
from model.edsr import EDSR
from model.rcan import RCAN
from test_distributed import make_trainer
from test_teacher_cache import calls, flags, root, teacher  # noqa: F401
from test_training import rows

LINE = "--loss 1*DS --eco --epochs 1 --test_every 10 "


def batch():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=generator) for side in (16, 32))


def test_the_schedule_is_that_of_the_published_code():
    """There: x = 10 (t - 0.5); clamp(1.2 (sigmoid(x) - 0.5), -0.5, 0.5) + 0.5 is the weight of HR."""
    times = np.linspace(0, 1, 101)
    published = np.clip(1.2 * (1 / (1 + np.exp(-10 * (times - 0.5))) - 0.5), -0.5, 0.5) + 0.5
    assert [eco.weight_of_hr(t) for t in times] == pytest.approx(published, abs=1e-12)
    assert eco.weight_of_hr(0) == eco.weight_of_hr(0.25) == 0 and eco.weight_of_hr(0.75) == eco.weight_of_hr(1) == 1


@pytest.mark.parametrize("rgb_range", [255, 1])
def test_mixtures_are_those_of_8_bit_images(rgb_range):
    lr, hr = (x * (rgb_range / 255) for x in batch())
    output = (hr * (255 / rgb_range) * 0.9 + 30.33) * (rgb_range / 255)  # partly above the range
    image = np.clip(np.rint(output.numpy() * (255 / rgb_range)), 0, 255).astype(np.uint8)
    small = np.stack([degrade.downscale(x.transpose(1, 2, 0), 2).transpose(2, 0, 1) for x in image])
    for weight in (0, 0.25, 1):
        mixed = eco.mix(lr, hr, output, weight, 2, rgb_range)
        for found, own, other in zip(mixed, (lr, hr), (small, image)):
            expected = weight * own.numpy() + (1 - weight) * other * (rgb_range / 255)
            assert np.abs(found.numpy() - expected).max() < 1e-4 * rgb_range / 255


@pytest.mark.parametrize("more", ["", "--split_batch 2", "--rgb_range 1", "--precision bf16", "--teacher_precision bf16"])
def test_student_and_loss_are_given_the_mixtures(more, monkeypatch):
    trainer = make_trainer(LINE + more)
    lr, hr = batch()
    seen = []
    monkeypatch.setattr(trainer.loss, "update", seen.append)
    student, inputs = trainer.distiller.run, []
    monkeypatch.setattr(trainer.distiller, "run", lambda net, x, *options, **others: inputs.append((net, x)) or student(
        net, x, *options, **others))
    own = [trainer.distiller.to_input(x) for x in (lr, hr)]
    output = student(trainer.distiller.teachers[0], own[0], False, trainer.distiller.teacher_precision).sr.detach()
    for trainer.iteration in (0, 5, 9):
        inputs.clear()
        trainer.step(lr, hr)
        weight = eco.weight_of_hr(trainer.iteration / 10)
        expected = eco.mix(*own, output, weight, 2, trainer.args.rgb_range) if weight < 1 else own
        rgb_range = trainer.args.rgb_range
        atol = (2 if "bf16" in more else 1) * rgb_range / 255  # of the rounding to 8 bit, where outputs differ by an ulp
        for found, other in zip((seen[-1].lr, seen[-1].hr), expected):
            assert torch.allclose(found, other, rtol=0, atol=atol) and (found - other).abs().mean() < 0.01 * atol
        assert torch.equal(torch.cat([x for net, x in inputs if net is trainer.student]), seen[-1].lr)
        assert any(net is not trainer.student for net, _ in inputs) == (weight < 1)


def test_terms_compare_with_the_teachers_output_for_the_mixture():
    trainer = make_trainer(LINE + "--loss 1*TS")
    trainer.iteration = 4
    _, _, inputs = trainer.distiller(*batch(), iteration=4)
    with torch.no_grad():
        expected = trainer.distiller.teachers[0](inputs.lr)
    assert torch.allclose(inputs.teacher.sr, expected, rtol=1e-5, atol=1e-3)


def test_views_are_made_of_the_original_images():
    views = []
    for more in ("", "--eco"):
        trainer = make_trainer(f"--loss 1*DS+1*TS --upcycle zoom_in+zoom_out --test_every 10 {more}")
        steps, forward = [], trainer.loss.forward
        trainer.loss.forward = lambda *inputs, steps=steps, forward=forward, **options: steps.extend(inputs) or forward(
            *inputs, **options)
        trainer.distiller(*batch())
        views.append(steps)
    assert [view.view for view in views[1]] == ["original", "zoom_in", "zoom_out"]
    assert not torch.equal(views[0][0].lr, views[1][0].lr)
    assert all(torch.equal(a.lr, b.lr) for a, b in zip(views[0][1:], views[1][1:]))


def test_the_student_of_random_teachers_draws_one_for_mixture_and_terms():
    torch.manual_seed(0)
    trainer = make_trainer(LINE + "--loss 1*TS")
    trainer.distiller.teachers.append(EDSR(2, n_resblocks=1, n_feats=8))
    drawn = set()
    for _ in range(8):
        _, _, inputs = trainer.distiller(*batch(), iteration=0)
        with torch.no_grad():
            own = [torch.allclose(inputs.teacher.sr, net(inputs.lr), rtol=1e-5, atol=1e-3)
                   for net in trainer.distiller.teachers]
            full = [net(batch()[0].float()).round().clamp(0, 255) for net in trainer.distiller.teachers]
        assert own == [(x - inputs.hr).abs().mean() < 0.01 for x in full] and sum(own) == 1
        drawn.add(own.index(True))
    assert drawn == {0, 1}


@pytest.mark.parametrize("loss, later, words", [
    ("1*DS", [], "the teacher is not run during training"),
    ("1*DS+1*TS", [(4, 12, 12)] * 3, "the teacher still runs for TS (original batch)"),
    ("1*DS+1*AT", [(4, 12, 12)] * 4, "the teacher still runs for AT (original batch)")])
def test_cached_outputs_make_the_mixtures(run_main, flags, teacher, calls, loss, later, words):  # noqa: F811
    line = flags + f"--teacher {teacher} --loss {loss} --eco --cache_teacher --epochs 1 --test_every 4"
    status, out, _ = run_main("train", line)
    assert status == 0 and calls == [(1, 28, 32)] * 4 + later  # the last of 4 iterations has the real pairs, and its output
    assert any(words in text for text in out)


def test_a_loss_without_a_teacher_loads_one_for_it(run_main, flags, teacher, tmp_path):  # noqa: F811
    line = flags + f"--teacher {teacher} --loss 1*DS --lr 1e-30 --epochs 2 --test_every 4 "
    assert run_main("train", line + "--eco")[0] == 0
    assert run_main("train", line + f"--ckp_dir {tmp_path / 'plain'}")[0] == 0
    found, plain = (rows(tmp_path / name / "loss.csv") for name in ("run", "plain"))
    assert found[0]["DS"] != plain[0]["DS"]
    status, _, err = run_main("train", flags + "--loss 1*DS --eco --teacher missing.pt --reset")
    assert status == 2 and "no such file" in err[-1]


def test_a_teacher_that_is_trained_is_refused(run_main, flags):  # noqa: F811
    status, _, err = run_main("train", flags + "--loss 1*DS+1*T_DS --width_mult 0.5 --eco")
    assert status == 2 and len(err) == 1 and "--eco needs a fixed teacher" in err[0]


def test_it_learns_the_teacher_first():
    """In the first quarter the target is the teacher's output, which a copy of the teacher almost reproduces."""
    trainer = make_trainer(LINE)
    trainer.student.load_state_dict(trainer.distiller.teachers[0].state_dict())
    first, last = (trainer.distiller(*batch(), iteration=iteration)[0].item() for iteration in (0, 9))
    assert isinstance(trainer.student, RCAN) and first < last
