"""The pixel terms: each against a second, simple implementation, their units, their gradients."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import loss
import option
from loss import pixel
from test_distributed import make_trainer

DISTANCES = ("MSE", "Charbonnier", "FFT", "gradient", "wavelet", "PSNR")


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [255 * torch.rand(2, 3, *shape, generator=generator) for _ in range(3)]


def build(string, rgb_range=255):
    return loss.build_loss(string, loss.Context(SimpleNamespace(rgb_range=rgb_range), None, []))


def value(string, student, hr, teacher, rgb_range=255):
    step = loss.LossInputs(student, hr, loss.Output(student), loss.Output(teacher))
    return build(string, rgb_range)(step)[0]


def haar(x):
    """One level of a Haar transform of a matrix: four subbands, by orthonormal matrices."""
    x = np.pad(x, [(0, x.shape[0] % 2), (0, x.shape[1] % 2)])
    low, high = ([np.kron(np.eye(side // 2), np.array([[1, sign]]) / math.sqrt(2)) for side in x.shape] for sign in (1, -1))
    return low[0] @ x @ low[1].T, [low[0] @ x @ high[1].T, high[0] @ x @ low[1].T, high[0] @ x @ high[1].T]


def expected_wavelet(error):
    bands = [list(error.flatten(0, 1).numpy())]
    total = 0
    for _ in range(4):
        levels = [haar(x) for x in bands[-1]]
        total += np.mean([np.abs(detail).mean() for _, details in levels for detail in details])
        bands.append([low for low, _ in levels])
    return total + np.mean([np.abs(low).mean() for low in bands[-1]])


def expected(name, error):
    error = error.double()
    if name == "FFT":
        found = np.fft.rfft2(error.numpy())
        return (np.abs(found.real).mean() + np.abs(found.imag).mean()) / 2
    if name == "gradient":
        return (np.abs(np.diff(error.numpy(), axis=3)).mean() + np.abs(np.diff(error.numpy(), axis=2)).mean())
    if name == "PSNR":  # as NAFNet's authors write it
        return 10 / np.log(10) * torch.log(((error / 255) ** 2).mean(dim=(1, 2, 3)) + 1e-8).mean()
    if name == "wavelet":
        return expected_wavelet(error)
    return (error ** 2).mean() if name == "MSE" else ((error ** 2 + 0.255 ** 2) ** 0.5).mean()


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("shape", [(16, 32), (15, 21), (2, 3)])
def test_distances_agree_with_a_simple_implementation(name, shape):
    student, hr, teacher = images(*shape)
    for target, other in (("DS", hr), ("TS", teacher)):
        found = value(f"1*{target}_{name}", student.to(memory_format=torch.channels_last), hr, teacher)
        assert found.item() == pytest.approx(float(expected(name, student - other)), rel=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_needs_name_the_target(name):
    assert loss.needs_of(f"DS_{name}") == {"hr"} and loss.needs_of(f"TS_{name}") == {"teacher"}
    assert build(f"DS_{name}+TS_{name}").terms_on("zoom_in", False) == [f"TS_{name}"]


def test_equal_images_have_no_loss_and_a_finite_gradient():
    for name in DISTANCES:
        student = images(8, 8)[0].requires_grad_()
        found = value(f"1*DS_{name}", student, student.detach().clone(), None)
        found.backward()
        assert found.item() == pytest.approx({"Charbonnier": 0.255, "PSNR": -80}.get(name, 0), abs=1e-6), name
        assert student.grad.isfinite().all() and student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", DISTANCES)
def test_a_step_against_the_gradient_lowers_the_loss(name):
    student, hr, _ = images(16, 16)
    student.requires_grad_()
    before = value(f"1*DS_{name}", student, hr, None)
    before.backward()
    step = student.grad * (1e-3 * before.item() / student.grad.square().sum())
    after = value(f"1*DS_{name}", (student - step).detach(), hr, None)
    assert after.item() == pytest.approx(0.999 * before.item(), rel=2e-5)


def test_TS_masked_counts_pixels_where_the_teacher_is_nearer():
    hr, teacher = torch.zeros(1, 3, 1, 4), torch.tensor([1.0, -1, 3, 2]).expand(1, 3, 1, 4)
    student = torch.tensor([2.0, 2, 2, 2]).expand(1, 3, 1, 4).clone().requires_grad_()
    found = value("1*TS_masked", student, hr, teacher)
    found.backward()
    assert found.item() == pytest.approx((1 + 3) / 4)  # where the errors are 1 and 1, not 3 or the same 2
    assert torch.equal(student.grad, torch.tensor([1.0, 1, 0, 0]).expand(1, 3, 1, 4) / 12)
    assert loss.needs_of("TS_masked") == {"hr", "teacher"}
    assert build("TS+TS_masked").terms_on("zoom_in", False) == ["TS"]


def test_a_teacher_that_is_nowhere_nearer_adds_nothing():
    student, hr, _ = images(8, 8)
    assert value("1*TS_masked", student, hr, 2 * student - hr) == 0


@pytest.mark.parametrize("name", pixel.TERMS)
def test_weights_converted_to_another_range_scale_the_loss_alone(name):
    """The loss of images in [0, 1] is 1/255 of that of the same images in [0, 255]."""
    converted = option.convert_weights(f"3*{name}", 1 / 255)
    student, hr, teacher = images(8, 8)
    whole = value(f"3*{name}", student, hr, teacher)
    assert value(converted, *(x / 255 for x in (student, hr, teacher)), rgb_range=1).item() == pytest.approx(
        whole.item() / 255, rel=1e-4)


@pytest.mark.parametrize("precision", ["single", "bf16"])
def test_all_of_them_train_a_student(precision):
    trainer = make_trainer(f"--loss {'+'.join(pixel.TERMS)} --precision {precision} --upcycle zoom_in+zoom_out")
    lr, hr = (torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8) for side in (16, 32))
    values = trainer.step(lr, hr)
    assert values.dtype == torch.float32 and (values != 0).all()
