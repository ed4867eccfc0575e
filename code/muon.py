"""Muon, an optimiser that orthogonalises the momentum of weight matrices (Jordan et al., 2024)."""
from collections.abc import Callable, Iterable

import torch
from torch import nn

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration by Jordan et al.
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Adam):
    """Muon for the kernels of convolutions and matrices of linear layers, Adam for parameters with one dimension.

    A kernel out x in x k x k counts as a matrix out x (in k k). Its Nesterov momentum is replaced by the nearest orthogonal
    matrix, times 0.2 sqrt(max(rows, columns)), so that an update has the size of one of Adam and the learning rate of Adam
    serves for both (Liu et al., "Muon is scalable for LLM training", 2025). The weight decay is decoupled.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings):
        parameters = list(parameters)
        groups = [dict(params=[p for p in parameters if (p.ndim > 1) == matrix], matrix=matrix) for matrix in (True, False)]
        super().__init__(groups, fused=False, decoupled_weight_decay=True, **settings)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update the parameters."""
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["matrix"] else ():
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:  # Adam.load_state_dict reads the step of the first entry, so that every entry has one
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter))
                state["step"] += 1
                average = state["exp_avg"]
                average.lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonalise(parameter.grad.lerp(average, MOMENTUM).flatten(1))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape), alpha=-0.2 * max(update.shape)**0.5 * group["lr"])
                # Adam leaves out parameters without a gradient
                gradients[parameter], parameter.grad = parameter.grad, None
        super().step(closure)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Return about U V^T of a matrix U S V^T, with singular values in 0.7 .. 1.2, by Newton and Schulz's iteration."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if wide is not matrix else x
