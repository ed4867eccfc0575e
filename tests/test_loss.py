"""The loss string, and each term against FAKD's own numbers and a plain formula."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import loss
from conftest import GOLDEN
from loss import affinity, feature
from loss.affinity import affinity_l1
from system.errors import UserError

FAKD = json.loads((GOLDEN / "losses_and_metrics.json").read_text())["FAKD_features"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_loss(string, widths=(16, 16), **flags):
    """A Loss for networks of these widths, the student's first."""
    defaults = dict(features=[1, 2, 3], pool_size=1, pool_type="max", P=2, rbf_gamma=5, batch_size=2, split_batch=1)
    args = SimpleNamespace(**{**defaults, **flags})
    student, *teachers = (SimpleNamespace(n_feats=width, feature_channels=4 * (width,)) for width in widths)
    return loss.build_loss(string, loss.Context(args, student, teachers))


def make_step(student_maps=(), teacher_maps=(), student=None, teacher=None, hr=None):
    """A step with maps 1, 2, ... of student and teacher."""
    return loss.LossInputs(torch.zeros(1, 3, 4, 4), hr, loss.Output(student, [None, *student_maps]),
                     loss.Output(teacher, [None, *teacher_maps]))


def golden_maps(first):
    return [torch.from_numpy(np.random.RandomState(first + k).standard_normal((2, 16, 8, 6)).astype(np.float32))
            for k in range(3)]


# ---- golden values

@pytest.mark.parametrize("key", [key for key in FAKD if key not in ("about", "SA_grad_norms")])
def test_feature_terms_agree_with_the_authors(key):
    name, *rest = key.split("_")
    flags = dict(pool_size=int(rest[0][1:]), pool_type=rest[1]) if rest else {}
    total, _ = make_loss(name, **flags)(make_step(golden_maps(1), golden_maps(11)))
    assert total.item() == pytest.approx(FAKD[key], rel=1e-5)


def test_gradients_of_SA_agree_with_the_authors():
    maps = [x.requires_grad_() for x in golden_maps(1)]
    make_loss("SA")(make_step(maps, golden_maps(11)))[0].backward()
    assert [x.grad.norm().item() for x in maps] == pytest.approx(FAKD["SA_grad_norms"], rel=1e-5)


# ---- affinity without its matrix

def plain_affinity_l1(student, teacher, polynomial=(0, 1)):
    """The formula with its N x N matrices."""
    def matrix(x):
        rows = x.flatten(2).mT
        rows = rows / (rows.norm(dim=2, keepdim=True) + 1e-8)
        return sum(c * (rows @ rows.mT) ** p for p, c in enumerate(polynomial))
    return (matrix(student) - matrix(teacher)).abs().mean()


def value_and_gradients(function, *maps):
    maps = [x.clone().requires_grad_() for x in maps]
    value = function(*maps)
    return [value, *torch.autograd.grad(3 * value, maps)]


def random_maps(*shape, widths=(5, 9)):
    return [torch.randn(shape[0], width, *shape[1:], dtype=torch.float64) for width in widths]


def same(first, second):
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in zip(first, second))


@pytest.mark.parametrize("rows", [1, 4, 34, 35, 100])
@pytest.mark.parametrize("polynomial", [None, (0.3, -0.5, 0.2, 0.7)])
def test_affinity_in_strips_equals_the_whole_matrix(monkeypatch, rows, polynomial):
    monkeypatch.setattr(affinity, "BLOCK", 35 * rows)
    maps = random_maps(2, 5, 7)
    found = value_and_gradients(lambda s, t: affinity_l1(s, t, polynomial), *maps)
    assert same(found, value_and_gradients(lambda s, t: plain_affinity_l1(s, t, polynomial or (0, 1)), *maps))


