"""Label consistency: that the inverse inverts, what is drawn, and what LC compares."""
import itertools

import pytest
import torch

import loss
import option
from loss.consistency import draw, perturb, restore

ALL = torch.tensor(list(itertools.product([False, True], repeat=4)))


def plain(image, inversion, horizontal, vertical, transposed, rgb_range):
    """3 x H x W, one image, one operation after the other."""
    image = rgb_range - image if inversion else image
    image = image[:, :, torch.arange(image.shape[2] - 1, -1, -1)] if horizontal else image
    image = image[:, torch.arange(image.shape[1] - 1, -1, -1)] if vertical else image
    return torch.stack([channel.T for channel in image]) if transposed else image


def whole_numbers(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).float()


def test_each_of_the_16_combinations_is_its_operations_and_is_inverted_exactly():
    images = whole_numbers(16, 3, 6, 6)
    found = perturb(images, ALL, 255)
    assert torch.equal(found, torch.stack([plain(image, *chosen, 255) for image, chosen in zip(images, ALL)]))
    assert torch.equal(restore(found, ALL, 255), images)
    assert len({image.numpy().tobytes() for image in perturb(images[:1].expand(16, -1, -1, -1), ALL, 255)}) == 16


@pytest.mark.parametrize("chosen", ALL.tolist())
def test_images_that_are_not_square_are_inverted_exactly(chosen):
    images, chosen = whole_numbers(2, 3, 4, 7), torch.tensor([chosen, chosen])
    chosen[1, :3] = ~chosen[1, :3]  # all but the transpose differ from image to image
    found = perturb(images, chosen, 255)
    assert torch.equal(found, torch.stack([plain(image, *one, 255) for image, one in zip(images, chosen)]))
    assert torch.equal(restore(found, chosen, 255), images)


def test_transposing_some_images_that_are_not_square_is_refused():
    with pytest.raises(ValueError, match="would have different sizes"):
        perturb(whole_numbers(2, 3, 4, 7), torch.tensor([[False, False, False, True], [False] * 4]), 255)


def test_the_inverse_fits_an_upscaling_network():
    """A network that repeats pixels commutes with all four: what it makes of the perturbed LR is mapped back to its HR."""
    images = torch.rand(16, 3, 5, 5)
    upscale = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    assert torch.allclose(restore(upscale(perturb(images, ALL, 1)), ALL, 1), upscale(images), atol=1e-6)


def test_the_published_order_of_the_inverse_is_wrong_for_one_image_in_eight():
    """As the table of departures in scripts/README.md states: 12.6 % of the images at p = 0.3."""
    images = torch.rand(16, 3, 5, 5)
    wrong = (perturb(perturb(images, ALL, 1), ALL, 1) - images).abs().amax((1, 2, 3)) > 1e-3
    shares = torch.where(ALL, 0.3, 0.7).prod(1)
    assert shares[wrong].sum().item() == pytest.approx(0.126) and ALL[wrong, 3].all()


def test_operations_are_drawn_independently_with_their_probability():
    torch.manual_seed(0)
    chosen = draw(torch.zeros(4000, 3, 2, 2), 0.3).double()
    assert torch.allclose(chosen.mean(0), torch.full((4,), 0.3, dtype=torch.float64), atol=0.03)
    assert torch.allclose(torch.corrcoef(chosen.T), torch.eye(4, dtype=torch.float64), atol=0.06)
    assert not draw(torch.zeros(50, 3, 2, 2), 0).any() and draw(torch.zeros(50, 3, 2, 2), 1).all()
    transposed = torch.stack([draw(torch.zeros(5, 3, 2, 3), 0.5)[:, 3] for _ in range(30)])
    assert (transposed == transposed[:, :1]).all() and 0 < transposed[:, 0].sum() < 30


def test_LC_compares_with_the_answer_to_the_perturbed_input():
    weight = torch.rand(3, requires_grad=True)

    def teacher(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) * weight.view(3, 1, 1)
    lr, sr = 255 * torch.rand(4, 3, 5, 5), 255 * torch.rand(4, 3, 10, 10)
    term = loss.build_loss("LC", loss.Context(option.parse(["--lc_p", "0.7"]), None, []))
    step = loss.LossInputs(lr, None, loss.Output(sr.requires_grad_()), teacher_net=teacher, forward=lambda net, x: net(x))
    torch.manual_seed(3)
    value = term(step)[0]
    torch.manual_seed(3)
    chosen = draw(lr, 0.7)
    expected = 0
    for k in range(4):
        target = teacher(plain(lr[k], *chosen[k], 255)[None])[0]
        inversion, horizontal, vertical, transposed = chosen[k]
        target = target.mT if transposed else target
        target = target.flip(1) if vertical else target
        target = target.flip(2) if horizontal else target
        expected += (sr[k] - (255 - target if inversion else target)).abs().mean() / 4
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert weight.grad is None and sr.grad.abs().sum() > 0
    assert loss.needs_of("LC") == {"teacher_net"}


def test_gradient_of_the_mapping_is_that_of_its_value():
    images = torch.rand(16, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: restore(perturb(x, ALL, 255).sin(), ALL, 255), images)
