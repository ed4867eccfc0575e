"""GAN: each kind's losses against plain formulas, who learns from what, and that a run with it resumes exactly."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import loss
import option_types
from checkpoint import save_model
from conftest import GOLDEN, golden_parameters
from loss import adversarial
from loss.adversarial import UNetDiscriminator, discriminator_loss, generator_loss, gradient_penalty, make_discriminator
from model.edsr import EDSR
from system.errors import UserError

KINDS = "GAN", "LSGAN", "RGAN", "WGAN", "WGAN_GP"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small discriminator, and a seed."""
    torch.manual_seed(0)
    monkeypatch.setattr(adversarial, "WIDTHS", (6, 8))
    monkeypatch.setattr(adversarial, "HIDDEN", 10)
    monkeypatch.setitem(adversarial.DISCRIMINATORS, "unet", lambda: UNetDiscriminator(4))


def make_loss(string="1*GAN", **flags):
    defaults = dict(gan_type="GAN", gan_k=1, gan_lr=1e-3, rgb_range=255, gan_net="srgan", gan_update="after",
                    split_batch=1, patch_size=24)
    return loss.build_loss(string, loss.Context(SimpleNamespace(**{**defaults, **flags}), None, []))


def make_step(hr, student):
    return loss.LossInputs(hr[:, :, ::2, ::2], hr, loss.Output(student), None)


def images(*shape):
    return [255 * torch.rand(shape) for _ in range(2)]


# ---- the losses

def plain_losses(kind, real, fake):
    """The formulas over lists of scores -> of the discriminator without its penalty, of the generator."""
    def mean(values):
        return sum(values) / len(values)

    def cross_entropy(positive, negative):
        return mean([-math.log(1 / (1 + math.exp(-x))) for x in positive]) + mean(
            [-math.log(1 - 1 / (1 + math.exp(-x))) for x in negative])
    if kind == "GAN":
        return cross_entropy(real, fake), mean([-math.log(1 / (1 + math.exp(-x))) for x in fake])
    if kind == "LSGAN":
        return (mean([(x - 1)**2 for x in real]) + mean([x**2 for x in fake])) / 2, mean([(x - 1)**2 for x in fake]) / 2
    if kind == "RGAN":
        better_real, better_fake = [x - mean(fake) for x in real], [x - mean(real) for x in fake]
        return cross_entropy(better_real, better_fake), cross_entropy(better_fake, better_real)
    return mean(fake) - mean(real), -mean(fake)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_papers_formulas(kind):
    real, fake = torch.randn(2, 5, 1, dtype=torch.float64)
    expected = plain_losses(kind, real.flatten().tolist(), fake.flatten().tolist())
    found = discriminator_loss(kind, real, fake).item(), generator_loss(kind, real, fake).item()
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_losses_are_those_of_their_values(kind):
    scores = [x.requires_grad_() for x in torch.randn(2, 4, 1, dtype=torch.float64)]
    for function in (discriminator_loss, generator_loss):
        assert torch.autograd.gradcheck(lambda *x, function=function: function(kind, *x), scores)


def test_large_scores_give_finite_losses():
    scores = torch.tensor([[1e4], [-1e4]])
    for kind in KINDS:
        assert torch.isfinite(discriminator_loss(kind, scores, -scores) + generator_loss(kind, scores, -scores))


def test_the_penalty_is_on_the_gradient_between_the_images():
    weight, seen = torch.randn(3, 4, 5), []

    def linear(x):
        seen.append(x)
        return (x * weight).sum((1, 2, 3))
    real, fake = torch.rand(2, 6, 3, 4, 5)
    assert gradient_penalty(linear, real, fake).item() == pytest.approx((weight.norm().item() - 1)**2, rel=1e-5)
    part = (seen[0] - fake) / (real - fake)
    first = part[:, 0, 0, 0]
    assert torch.allclose(part, first[:, None, None, None].expand_as(part), atol=1e-2)
    assert first.min() >= 0 and first.max() <= 1 and first.std() > 0.05