@pytest.mark.parametrize("term, pool_type", [("SA", "max"), ("PSA", "max"), ("PSA", "avg"), ("RBF", "max"), ("RBF", "avg")])
def test_affinity_terms_equal_the_whole_matrix(term, pool_type):
    maps = [x.float() for _ in range(2) for x in random_maps(2, 7, 10)]  # student, teacher, student, teacher
    net = make_loss(term, (5, 9), features=[1, 2], pool_size=3, pool_type=pool_type, P=3, rbf_gamma=0.7)
    pool = {"max": F.max_pool2d, "avg": F.avg_pool2d}[pool_type]
    coefficients = [math.exp(-1.4) * 1.4**p / math.factorial(p) for p in range(4)] if term == "RBF" else (0, 1)

    def plain(*maps):
        maps = [x.double() if term == "SA" else pool(x.double(), 3, 3, ceil_mode=True) for x in maps]
        return sum(plain_affinity_l1(*maps[k:k + 2], coefficients) for k in (0, 2))
    found = value_and_gradients(lambda *maps: net(make_step(maps[::2], maps[1::2]))[0], *maps)
    expected = value_and_gradients(plain, *maps)
    assert all(torch.allclose(a, b.float(), rtol=1e-4, atol=1e-7) for a, b in zip(found, expected))


@pytest.mark.parametrize("rows", [2, 100])
def test_gradient_of_affinity_is_that_of_its_value(monkeypatch, rows):
    monkeypatch.setattr(affinity, "BLOCK", 12 * rows)
    maps = [x.requires_grad_() for x in random_maps(1, 3, 4, widths=(3, 4))]
    assert torch.autograd.gradcheck(affinity_l1, maps)


def test_affinity_leaves_a_detached_teacher_alone():
    student, teacher = random_maps(1, 3, 4)
    affinity_l1(student.requires_grad_(), teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_affinity_of_positions_without_a_feature_is_finite():
    student, teacher = random_maps(1, 3, 4)
    student[..., 1] = 0
    assert all(x.isfinite().all() for x in value_and_gradients(affinity_l1, student, teacher))


def test_affinity_of_different_places_is_refused():
    with pytest.raises(ValueError, match="differ in batch size"):
        affinity_l1(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5))


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("function, side, has_matrix", [(affinity_l1, 64, False), (plain_affinity_l1, 32, True)])
def test_affinity_never_makes_its_matrix(function, side, has_matrix):
    maps = [torch.randn(1, 8, side, side) for _ in range(2)]
    with Largest() as largest:
        value_and_gradients(function, *maps)
    assert (largest.numel >= side**4) == has_matrix
    assert has_matrix or largest.numel <= affinity.BLOCK


# ---- the other transforms

@pytest.mark.parametrize("transform", [feature.channel_affinity, feature.instance_affinity, feature.attention,
                                       feature.mean_distances])
def test_gradient_of_a_transform_is_that_of_its_value(transform):
    assert torch.autograd.gradcheck(transform, random_maps(2, 3, 4, widths=(3,))[0].requires_grad_())


def test_gradient_of_flow_is_that_of_its_value():
    assert torch.autograd.gradcheck(feature.fsp_matrix, [x.requires_grad_() for x in random_maps(2, 3, 4, widths=(3, 3))])


@pytest.mark.parametrize("term", ["SA", "PSA", "RBF", "IA", "AT", "fitnet", "MMD"])
def test_widths_of_the_networks_may_differ(term):
    maps = [x.float().requires_grad_() for _ in range(3) for x in random_maps(2, 6, 6)]
    make_loss(term, (5, 9), pool_size=2)(make_step(maps[::2], maps[1::2]))[0].backward()
    assert all(x.grad.abs().sum() > 0 for x in maps[::2])


@pytest.mark.parametrize("term", ["CA", "FSP"])
def test_terms_that_compare_channels_refuse_other_widths(term):
    with pytest.raises(UserError, match=f"{term} compares channel with channel.* 5 .* 9"):
        make_loss(term, (5, 5, 9))


def test_FSP_refuses_a_single_map():
    with pytest.raises(UserError, match="only one"):
        make_loss("FSP", features=[2])


