"""Spatial affinity against the formula with its N x N matrices: value, gradients, memory; and a GPU's kernel or none."""
import itertools
import logging
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from loss import affinity
from loss.affinity import affinity_l1, sum_in_blocks
from system.errors import UserError
from system.memory import memory_from_shapes

CUBIC, RBF = (0.3, -0.5, 0.2, 0.7), tuple(math.exp(-1.4) * 1.4**p / math.factorial(p) for p in range(3))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain_affinity_l1(student, teacher, polynomial=None):
    """FAKD's formula, with both matrices whole."""
    def matrix(x):
        rows = x.flatten(2).mT
        cosine = (rows := rows / (rows.norm(dim=2, keepdim=True) + 1e-8)) @ rows.mT
        return cosine if polynomial is None else sum(c * cosine**p for p, c in enumerate(polynomial))
    return (matrix(student) - matrix(teacher)).abs().mean()


def value_and_gradients(function, maps, *args, wanted=(True, True)):
    maps = [x.detach().requires_grad_(want) for x, want in zip(maps, wanted)]
    value = function(*maps, *args)
    return [value.detach(), *torch.autograd.grad(3 * value, [x for x in maps if x.requires_grad])]


def separate_maps(batch, height, width, channels=(64, 48)):
    """Maps whose cosines lie apart, a student's near 0 and a teacher's near 0.9 and -0.9.

    The gradient is made of signs of differences: that of one as small as the rounding is chance, in any formula.
    """
    kind = torch.randn(batch, 1, height, width).sign()
    student, teacher = (torch.randn(batch, count, height, width) for count in channels)
    return student, 0.3 * teacher + kind


def error(found, expected):
    """The largest over pairs of tensors of max |difference| / max |expected|."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))


# ---- value and gradients

@pytest.mark.parametrize("polynomial", [None, CUBIC, (0.4, 2.0)])
@pytest.mark.parametrize("channels", [(1, 2), (3, 3), (20, 7)])
@pytest.mark.parametrize("batch, height, width", [(1, 1, 1), (1, 1, 2), (2, 5, 7), (3, 9, 4)])
@pytest.mark.parametrize("side", [6, 1000])
def test_blocks_equal_the_whole_matrices_in_float64(monkeypatch, side, batch, height, width, channels, polynomial):
    monkeypatch.setattr(affinity, "BLOCK", side**2)
    maps = [torch.randn(batch, count, height, width, dtype=torch.float64) for count in channels]
    expected = value_and_gradients(plain_affinity_l1, maps, polynomial)
    found = value_and_gradients(affinity_l1, maps, polynomial)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected))


@pytest.mark.parametrize("polynomial", [None, RBF])
@pytest.mark.parametrize("batch, height, width, channels", [(2, 23, 29, (64, 64)), (1, 31, 17, (32, 130)),
                                                             (4, 8, 8, (64, 5))])
def test_float32_is_within_1e_5_of_the_formula(batch, height, width, channels, polynomial):
    maps = separate_maps(batch, height, width, channels)
    expected = value_and_gradients(plain_affinity_l1, [x.double() for x in maps], polynomial)
    assert error(value_and_gradients(affinity_l1, maps, polynomial), expected) < 1e-5


@pytest.mark.parametrize("polynomial", [None, CUBIC])
def test_gradient_is_that_of_the_value(monkeypatch, polynomial):
    monkeypatch.setattr(affinity, "BLOCK", 5**2)
    maps = [torch.randn(2, count, 3, 4, dtype=torch.float64, requires_grad=True) for count in (3, 4)]
    assert torch.autograd.gradcheck(lambda *maps: affinity_l1(*maps, polynomial), maps)


@pytest.mark.parametrize("polynomial", [None, CUBIC])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone_is_the_same_as_with_the_other(wanted, polynomial):
    maps = [torch.randn(2, 5, 6, 7) for _ in range(2)]
    value, *gradients = value_and_gradients(affinity_l1, maps, polynomial)
    found = value_and_gradients(affinity_l1, maps, polynomial, wanted=wanted)
    assert torch.equal(found[0], value)
    assert torch.equal(found[1], gradients[wanted.index(True)])


class Calls(TorchDispatchMode):
    """Counts the products that add to a gradient."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.addmm_.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("student, teacher, enabled, products", [(False, False, True, 0), (True, True, False, 0),
                                                                  (True, False, True, 1), (True, True, True, 2)])
def test_gradients_that_nobody_wants_are_not_computed(student, teacher, enabled, products):
    maps = [torch.randn(1, 4, 3, 3, requires_grad=needed) for needed in (student, teacher)]
    with torch.set_grad_enabled(enabled), Calls() as calls:
        affinity_l1(*maps)
    assert calls.count == products


def test_backward_can_run_again_and_follows_its_factor():
    student, teacher = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(1, 4, 5, 5)
    value = affinity_l1(student, teacher)
    first, = torch.autograd.grad(value, student, retain_graph=True)
    second, = torch.autograd.grad(-2 * value, student)
    assert first.any()
    assert torch.equal(second, -2 * first)


