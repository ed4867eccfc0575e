"""CSD, VGG and T_DS: the authors' numbers, plain formulas, and where the paper and its code differ."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import loss
import option
from checkpoint import save_model
from conftest import GOLDEN
from loss import contrastive, vgg
from loss.contrastive import contrast_cos, contrast_l1, draw_negatives
from model import load_model
from model.rcan import RCAN
from system.errors import UserError

CSD = json.loads((GOLDEN / "losses_and_metrics.json").read_text())["CSD_contrast"]
SHAPES = (4, 4, 16, 16), (4, 8, 8, 8), (4, 16, 4, 4), (4, 32, 2, 2), (4, 32, 1, 1)
WEIGHTS = 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1


def levels(first, count=4):
    return [torch.from_numpy(np.random.RandomState(first + level).standard_normal((count, *shape[1:])).astype(np.float32))
            for level, shape in enumerate(SHAPES)]


def small(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 2, side, side, dtype=torch.float64, generator=generator) for side in (3, 2, 2, 1, 1)]


@pytest.fixture(scope="module")
def shared():
    """Feature networks that these tests share: VGG-19."""
    return {}


@pytest.fixture
def make_loss(shared):
    def make(string, line=""):
        args = option.parse(["--feature_net", "random", "--neg_num", "2", "--batch_size", "3", *line.split()])
        return loss.build_loss(string, loss.Context(args, None, [], shared=shared))
    return make


def make_step(count=3, side=16, **more):
    torch.manual_seed(1)
    lr, hr, student, teacher = (255 * torch.rand(count, 3, size, size) for size in (side // 2, side, side, side))
    return loss.LossInputs(lr, hr, loss.Output(student.requires_grad_()), loss.Output(teacher), **more)


# ---- the contrast

@pytest.mark.parametrize("function, key", [(contrast_l1, "L1"), (contrast_cos, "cos")])
def test_contrast_agrees_with_the_authors(function, key):
    maps = levels(20), levels(30), levels(40, 3)
    assert function(*maps).item() == pytest.approx(CSD[key], rel=1e-5)
    everyone = torch.arange(3)[:, None].expand(3, 4)
    assert function(*maps, everyone).item() == pytest.approx(CSD[key], rel=1e-5)


@pytest.mark.parametrize("function", [contrast_l1, contrast_cos])
def test_contrast_with_negatives_of_each_anchor_is_its_formula(function):
    student, teacher, negatives = small(3, 1), small(3, 2), small(4, 3)
    chosen = torch.tensor([[1, 2, 0], [3, 0, 1]])
    total = 0
    for weight, s, t, n in zip(WEIGHTS, student, teacher, negatives):
        if function is contrast_l1:
            near = (s - t).abs().mean()
            apart = sum((s[a] - n[chosen[k, a]]).abs().mean() / 3 for k in range(2) for a in range(3))
            total += weight * near / (apart + 1e-7)
        else:
            near = (s * t).sum(0) / ((s**2).sum(0).sqrt() * (t**2).sum(0).sqrt())
            apart = [s[a] / s[a].norm() * sum(n[chosen[k, a]] / n[chosen[k, a]].norm() for k in range(2)) for a in range(3)]
            total += weight * -torch.log(near.mean().exp() / (torch.stack(apart).mean().exp() + 1e-7))
    assert function(student, teacher, negatives, chosen).item() == pytest.approx(total.item(), rel=1e-9)


@pytest.mark.parametrize("function", [contrast_l1, contrast_cos])
@pytest.mark.parametrize("chosen", [None, torch.tensor([[1, 2, 0], [2, 0, 1]])])
def test_gradient_of_contrast_is_that_of_its_value(function, chosen):
    student = [x.requires_grad_() for x in small(3, 1)]
    assert torch.autograd.gradcheck(lambda *maps: function(maps, small(3, 2), small(3, 3), chosen), student)


def test_gradient_of_L1_contrast_with_many_negatives_does_not_overflow():
    values = []
    for count in (100, 200):
        student = [torch.ones(1, 1, 1, 1, requires_grad=True) for _ in range(5)]
        contrast_l1(student, [torch.full((1, 1, 1, 1), 3.0)] * 5, [torch.zeros(count, 1, 1, 1)] * 5).backward()
        values.append(count * student[0].grad.item())  # d(2 / (count s)) / ds + d(|s - 3| / count) / ds at s = 1
    assert values[0] == pytest.approx(-3 / 32, rel=1e-4) and values[1] == pytest.approx(values[0], rel=1e-4)


def test_no_anchor_is_its_own_negative():
    for count in range(1, 6):
        seen = np.zeros((6, 6), int)
        for _ in range(40):
            chosen = draw_negatives(6, count)
            assert chosen.shape == (count, 6) and (chosen != torch.arange(6)).all()
            assert all(len(set(column.tolist())) == count for column in chosen.T)
            np.add.at(seen, (np.arange(6)[None].repeat(count, 0), chosen.numpy()), 1)
        assert (seen + np.eye(6) > 0).all()  # any other image can be one


# ---- CSD

def test_CSD_is_the_contrast_of_VGG_features(make_loss, shared):
    step, chosen = make_step(), torch.tensor([[1, 2, 0], [2, 0, 1]])  # of 2 out of 2 the order alone is random
    args = option.parse(["--feature_net", "random"])
    net = shared.get("vgg") or vgg.shared_vgg(loss.Context(args, None, [], shared=shared))
    upsampled = F.interpolate(step.lr, scale_factor=2, mode="bicubic")  # neither antialias nor a = -0.5, as in CSD's code
    for d_func, function in (("L1", contrast_l1), ("cos", contrast_cos)):
        expected = function(net(step.student.sr), net(step.teacher.sr), net(upsampled), chosen)
        step.cache.clear()
        assert make_loss("CSD", f"--d_func {d_func}")(step)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_teacher_and_negatives_keep_no_graph(make_loss):
    step = make_step()
    step.teacher.sr.requires_grad_()
    step.lr.requires_grad_()
    step.hr.requires_grad_()
    make_loss("CSD+VGG")(step)[0].backward()
    assert step.student.sr.grad.abs().sum() > 0
    assert step.teacher.sr.grad is None and step.lr.grad is None and step.hr.grad is None


def test_each_image_goes_through_VGG_once(make_loss, shared):
    criterion, step, seen = make_loss("CSD+VGG"), make_step(), []
    handle = shared["vgg"].register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))
    criterion(step)
    handle.remove()
    assert sorted(seen) == [3, 3, 6]  # student; HR; teacher with the upsampled LR images


def test_CSD_draws_its_negatives_reproducibly(make_loss):
    criterion, step, values = make_loss("CSD", "--neg_num 1"), make_step(), []
    for _ in range(2):
        torch.manual_seed(5)
        step.cache.clear()
        values.append(criterion(step)[0].item())
    assert values[0] == values[1]


@pytest.mark.parametrize("line, words", [("--batch_size 1", "--batch_size 3 or more$"),
                                         ("--neg_num 3", "--batch_size 4 or more or --neg_num 2 at most"),
                                         ("--neg_num 10 --batch_size 10", "--batch_size 11 or more or --neg_num 9 at most")])
def test_more_negatives_than_other_images_are_refused(make_loss, line, words):
    with pytest.raises(UserError, match=f"CSD: --neg_num .*{words}"):
        make_loss("CSD", line)


def test_a_batch_smaller_than_promised_is_refused(make_loss):
    with pytest.raises(UserError, match="--neg_num 2"):
        make_loss("CSD")(make_step(count=2))


# ---- VGG, T_DS

def test_VGG_is_the_weighted_difference_of_five_levels(make_loss, shared):
    step = make_step()
    found = make_loss("VGG")(step)[0]
    maps = [shared["vgg"](x) for x in (step.student.sr, step.hr)]
    expected = sum(weight * (a - b).abs().mean() for weight, a, b in zip(WEIGHTS, *maps))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.needs_of("VGG") == {"hr"}


def test_T_DS_supervises_the_teacher_until_its_epoch():
    args = SimpleNamespace(t_l_remove=2, test_every=5, width_mult=0.5)
    term = contrastive.build_term("T_DS", loss.Context(args, None, []))
    graph = torch.rand(2, 3, 4, 4, requires_grad=True)
    step = make_step(2, 4, teacher_sr_with_grad=graph * 1)
    for iteration in range(12):
        step.iteration = iteration
        expected = (graph - step.hr).abs().mean().item() if iteration < 10 else 0
        assert term(step).item() == pytest.approx(expected)
    step.iteration = 9
    term(step).backward()
    assert graph.grad.abs().sum() > 0 and step.student.sr.grad is None
    assert loss.needs_of("T_DS") == {"hr", "teacher", "teacher_grad"}


# ---- a run

def test_a_run_with_CSD_and_VGG(run_main, tiny_data, tmp_path):
    torch.manual_seed(7)
    save_model(RCAN(2, n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4), tmp_path / "teacher.pt")
    line = (f"--model RCAN --n_resgroups 1 --n_resblocks 1 --n_feats 8 --reduction 4 --scale 2 --patch_size 24 --cpu "
            f"--batch_size 4 --n_threads 0 --dir_data {tiny_data} --data_train tiny --data_test tiny --epochs 1 "
            f"--ckp_dir {tmp_path / 'run'} --teacher {tmp_path / 'teacher.pt'} --test_every 2 "
            "--loss 1*DS+200*CSD+0.1*VGG ")
    status, _, err = run_main("train", line + "--feature_net random")
    assert status == 2 and err == ["error: CSD: --neg_num 10 negatives are other images of the batch, too many for "
                                   "--batch_size 4: give --batch_size 11 or more or --neg_num 3 at most"]
    status, _, err = run_main("train", line + f"--neg_num 3 --vgg_path {tmp_path / 'none.pth'}")
    assert status == 2 and len(err) == 1 and "bash scripts/download_teacher.sh vgg19" in err[0]
    status, out, _ = run_main("train", line + "--neg_num 3 --feature_net random")
    assert status == 0
    assert any("--feature_net random" in text for text in out)
    assert "--feature_net random" in (tmp_path / "run" / "config.txt").read_text()
    assert (tmp_path / "run" / "loss.csv").read_text().startswith("epoch,iteration,lr,total,DS,CSD,VGG")
    assert not any("vgg" in name for name in torch.load(tmp_path / "run" / "state.pt", weights_only=True)["loss"])
    load_model(tmp_path / "run" / "model" / "model_latest.pt")