def test_features_choose_the_maps():
    maps, others = golden_maps(1), golden_maps(11)
    step = make_step(maps, others)
    assert make_loss("AT", features=[2])(step)[0] == make_loss("AT", features=[1])(make_step(maps[1:], others[1:]))[0]


@pytest.mark.parametrize("widths, shapes", [((5, 5), {}), ((5, 9, 5), {"1_to_9": (9, 5, 1, 1), "3_to_9": (9, 5, 1, 1)}),
                                            ((5, 9, 7), {f"{k}_to_{n}": (n, 5, 1, 1) for k in (1, 3) for n in (7, 9)})])
def test_fitnet_learns_adapters_to_other_widths_only(widths, shapes):
    net = make_loss("0.1*fitnet", widths, features=[1, 3])
    parameters = dict(net.named_parameters())
    assert {name.split(".")[-2]: p.shape for name, p in parameters.items() if name.endswith("weight")} == shapes
    assert list(map(id, net.trainable_parameters())) == list(map(id, parameters.values()))


def test_fitnet_trains_its_adapter():
    net = make_loss("fitnet", (5, 9), features=[1])
    student, teacher = (x.float() for x in random_maps(2, 3, 4))
    net(make_step([student], [teacher]))[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


# ---- the loss string

def test_pixel_terms_are_mean_absolute_errors():
    student, teacher, hr = torch.rand(3, 2, 3, 4, 4)
    values = make_loss("DS+TS")(make_step(student=student, teacher=teacher, hr=hr))[1]
    assert values.tolist() == pytest.approx([(student - hr).abs().mean().item(), (student - teacher).abs().mean().item()])


def test_loss_is_the_sum_of_its_weighted_terms():
    student, teacher, hr = torch.rand(3, 2, 3, 4, 4)
    step = make_step(golden_maps(1), golden_maps(11), student.requires_grad_(), teacher, hr)
    net = make_loss("0.25*DS + 2e+1*TS+AT")
    total, values = net(step)
    single = [make_loss(name)(step)[0].item() for name in ("DS", "TS", "AT")]
    assert net.names == ["DS", "TS", "AT"]
    assert values.tolist() == pytest.approx([0.25 * single[0], 20 * single[1], single[2]])
    assert total.item() == pytest.approx(sum(values.tolist()))
    assert total.requires_grad
    assert not values.requires_grad


def test_terms_of_weight_zero_are_left_out():
    net = make_loss("1*DS+0*SA+0.0*TS")
    assert net.names == ["DS"]
    assert loss.needs_of("0*TS+1*DS") == {"hr"}


@pytest.mark.parametrize("string, words", [("1*DS+2*XY", "no term XY.*DS, TS, .*SA"), ("0*DS+0*TS", "every weight is 0")])
def test_loss_that_cannot_be_is_explained(string, words):
    with pytest.raises(UserError, match=words):
        make_loss(string)


@pytest.mark.parametrize("string, words", [("DS+2*DS", "duplicate term DS"), ("", "WEIGHT"), ("DS+", "WEIGHT"),
                                           ("-1*DS", "WEIGHT"), ("1.2.3*DS", "not a number"), ("2*3*DS", "WEIGHT")])
def test_loss_string_that_cannot_be_read_is_explained(string, words):
    with pytest.raises(ValueError, match=words):
        make_loss(string)


@pytest.mark.parametrize("string, needs", [
    ("DS", {"hr"}), ("DS+TS", {"hr", "teacher"}), ("TS+0*DS", {"teacher"}),
    *((f"1e-3*{term}", {"teacher", "features"}) for term in ("SA", "PSA", "RBF", "CA", "IA", "FSP", "AT", "fitnet", "MMD"))])
def test_loss_needs_what_its_terms_look_at(string, needs):
    assert loss.needs_of(string) == needs


def test_loss_calls_every_update():
    net, step, seen = make_loss("DS+TS"), make_step(), []
    for name, term in net.terms.items():
        term.update = lambda step, name=name: seen.append((name, step))
    net.update(step)
    assert seen == [("DS", step), ("TS", step)]
