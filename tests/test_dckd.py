"""DCKD's DCR and DMM: the authors' numbers, the history model, the degradations, and runs that resume exactly."""
import json

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

import checkpoint
import loss
import option
from checkpoint import save_model
from conftest import GOLDEN
from loss import degradation, vqgan
from loss.contrastive import contrast_l1
from loss.degradation import degrade
from loss.distribution import cross_entropy
from model import slim
from model.lora import LowRankAdapted, merged_parameters
from model.rcan import RCAN

DCKD = json.loads((GOLDEN / "losses_and_metrics.json").read_text())["DCKD"]
SHAPES = (4, 4, 16, 16), (4, 8, 8, 8), (4, 16, 4, 4), (4, 32, 2, 2), (4, 32, 1, 1)
SIZES = dict(n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4)


@pytest.fixture(autouse=True)
def small_vqgan(monkeypatch):
    monkeypatch.setattr(vqgan, "F16_1024", dict(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attention=(4,),
                                                z_channels=8, embed_dim=8, n_embed=16))
    torch.manual_seed(0)


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def make_loss(string, student=None, line=""):
    args = option.parse(["--feature_net", "random", *line.split()])
    setting = loss.Context(args, student or RCAN(2, **SIZES), [])
    return loss.build_loss(string, setting), setting


def make_step(student, count=2):
    torch.manual_seed(1)
    lr = 255 * torch.rand(count, 3, 8, 8)
    return loss.LossInputs(lr, None, loss.Output(student(lr)), loss.Output(255 * torch.rand(count, 3, 16, 16)),
                     forward=lambda net, x: net(x))


# ---- the authors' numbers and gradients

def test_DCR_agrees_with_the_authors():
    student, teacher = ([normal(first + level, shape) for level, shape in enumerate(SHAPES)] for first in (20, 30))
    negatives = [torch.cat([normal(100 + 10 * level + j, shape) for j in range(5)]) for level, shape in enumerate(SHAPES)]
    chosen = torch.arange(20).view(5, 4)
    assert contrast_l1(student, teacher, negatives, chosen).item() == pytest.approx(DCKD["DCR"], rel=1e-5)


def test_DMM_is_the_papers_formula_without_a_second_softmax():
    student, teacher = normal(200, (32, 24)), normal(201, (32, 24))
    assert cross_entropy(student, teacher).item() == pytest.approx(DCKD["DMM_paper"], rel=1e-5)
    published = F.cross_entropy(student.softmax(1), teacher.softmax(1)).item()
    assert published == pytest.approx(DCKD["DMM_upstream_code"], rel=1e-5)
    assert abs(published - DCKD["DMM_paper"]) > 0.1


def test_the_second_softmax_divides_the_gradient_by_the_number_of_codes():
    """As the table of departures in scripts/README.md states."""
    for codes, ratio in (24, 0.044), (1024, 0.0011):
        student, teacher = normal(200, (32, codes)).requires_grad_(), normal(201, (32, codes))
        paper, = torch.autograd.grad(cross_entropy(student, teacher), student)
        published, = torch.autograd.grad(F.cross_entropy(student.softmax(1), teacher.softmax(1)), student)
        assert (published.norm() / paper.norm()).item() == pytest.approx(ratio, rel=0.05)


def test_gradients_of_cross_entropy():
    student, teacher = normal(1, (5, 4)), normal(2, (5, 4))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, teacher), student.requires_grad_())
    torch.autograd.backward(cross_entropy(student, teacher))  # of a cross-entropy it is known
    assert torch.allclose(student.grad, (student.softmax(1) - teacher.softmax(1)).detach() / 5)


def test_divergence_of_far_logits_is_finite():
    student, teacher = 1e4 * normal(1, (5, 4)).float(), 1e4 * normal(2, (5, 4)).float()
    value = cross_entropy(student.requires_grad_(), teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_DMM_compares_codes_of_images():
    student = RCAN(2, **SIZES)
    criterion, setting = make_loss("DMM", student)
    step, net = make_step(student), setting.shared["vqgan"]
    found = criterion(step)[0]
    codes = net.quantize.embedding.weight

    def distribution(sr):
        z = net.latent(net.feature_maps(2 * sr / 255 - 1)[-1])
        d = ((z[:, None] - codes[None, :, :, None, None]) ** 2).sum(2)  # N x codes x h x w
        return (d.amax(1, keepdim=True) - d).softmax(1)
    expected = -(distribution(step.teacher.sr) * distribution(step.student.sr).log()).sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


# ---- the terms in a step

def test_teacher_and_negatives_keep_no_graph():
    student = RCAN(2, **SIZES)
    criterion, _ = make_loss("DCR+DMM", student)
    step = make_step(student)
    step.teacher.sr.requires_grad_()
    criterion(step)[0].backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    assert step.teacher.sr.grad is None
    assert all(p.grad is None for p in criterion.parameters())


@pytest.mark.parametrize("string, batches", [("DCR+DMM", [2, 12]), ("DMM+DCR", [2, 2, 10]), ("DCR", [2, 12]),
                                             ("DMM", [2, 2])])
def test_each_image_goes_through_each_network_once(string, batches):
    student = RCAN(2, **SIZES)
    criterion, setting = make_loss(string, student)
    seen, inputs, step = [], [], make_step(student)
    setting.shared["vqgan"].register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))
    step.forward = lambda net, x: inputs.append(x) or net(x)
    criterion(step)
    assert sorted(seen) == batches  # two images: student, teacher, five negatives of each
    assert len(inputs) == ("DCR" in string) and all(len(x) == 10 and torch.equal(x[:2], step.lr) for x in inputs)