def test_the_gradient_of_the_penalty_is_that_of_its_value():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.LeakyReLU(0.2, inplace=True), nn.Flatten(), nn.Linear(8, 1)).double()
    real, fake = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64)

    def value(weight):
        torch.manual_seed(3)
        return gradient_penalty(lambda x: torch.func.functional_call(net, {"0.weight": weight}, (x,)), real, fake)
    assert torch.autograd.gradcheck(value, net[0].weight)


# ---- the term

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rgb_range", [255, 1])
def test_the_term_judges_images_of_0_to_1(kind, rgb_range):
    net = make_loss("0.5*GAN", gan_type=kind, rgb_range=rgb_range)
    hr, student = (x * rgb_range / 255 for x in images(3, 3, 12, 12))
    scores = [net.terms["GAN"].discriminator(x / rgb_range).flatten().tolist() for x in (hr, student)]
    assert net(make_step(hr, student))[0].item() == pytest.approx(0.5 * plain_losses(kind, *scores)[1], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_term_is_that_of_its_value(kind):
    net = make_loss(gan_type=kind, rgb_range=1).double()
    hr, student = torch.rand(2, 2, 3, 5, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: net(make_step(hr, x))[0], student.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_student_and_discriminator_leave_each_others_gradients_alone(kind):
    net = make_loss(gan_type=kind)
    term = net.terms["GAN"]
    hr, student = images(4, 3, 12, 12)
    student = nn.Parameter(student)
    step = make_step(hr, 1 * student)
    net(step)[0].backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is None for p in term.discriminator.parameters())
    gradient, before = student.grad.clone(), [p.detach().clone() for p in term.parameters()]
    net.update(step)
    assert torch.equal(student.grad, gradient) and net.trainable_parameters() == []
    assert all(p.grad is None for p in term.discriminator.parameters())
    assert len(before) == 8
    assert not [old for old, new in zip(before, term.parameters()) if old.dim() > 1 and torch.equal(old, new)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_gan_k_steps_of_adam_on_the_formula(kind):
    net = make_loss(gan_type=kind, gan_k=2).double()  # Adam makes much of the rounding of small gradients
    discriminator = make_discriminator().double()
    discriminator.load_state_dict(net.terms["GAN"].discriminator.state_dict())
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.9, 0.99))
    hr, student = (x.double() for x in images(4, 3, 12, 12))
    torch.manual_seed(3)
    net.update(make_step(hr, student))
    torch.manual_seed(3)
    for _ in range(2):
        optimizer.zero_grad()
        value = discriminator_loss(kind, discriminator(hr / 255), discriminator(student / 255))
        if kind == "WGAN_GP":
            value = value + 10 * gradient_penalty(discriminator, hr / 255, student / 255)
        value.backward()
        optimizer.step()
        if kind == "WGAN":
            for parameter in discriminator.parameters():
                parameter.data.clamp_(-0.01, 0.01)
    for (name, found), expected in zip(net.terms["GAN"].discriminator.named_parameters(), discriminator.parameters()):
        assert name == "9.bias" or torch.allclose(found, expected, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminator_learns_to_separate(monkeypatch, kind):
    monkeypatch.setattr(adversarial, "WIDTHS", (16, 16, 32))
    monkeypatch.setattr(adversarial, "HIDDEN", 64)
    net = make_loss(gan_type=kind, gan_lr=3e-3)
    discriminator = net.terms["GAN"].discriminator
    for _ in range(40):
        fake = 255 * torch.rand(8, 3, 12, 12)
        net.update(make_step(fake.mean((2, 3), keepdim=True).expand_as(fake), fake))
    noise = torch.rand(8, 3, 12, 12)
    assert discriminator(noise.mean((2, 3), keepdim=True).expand_as(noise)).min() > discriminator(noise).max()
    largest = max(p.abs().max() for p in discriminator.parameters())
    assert (largest <= adversarial.CLIP) == (kind == "WGAN")


def test_a_student_that_follows_the_term_is_judged_more_real():
    net = make_loss(gan_lr=1e-2)
    student = nn.Parameter(torch.rand(8, 3, 12, 12))
    flat = torch.full((8, 3, 12, 12), 0.5) * 255
    for _ in range(20):
        net.update(make_step(flat, 255 * student))
    before = net(make_step(flat, 255 * student))[0]
    optimizer = torch.optim.Adam([student], 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        net(make_step(flat, 255 * student))[0].backward()
        optimizer.step()
    assert net(make_step(flat, 255 * student))[0] < 0.7 * before


def test_images_of_reduced_precision_are_judged_in_float32():
    hr, student = images(4, 3, 12, 12)
    net, step = make_loss(), make_step(hr, student.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        value = net(step)[0]
        net.update(step)
    assert value.dtype == torch.float32
    scores = make_loss().terms["GAN"].discriminator(hr)  # still plain float32 outside
    assert scores.dtype == torch.float32


def test_any_size_of_image_has_a_score(monkeypatch):
    monkeypatch.undo()
    net = make_discriminator()
    assert sum(p.numel() for p in net if isinstance(p, nn.Conv2d) for p in p.parameters()) == 4685376
    for height, width in ((24, 24), (17, 40), (1, 1)):
        score = net(torch.rand(2, 3, height, width))
        assert score.shape == (2, 1) and torch.isfinite(score).all()


# ---- MCADKD's discriminator, against the authors' own

@pytest.fixture
def unet():
    """A GAN term whose discriminator has the golden parameters; u and v are those of the npz."""
    keys = json.loads((GOLDEN / "unet_discriminator_sn.json").read_text())["keys"]
    with np.load(GOLDEN / "unet_discriminator_sn.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    term = make_loss(gan_net="unet", rgb_range=1).terms["GAN"]
    term.discriminator = UNetDiscriminator(16)
    estimates = {name: array for name, array in arrays.items() if name.endswith(("_u", "_v"))}
    term.discriminator.load_state_dict({**golden_parameters(keys), **estimates})
    return term, arrays["output"]


def uniform(seed, low, high, *shape):
    return torch.tensor(np.random.RandomState(seed).uniform(low, high, shape), dtype=torch.float32)


def test_the_unet_agrees_with_the_authors(unet):
    net, expected = unet[0].discriminator.eval(), unet[1]
    with torch.no_grad():
        found = net(uniform(1234, 0, 1, 2, 3, 40, 32))
    assert found.shape == (2, 1, 40, 32) and (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_the_unet_has_the_authors_parameters():
    with torch.device("meta"):
        net = UNetDiscriminator()
    shapes = json.loads((GOLDEN / "unet_discriminator_sn.json").read_text())["keys"].keys()
    assert net.state_dict().keys() == shapes
    assert sum(p.numel() for p in net.parameters()) == 4_376_897


@pytest.mark.parametrize("order", ["eval", "published_order"])
def test_losses_of_the_unet_are_mcadkds(unet, order):
    published = json.loads((GOLDEN / "published_losses.json").read_text())["GAN_vanilla"][order]
    term, net = unet[0], unet[0].discriminator
    real, fake = uniform(620, 0, 1, 2, 3, 48, 40), uniform(621, 0.2, 0.6, 2, 3, 48, 40).requires_grad_()
    net.train(order == "published_order")
    scores = net(real), net(fake.detach())
    assert [x.mean().item() for x in scores] == pytest.approx([published["mean_score_real"], published["mean_score_fake"]],
                                                              rel=1e-4)
    value = 0.5 * discriminator_loss("GAN", *scores)
    value.backward()
    assert value.item() == pytest.approx(published["discriminator"], rel=1e-4)
    for name, norm in published["grad_norm_discriminator"].items():
        assert net.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    value = term(make_step(real, fake))
    value.backward()
    assert value.item() == pytest.approx(published["generator"], rel=1e-4)
    assert fake.grad.norm().item() == pytest.approx(published["grad_norm_generator_fake"], rel=1e-3)
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())


def test_an_update_is_two_power_iterations_of_the_unet(unet):
    published = json.loads((GOLDEN / "published_losses.json").read_text())["GAN_vanilla"]["published_order"]
    term, net = unet[0], unet[0].discriminator
    weight = net.conv1.weight_orig.detach().flatten(1).clone()
    term.update(make_step(uniform(620, 0, 1, 2, 3, 48, 40), uniform(621, 0.2, 0.6, 2, 3, 48, 40)))
    sigma = net.conv1.weight_u @ weight @ net.conv1.weight_v
    assert sigma.item() == pytest.approx(published["conv1_sigma_after"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unet_learns_to_separate_and_goes_on_exactly(tmp_path, kind):
    def make():
        return make_loss(gan_net="unet", gan_type=kind, gan_lr=3e-3)

    def update(net, seed):
        torch.manual_seed(seed)
        fake = 255 * torch.rand(8, 3, 12, 10)
        net.update(make_step(fake.mean((2, 3), keepdim=True).expand_as(fake), fake))
    net = make()
    for step in range(30):
        if step == 15:
            torch.save(net.state_dict(), tmp_path / "loss.pt")
        update(net, step)
    again = make()
    again.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    for step in range(15, 30):
        update(again, step)
    assert_same(net.state_dict(), again.state_dict())
    noise, discriminator = torch.rand(8, 3, 12, 10), net.terms["GAN"].discriminator
    assert discriminator(noise.mean((2, 3), keepdim=True).expand_as(noise)).mean() > discriminator(noise).mean()


def test_images_too_small_for_the_unet_are_refused():
    with pytest.raises(UserError, match="--gan_net unet needs images of 8 pixels or more, those of --patch_size 6"):
        make_loss(gan_net="unet", patch_size=6)


def test_scores_of_a_new_unet_are_small(monkeypatch):
    monkeypatch.undo()
    for order in ("after", "before"):
        sr = (255 * torch.rand(1, 3, 16, 16)).requires_grad_()
        value = make_loss(gan_net="unet", gan_update=order)(make_step(sr.detach(), sr))[0]
        value.backward()
        assert value < 2 and sr.grad.norm() < 1, order


# ---- the published order of updates

@pytest.mark.parametrize("net", ["srgan", "unet"])
def test_the_discriminator_may_be_updated_before_the_student_with_half_its_loss(net):
    term, late = (make_loss(gan_update=order, gan_net=net).double().terms["GAN"] for order in ("before", "after"))
    late.load_state_dict(term.state_dict())
    hr, student = (x.double() for x in images(4, 3, 24, 24))
    optimizer = torch.optim.Adam(late.discriminator.parameters(), 1e-3, betas=(0.9, 0.99))
    late.discriminator.train()
    (0.5 * discriminator_loss("GAN", *late.scores(hr / 255, student / 255))).backward()
    optimizer.step()

    results = []
    for each in (term, late):
        sr = student.clone().requires_grad_()
        value = each(make_step(hr, sr))
        results.append((value, *torch.autograd.grad(value, sr)))
    for found, expected in zip(*results):
        assert torch.allclose(found, expected, rtol=1e-9, atol=0)
    updated = {name: x.clone() for name, x in term.discriminator.state_dict().items()}
    for name, expected in late.discriminator.state_dict().items():
        assert torch.allclose(updated[name], expected, rtol=1e-9, atol=1e-12), name
    term.update(make_step(hr, student))
    term(loss.LossInputs(hr[:, :, ::2, ::2], hr, loss.Output(student), view="zoom_out"))
    assert_same(term.discriminator.state_dict(), updated)  # once per iteration


def test_a_divided_batch_has_no_update_before_the_student():
    with pytest.raises(UserError, match="needs the outputs of the whole batch at once, but --split_batch 2"):
        make_loss(gan_update="before", split_batch=2)


# ---- state

def test_state_of_discriminator_and_its_optimiser_goes_on_exactly(tmp_path):
    steps = [make_step(*images(4, 3, 12, 12)) for _ in range(6)]
    whole, first = make_loss(gan_type="WGAN_GP"), make_loss(gan_type="WGAN_GP")
    first.load_state_dict(whole.state_dict())
    torch.manual_seed(3)
    for step in steps:
        whole.update(step)
    torch.manual_seed(3)
    for step in steps[:3]:
        first.update(step)
    torch.save(first.state_dict(), tmp_path / "loss.pt")
    random = torch.get_rng_state()
    second = make_loss(gan_type="WGAN_GP")
    second.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    torch.set_rng_state(random)
    for step in steps[3:]:
        second.update(step)
    assert_same(whole.state_dict(), second.state_dict())
    assert not torch.equal(next(whole.parameters()), next(first.parameters()))


def test_a_resumed_run_takes_its_rate_from_the_flag():
    net = make_loss(gan_lr=3e-4)
    net.load_state_dict(make_loss().state_dict())
    assert net.terms["GAN"].optimizer.param_groups[0]["lr"] == 3e-4


def test_a_state_without_the_discriminator_is_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        make_loss().load_state_dict({})


def assert_same(first, second):
    """Equal to the bit, through dicts and lists, but for the time of the training."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for pair in zip(first, second):
            assert_same(*pair)
    else:
        assert first == second


# ---- runs

def test_a_name_that_ends_in_E_may_stand_anywhere_in_the_loss():
    assert loss.needs_of("1*DS+1*TS+1*NCE+0.1*GAN") == {"hr", "teacher"}
    assert option_types.parse_loss("1*NCE+2e+1*GAN+1E-3*DS") == [(1, "NCE"), (20, "GAN"), (0.001, "DS")]


@pytest.fixture
def flags(tiny_data, tmp_path, monkeypatch):
    """Flags of a tiny distillation with NCE and GAN; the curves, which take longest, stay empty."""
    monkeypatch.setattr(checkpoint, "draw_curve", lambda points, label: b"")
    save_model(EDSR(2, n_resblocks=3, n_feats=12), tmp_path / "teacher.pt")
    return (f"--model EDSR --n_resblocks 2 --n_feats 8 --scale 2 --patch_size 24 --batch_size 4 --cpu --n_threads 0 "
            f"--dir_data {tiny_data} --data_train tiny --data_test tiny --teacher {tmp_path / 'teacher.pt'} "
            "--loss 1*DS+1*TS+0.1*GAN+1*NCE --nce_patches 3 --nce_patch_size 12 --test_every 2 --print_every 1 ")


@pytest.mark.parametrize("kind", ["--gan_type WGAN_GP", "--gan_update before"])
def test_a_run_with_nce_and_gan_resumes_exactly(run_main, flags, tmp_path, kind):
    states = {}
    for name, parts in (("whole", ("--epochs 4",)), ("parts", ("--epochs 2", "--epochs 4 --resume 1"))):
        for part in parts:
            assert run_main("train", f"{flags} {kind} --ckp_dir {tmp_path / name} {part}")[0] == 0
            states.setdefault(name, []).append(torch.load(tmp_path / name / "state.pt", weights_only=True))
    assert_same(states["whole"][-1], states["parts"][-1])
    early, late = (state["loss"] for state in states["parts"])
    parameters = [name for name, value in early.items() if isinstance(value, torch.Tensor)]
    assert {name.split(".")[1] for name in parameters} == {"NCE", "GAN"} and "terms.GAN._extra_state" in early
    assert not [name for name in parameters if torch.equal(early[name], late[name]) and not name.endswith("9.bias")]
    assert (tmp_path / "whole" / "loss.csv").read_text() == (tmp_path / "parts" / "loss.csv").read_text()
    assert (tmp_path / "whole" / "loss_NCE.png").exists() and (tmp_path / "whole" / "loss_GAN.png").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", ["srgan", "unet"])
def test_every_kind_trains(run_main, flags, tmp_path, kind, net):
    status, out, _ = run_main("train", f"{flags} --gan_type {kind} --gan_net {net} --gan_k 2 --gan_lr 1e-3 --epochs 1 "
                              f"--test_every 4 --ckp_dir {tmp_path / 'run'}")
    assert status == 0 and any("NCE" in line and "GAN" in line for line in out)


@pytest.mark.parametrize("extra, words", [
    ("--batch_size 1", "--batch_size 1 has none"),
    ("--nce_patch_size 25", "larger than the training crops"),
    ("--gan_type DCGAN", "--gan_type"),
    ("--gan_lr 0", "above 0"),
    ("--gan_k 0", "1..1000"),
])
def test_a_mistake_gets_one_line_and_status_2(run_main, flags, tmp_path, extra, words):
    status, _, err = run_main("train", f"{flags} --ckp_dir {tmp_path / 'run'} {extra}")
    assert status == 2 and len(err) == 1 and err[0].startswith("error: ") and words in err[0]
    assert not (tmp_path / "run").exists()