@pytest.mark.parametrize("channels", [1, 6])
def test_any_layout_of_the_maps_will_do_and_stays_as_it_is(channels):
    maps = [torch.randn(2, channels, 5, 6).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    before = [x.clone() for x in maps]
    found, expected = (value_and_gradients(affinity_l1, x) for x in (maps, [x.contiguous() for x in maps]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected))
    assert all(torch.equal(a, b) for a, b in zip(maps, before))


# ---- where signs and divisions are delicate

@pytest.mark.parametrize("channels", [3, 64, 300])
@pytest.mark.parametrize("polynomial", [None, RBF])
def test_equal_maps_have_no_loss_and_no_gradient(channels, polynomial):
    x = torch.randn(2, channels, 19, 19)
    for found in value_and_gradients(affinity_l1, [x, x.clone()], polynomial):
        assert not found.any()


def test_equal_positions_add_no_signs_of_rounding():
    student = separate_maps(1, 20, 20)[0]
    teacher = student.clone()
    teacher[:, :, 3, 4] = -student[:, :, 3, 4]
    found = value_and_gradients(affinity_l1, [student, teacher])
    assert error(found, value_and_gradients(plain_affinity_l1, [student.double(), teacher.double()])) < 1e-5


def test_positions_without_a_feature_have_the_gradient_of_the_formula():
    maps = [torch.randn(1, count, 4, 5, dtype=torch.float64) for count in (3, 4)]
    maps[0][..., 1], maps[1][..., 2] = 0, 0
    found, expected = (value_and_gradients(function, maps) for function in (affinity_l1, plain_affinity_l1))
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, expected))


# ---- memory

def memory_of(function, side):
    student, teacher = (torch.zeros(1, 64, side, side, requires_grad=needed) for needed in (True, False))
    return memory_from_shapes(lambda: torch.autograd.grad(function(student, teacher), student))


def test_maps_of_256_x_256_fit_in_1_GB(monkeypatch):
    monkeypatch.setattr(affinity, "BLOCK", affinity.BLOCK_GPU)  # the largest blocks there are, so the most memory
    assert memory_of(affinity_l1, 256) < 1e9
    assert memory_of(plain_affinity_l1, 256) > 50e9


def test_memory_grows_with_the_positions_not_with_their_pairs(monkeypatch):
    monkeypatch.setattr(affinity, "BLOCK", 512**2)
    assert memory_of(affinity_l1, 64) < 4 * memory_of(affinity_l1, 32)


# ---- the kernel of GPUs, and doing without

@pytest.fixture
def trial(monkeypatch, caplog):
    """trial(kernel) -> what _choose returns for two sizes with this kernel and slow blocks; lines of the log; blocks."""
    def slow_blocks(*args):
        time.sleep(0.01)
        return sum_in_blocks(*args)

    def run(kernel, polynomial=None, wanted=(True, False)):
        module = kernel and SimpleNamespace(sum_in_kernel=kernel)
        monkeypatch.setitem(sys.modules, "loss.affinity_triton", module)  # None: as if it were not there
        monkeypatch.setattr(affinity, "sum_in_blocks", slow_blocks)
        monkeypatch.setattr(affinity, "TRIAL", (2, 60))
        caplog.set_level(logging.INFO, "sr")
        ways = {affinity._choose(torch.device("cpu"), widths, polynomial, wanted) for widths in ((64, 64), (16, 64))}
        return ways, [record.getMessage() for record in caplog.records], slow_blocks
    affinity._choose.cache_clear()
    affinity._log_once.cache_clear()
    yield run
    affinity._choose.cache_clear()
    affinity._log_once.cache_clear()


@pytest.mark.parametrize("polynomial", [None, RBF])
@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=2)))
def test_kernel_that_is_right_and_faster_is_used(trial, polynomial, wanted):
    kernel = sum_in_blocks
    ways, lines, _ = trial(kernel, polynomial, wanted)
    assert ways == {kernel}
    assert lines == ["spatial affinity: the Triton kernel"]


def test_kernel_that_is_slower_is_not_used(trial):
    def kernel(*args):
        time.sleep(0.05)
        return sum_in_blocks(*args)
    ways, lines, blocks = trial(kernel)
    assert ways == {blocks}
    assert lines == ["spatial affinity: blocks, which are faster than the Triton kernel on this GPU"]


def wrong_value(*args):
    total, gradients = sum_in_blocks(*args)
    return total * 1.0001, gradients


def wrong_gradient(*args):
    total, (gradient, other) = sum_in_blocks(*args)
    gradient[:, 7] *= 2
    return total, (gradient, other)


def no_number(*args):
    total, gradients = sum_in_blocks(*args)
    return total * math.nan, gradients


def no_compiler(*args):
    raise RuntimeError("no compiler\nand a long story")


@pytest.mark.parametrize("kernel, words", [
    (wrong_value, "RuntimeError: its value or gradient differs from that of the blocks"),
    (wrong_gradient, "RuntimeError: its value or gradient differs from that of the blocks"),
    (no_number, "RuntimeError: its value or gradient differs from that of the blocks"),
    (no_compiler, "RuntimeError: no compiler"),
    (None, "ModuleNotFoundError: import of loss.affinity_triton halted; None in sys.modules")])
