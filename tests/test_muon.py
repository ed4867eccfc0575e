"""Muon: orthogonalised updates of matrices, Adam for the other parameters."""
import pytest
import torch

import option
from muon import MOMENTUM, Muon, orthogonalise
from schedule import make_optimizer
from system.state import load_optimizer


@pytest.mark.parametrize("shape", [(12, 108), (108, 12), (24, 24), (1, 9)])
def test_singular_values_become_about_one_with_the_same_singular_vectors(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalise(matrix) @ right.T
    values = found.diag()
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.allclose(found, torch.diag(values), atol=1e-10)
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


def test_an_update_of_a_kernel_has_the_size_of_adams():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(32, 24, 3, 3))
    kernel.grad = torch.randn_like(kernel)
    optimizer = Muon([kernel], lr=1e-3)
    gradient = kernel.grad.flatten(1)
    optimizer.step()
    assert kernel.square().mean().sqrt().item() == pytest.approx(2e-4, rel=0.15)  # 0.2 lr, as Adam's in a long training
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(-kernel.detach().flatten(), (u @ v).flatten(), dim=0) > 0.98


def test_the_momentum_is_that_of_nesterov():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(4, 3, 3, 3))
    optimizer, average = Muon([kernel], lr=1), torch.zeros(4, 27)
    expected = torch.zeros(4, 27)
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        average = MOMENTUM * average + (1 - MOMENTUM) * kernel.grad.flatten(1)
        expected -= 0.2 * 27**0.5 * orthogonalise(MOMENTUM * average + (1 - MOMENTUM) * kernel.grad.flatten(1))
        optimizer.step()
    assert torch.allclose(kernel.flatten(1), expected, atol=1e-4)


def test_parameters_of_one_dimension_are_updated_by_adam_and_decay_is_decoupled():
    def trained(optimizer):
        torch.manual_seed(0)
        kernel, bias = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4))
        found = make_optimizer(option.parse(f"--optimizer {optimizer} --weight_decay 0.1 --lr 0.5".split()), [kernel, bias])
        for _ in range(3):
            kernel.grad, bias.grad = torch.zeros(4, 3), torch.randn(4)
            found.step()
        return kernel, bias
    kernel, bias = trained("MUON")
    assert torch.allclose(bias, trained("ADAMW")[1])
    assert torch.allclose(kernel, torch.full((4, 3), 0.95**3))  # without a gradient the decay alone acts


def test_a_loaded_state_continues_the_same_updates():
    def after(interrupted):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4, 3, 3, 3)), torch.nn.Parameter(torch.randn(4))]
        optimizer = make_optimizer(option.parse(["--optimizer", "MUON"]), parameters)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            if interrupted and step == 1:
                state = optimizer.state_dict()
                optimizer = make_optimizer(option.parse(["--optimizer", "MUON"]), parameters)
                load_optimizer(optimizer, state)
        return parameters
    assert all(torch.equal(a, b) for a, b in zip(after(True), after(False)))