def test_DCR_contrasts_an_image_with_what_the_history_model_makes_of_it():
    criterion, setting = make_loss("DCR", line="--dcr_negatives 2 --dcr_noise 1e-12")  # all negatives: from LR itself
    net, history = setting.shared["vqgan"], criterion.terms["DCR"].history
    lr = 255 * torch.rand(3, 3, 8, 8)

    def upscale(net, x):
        assert net is history
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    sr = upscale(history, lr) + 10 * torch.rand(3, 3, 16, 16)  # nearer to its own negatives than to those of the others
    step = loss.LossInputs(lr, None, loss.Output(sr), loss.Output(255 * torch.rand(3, 3, 16, 16)), forward=upscale)
    found = criterion(step)[0].item()
    s, t, n = (net(x) for x in (sr, step.teacher.sr, upscale(history, lr)))
    expected = sum(w * (a - b).abs().mean() / (3 * (a - c).abs().mean() + 1e-7)
                   for w, a, b, c in zip((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), s, t, n))
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_history_is_an_average_of_merged_weights():
    student = LowRankAdapted(RCAN(2, **SIZES), 2)
    criterion, _ = make_loss("DCR", student, "--history_every 1")
    history, start = criterion.terms["DCR"].history, [p.clone() for p in student.net.parameters()]
    torch.nn.init.normal_(student.adapters[1].B)
    criterion.update(loss.LossInputs(torch.zeros(1), None, None, None, iteration=1, ema_student=student))
    expected = [0.1 * a + 0.9 * b for a, b in zip(start, merged_parameters(student), strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(history.parameters(), expected, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-2) for a, b in zip(history.parameters(), start))


@pytest.mark.parametrize("width", [None, 0.5])
def test_history_follows_the_average_at_its_pace(width):
    student = RCAN(2, **SIZES)
    student = slim(student, width) if width else student
    average = RCAN(2, **SIZES)
    criterion, _ = make_loss("DCR", student, "--history_every 3-4")
    history = criterion.terms["DCR"].history
    start = [p.clone() for p in student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(history.parameters(), start))
    assert not any(p.requires_grad for p in history.parameters()) and not history.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()  # a copy: what becomes of the student does not reach it
    assert all(torch.equal(a, b) for a, b in zip(history.parameters(), start))
    moved = []
    for iteration in (*range(7), 99_998, *range(100_000, 100_008), 300_003):
        before = [p.clone() for p in history.parameters()]
        criterion.update(loss.LossInputs(torch.zeros(1), None, None, None, iteration=iteration, ema_student=average))
        after = [0.1 * a + 0.9 * b for a, b in zip(before, average.parameters())]
        if all(torch.allclose(a, b, atol=1e-6) for a, b in zip(history.parameters(), after)):
            moved.append(iteration)
        else:
            assert all(torch.equal(a, b) for a, b in zip(history.parameters(), before))
        with torch.no_grad():
            for parameter in average.parameters():
                parameter.add_(0.01)
    assert moved == [2, 5, 99_998, 100_003, 100_007, 300_003]  # after 3, 6, .. iterations, later every 4



# ---- degradations

@pytest.mark.parametrize("rgb_range", [255, 1])
def test_noise_has_its_strength_and_is_gray_half_of_the_time(rgb_range):
    images = torch.full((400, 3, 16, 16), 0.5 * rgb_range)
    noise = (degrade(images, rgb_range) - images) * (255 / rgb_range)
    sigma = noise.std((1, 2, 3))
    assert sigma.min() < 4 and 26 < sigma.max() < 34 and sigma.mean() == pytest.approx(15.5, abs=1.5)
    gray = (noise[:, :1] - noise).abs().amax((1, 2, 3)) < 1e-3
    assert gray.float().mean() == pytest.approx(0.5, abs=0.1)
    single = noise[~gray][:, :, ::2].flatten(2)
    correlation = torch.stack([torch.corrcoef(one)[0, 1] for one in single])
    assert correlation.mean().abs() < 0.02


def test_blur_is_each_images_own_gaussian(monkeypatch):
    images = 255 * torch.rand(5, 3, 12, 9)
    kernels = []
    gaussian = degradation.gaussian
    monkeypatch.setattr(degradation, "gaussian", lambda sigma, radius: kernels.append((sigma, radius)) or
                        gaussian(sigma, radius))
    found = degrade(images, 255, noise=0, blur=1)
    expected = images.numpy()
    for axis, (sigma, radius) in enumerate(kernels, start=2):
        assert (sigma >= 0.1).all() and (sigma <= 2).all() and set(radius.flatten().tolist()) <= {1, 2, 3, 4, 5}
        rows = []
        for image, s, r in zip(expected, sigma.flatten().tolist(), radius.flatten().tolist()):
            kernel = np.exp(-0.5 * (np.arange(-r, r + 1) / s) ** 2)
            rows.append(scipy.ndimage.correlate1d(image, kernel / kernel.sum(), axis - 1, mode="nearest"))
        expected = np.stack(rows)
    assert np.abs(found.numpy() - expected).max() < 1e-3
    assert torch.equal(kernels[0][1], kernels[1][1])


def test_resizing_keeps_size_and_range_and_blurs():
    images = 255 * (torch.rand(2, 3, 14, 10) > 0.5)
    seen = [degrade(images.float(), 255, noise=0, resize=1) for _ in range(30)]
    assert all(x.shape == images.shape and x.min() >= 0 and x.max() <= 255 for x in seen)
    assert len({x.sum().item() for x in seen}) > 25


def test_one_resizing_in_four_is_to_a_larger_size(monkeypatch):
    sizes = []
    monkeypatch.setattr(F, "interpolate", lambda x, size, mode: sizes.append(size[0]) or x)
    images = torch.rand(1, 3, 1000, 1)
    for _ in range(400):
        degradation.random_resize(images, 255)
    factors = np.array(sizes[::2]) / 1000
    larger = factors[factors > 1]
    assert set(sizes[1::2]) == {1000} and len(larger) == pytest.approx(100, abs=30)
    assert larger.mean() == pytest.approx(1.25, abs=0.06) and larger.max() <= 1.5
    assert factors[factors <= 1].mean() == pytest.approx(0.75, abs=0.03) and factors.min() >= 0.5


def test_probabilities_are_per_image():
    images = torch.full((600, 3, 4, 4), 100.0)
    changed = (degrade(images, 255, noise=0.25) != images).flatten(1).any(1)
    assert changed.float().mean() == pytest.approx(0.25, abs=0.06)
    assert torch.equal(degrade(images, 255, noise=0), images)


# ---- runs

@pytest.fixture
def line(tiny_data, tmp_path):
    torch.manual_seed(7)
    save_model(RCAN(2, **SIZES), tmp_path / "teacher.pt")
    sizes = "".join(f"--{name} {value} " for name, value in SIZES.items())
    return (f"--model RCAN {sizes} --scale 2 --patch_size 24 --batch_size 4 --cpu --n_threads 0 --dir_data {tiny_data} "
            f"--data_train tiny --data_test tiny --teacher {tmp_path / 'teacher.pt'} --test_every 2 --ema 0.9 ")


def weights(folder):
    state = torch.load(folder / "state.pt", weights_only=True)
    return {f"{part}.{name}": value for part in ("student", "loss", "ema") for name, value in state[part].items()}


def test_a_run_of_all_terms_of_DCKD_resumes_exactly(run_main, monkeypatch, line, tmp_path):
    line += ("--loss 1*DS+1*TS+1*LC+25.5*DCR+0.255*DMM --feature_net random --history_every 2 --dcr_blur 0.5 "
             "--dcr_resize 0.5 --lr 1e-3 ")
    monkeypatch.setattr(checkpoint, "draw_curve", lambda *_: b"")  # takes longer than the training
    whole, parts = (line + f"--ckp_dir {tmp_path / name} " for name in ("whole", "parts"))
    assert run_main("train", whole + "--epochs 3")[0] == 0
    assert run_main("train", parts + "--epochs 2")[0] == 0
    between = weights(tmp_path / "parts")
    assert run_main("train", parts + "--epochs 3 --resume 1")[0] == 0
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    history = [name for name in first if name.startswith("loss.terms.DCR.history.")]
    assert len(history) == len([name for name in first if name.startswith("student.")])
    assert len(history) == len([name for name in first if name.startswith("loss.")])  # and no VQGAN
    assert any(not torch.equal(first[name], between[name]) for name in history)


def test_an_absent_VQGAN_is_one_line(run_main, line, tmp_path):
    status, _, err = run_main("train", line + f"--loss 1*DS+1*DMM --vqgan_path {tmp_path / 'none.ckpt'} --epochs 1 "
                              f"--ckp_dir {tmp_path / 'run'}")
    assert status == 2 and len(err) == 1 and "bash scripts/download_teacher.sh vqgan_f16_1024" in err[0]