def test_kernel_that_does_not_work_is_replaced_with_one_line(trial, kernel, words):
    ways, lines, blocks = trial(kernel)
    assert ways == {blocks}
    assert lines == [f"spatial affinity without its Triton kernel: {words}"]


def test_trial_draws_none_of_the_numbers_of_training(trial):
    before = torch.get_rng_state()
    trial(sum_in_blocks)
    assert torch.equal(before, torch.get_rng_state())


def test_maps_on_a_GPU_and_no_others_ask_for_the_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(affinity, "_choose", lambda *args: asked.append(args) or (lambda *args: args))
    maps = [SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda:1", shape=(2, 9, width)) for width in (4, 6)]
    assert affinity._sum(*maps, [0.1, 0.2], (True, False)) == (*maps, [0.1, 0.2], (True, False))
    affinity_l1(*torch.randn(2, 1, 3, 4, 4))
    assert asked == [("cuda:1", (4, 6), (0.1, 0.2), (True, False))]


KERNEL_AGAINST_BLOCKS = """
import sys
import torch
from torch.nn import functional as F
from loss.affinity import _before_division, sum_in_blocks
from loss.affinity_triton import sum_in_kernel

device = sys.argv[1]
torch.manual_seed(0)
for batch, n, widths, polynomial, wanted in (
        (2, 70, (33, 20), None, (True, False)), (1, 35, (64, 65), None, (True, True)), (1, 5, (3, 2), (0.3,), (True, False)),
        (1, 40, (16, 70), (0.3, -0.5, 0.2, 0.7), (True, True)), (1, 64, (129, 3), (0.3, 0.5), (False, False))):
    units = [F.normalize(torch.randn(batch, n, width), dim=2).to(device) for width in widths]
    total, gradients = sum_in_kernel(*units, polynomial, wanted)
    expected, expected_gradients = sum_in_blocks(*(unit.double() for unit in units), polynomial, wanted)
    assert abs(total - expected) <= 1e-6 * expected, (n, total, expected)
    for unit, gradient, other in zip(units, gradients, expected_gradients):
        assert (gradient is None) == (other is None)
        if gradient is not None:  # without what the signs of a rounded 1 - 1, on the diagonal, add along the unit vectors
            gradient, other = (_before_division(x.double(), unit.double(), unit.new_ones(batch, n, 1).double())
                               for x in (gradient, other))
            assert (gradient - other).abs().max() <= 1e-5 * other.abs().max(), (n, widths)
unit = F.normalize(torch.randn(2, 70, 20), dim=2).to(device)
total, gradients = sum_in_kernel(unit, unit.clone(), None, (True, True))
assert total == 0 and not any(gradient.any() for gradient in gradients)
try:
    sum_in_kernel(torch.ones(1, 4, 129, device=device), torch.ones(1, 4, 2, device=device), None, (True, False))
except ValueError as error:
    print(error)
"""


def run_kernel(device, **environment):
    pytest.importorskip("triton", reason="no triton: it comes with PyTorch for GPUs")
    path = os.pathsep.join([str(ROOT / "code"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", KERNEL_AGAINST_BLOCKS, device], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": path, **environment})
    assert done.returncode == 0, done.stderr
    assert "no kernel for the gradient by more than 128 channels" in done.stdout


def test_kernel_equals_the_blocks_in_the_interpreter():
    run_kernel("cpu", TRITON_INTERPRET="1")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
def test_kernel_equals_the_blocks_on_a_GPU():
    run_kernel("cuda")


@needs_gpu
@pytest.mark.parametrize("polynomial", [None, RBF])
def test_affinity_on_a_GPU_equals_the_formula(polynomial):
    maps = separate_maps(2, 23, 29)
    expected = value_and_gradients(plain_affinity_l1, [x.double() for x in maps], polynomial)
    found = value_and_gradients(affinity_l1, [x.cuda() for x in maps], polynomial)
    assert error([x.cpu() for x in found], expected) < 1e-5


@needs_gpu
def test_maps_of_256_x_256_fit_in_1_GB_of_a_GPU():
    maps = [torch.randn(1, 64, 256, 256, device="cuda", requires_grad=True) for _ in range(2)]
    affinity_l1(maps[0], maps[1].detach()).backward()  # the trial of the kernel
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    affinity_l1(maps[0], maps[1].detach()).backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9


@pytest.mark.parametrize("gamma, order, is_zero", [(5, 2, False), (47, 2, False), (60, 2, True), (60, 100, False),
                                                   (1e4, 100, True), (1e30, 0, True), (1e30, 100, True)])
def test_an_RBF_kernel_that_is_zero_in_single_precision_is_refused(gamma, order, is_zero):
    if is_zero:
        with pytest.raises(UserError, match=r"--rbf_gamma .* single precision"):
            affinity.RadialBasisFunction(gamma=gamma, order=order)
    else:
        assert torch.tensor(affinity.RadialBasisFunction(gamma=gamma, order=order).polynomial).max() > 0
