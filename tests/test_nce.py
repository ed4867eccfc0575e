"""NCE: the multi-scale contrast against the authors' numbers, plain loops, and each departure from their code."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import loss
from conftest import GOLDEN, golden_parameters
from loss import nce
from loss.nce import crop, draw_places, info_nce
from system.errors import UserError

PUBLISHED = json.loads((GOLDEN / "published_losses.json").read_text())  # of MCADKD's own code
MCADKD = json.loads((GOLDEN / "losses_and_metrics.json").read_text())["MCADKD"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_loss(string="1*NCE", **flags):
    defaults = dict(nce_type="hybrid", nce_mining="hard", nce_denominator="negatives", nce_patches=3, nce_patch_size=5,
                    rgb_range=255, batch_size=4, split_batch=1, patch_size=12)
    return loss.build_loss(string, loss.Context(SimpleNamespace(**{**defaults, **flags}), None, []))


def make_step(student, teacher):
    return loss.LossInputs(student[:, :, ::2, ::2], None, loss.Output(student), loss.Output(teacher))


def images(*shape, count=2):
    return [255 * torch.rand(shape) for _ in range(count)]


def embeddings(*shape):
    return [F.normalize(torch.randn(shape, dtype=torch.float64), dim=1) for _ in range(2)]


# ---- the function

@pytest.mark.parametrize("denominator, key", [("negatives", "InfoNCE_negatives_only_denominator (the published code)"),
                                              ("standard", "InfoNCE_standard (positive in the denominator)")])
def test_info_nce_agrees_with_the_authors(denominator, key):
    rows = [torch.from_numpy(np.random.RandomState(k).standard_normal((8, 32)).astype(np.float32)) for k in (300, 301)]
    student, teacher = (F.normalize(x, dim=1) for x in rows)
    assert info_nce(student, teacher, 0.07, "all", denominator).item() == pytest.approx(MCADKD[key], rel=1e-5)


@pytest.mark.parametrize("key, taus", [("tau_0.07", (0.07, 0.07)), ("tau_image_0.1_tau_patch_0.05", (0.1, 0.05))])
def test_info_nce_of_mcadkd_with_a_temperature_for_images_and_one_for_patches(key, taus):
    published = PUBLISHED["MCADKD_hybrid_fixed_embeddings"][key]
    total = 0
    for kind, first, shape, share, tau in (("image", 600, (8, 256), 0.3, taus[0]), ("patch", 602, (64, 256), 0.7, taus[1])):
        rows = [np.random.RandomState(first + k).standard_normal(shape) for k in range(2)]
        student, teacher = (F.normalize(torch.tensor(x, dtype=torch.float32)) for x in (rows[0], 0.5 * rows[0] + rows[1]))
        temperature = torch.tensor(tau, requires_grad=True)
        value = info_nce(student.requires_grad_(), teacher, temperature, "all")
        assert value.item() == pytest.approx(published[kind], rel=1e-4)
        (share * value).backward()
        assert temperature.grad.item() == pytest.approx(published[f"d_total_d_tau_{kind}"], rel=1e-4)
        total += share * value.item()
        if kind == "image":
            assert student.grad.norm().item() == pytest.approx(published["grad_norm_student_image_embeddings"], rel=1e-4)
    assert total == pytest.approx(published["total"], rel=1e-4)


def test_the_term_agrees_with_mcadkd_on_images(monkeypatch):
    about = PUBLISHED["MCADKD_hybrid_from_images"]
    net = make_loss(nce_mining="all", nce_patches=8, nce_patch_size=48, rgb_range=1, patch_size=96).terms["NCE"]
    for kind, keys in (("image", "proj_keys"), ("patch", "patch_proj_keys")):
        net.embeddings[kind].load_state_dict(golden_parameters(about[keys]))
    teacher = np.kron(np.random.RandomState(610).uniform(0, 1, (4, 3, 3, 3)), np.ones((32, 32)))
    student = np.clip(teacher + 0.1 * np.random.RandomState(611).standard_normal((4, 3, 96, 96)), 0, 1)
    places = torch.tensor(about["crops_student"]).view(4, 8, 3)
    monkeypatch.setattr(nce, "draw_places", lambda *_: (places[:, :, 1], places[:, :, 2]))
    value = net(make_step(*(torch.tensor(x, dtype=torch.float32) for x in (student, teacher))))
    assert value.item() == pytest.approx(about["same_place"]["total"], rel=1e-4)


def plain_info_nce(student, teacher, temperature, mining, denominator):
    """The formula in loops over numbers."""
    total, count = 0, len(student)
    for i in range(count):
        cosine = [sum(a * b for a, b in zip(student[i].tolist(), row.tolist())) / temperature for row in teacher]
        below = sorted(cosine[:i] + cosine[i + 1:], reverse=True)
        if mining == "hard":
            below = below[:math.ceil((count - 1) / 2)]
        if denominator == "standard":
            below.append(cosine[i])
        total += math.log(sum(math.exp(x) for x in below)) - cosine[i]
    return total / count


@pytest.mark.parametrize("count", [2, 3, 6, 7])
@pytest.mark.parametrize("mining", ["hard", "all"])
@pytest.mark.parametrize("denominator", ["negatives", "standard"])
def test_info_nce_equals_plain_loops(count, mining, denominator):
    student, teacher = embeddings(count, 5)
    expected = plain_info_nce(student, teacher, 0.2, mining, denominator)
    assert info_nce(student, teacher, 0.2, mining, denominator).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mining", ["hard", "all"])
@pytest.mark.parametrize("denominator", ["negatives", "standard"])
def test_gradient_of_info_nce_is_that_of_its_value(mining, denominator):
    student, teacher = embeddings(5, 4)
    temperature = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, mining, denominator),
                                    [x.requires_grad_() for x in (student, teacher, temperature)])


@pytest.mark.parametrize("mining, kept", [("hard", 4), ("all", 7)])
def test_hard_mining_keeps_the_most_similar_half_and_never_the_positive(mining, kept):
    student = F.normalize(torch.randn(8, 8), dim=1).requires_grad_()
    info_nce(student, torch.eye(8), 0.1, mining).backward()  # with this teacher a student's numbers are its similarities
    for i in range(8):
        others = sorted((k for k in range(8) if k != i), key=lambda k: -student[i, k].item())
        assert student.grad[i, i] < 0 and (student.grad[i, others[:kept]] > 0).all()
        assert (student.grad[i, others[kept:]] == 0).all()
    all_negatives = info_nce(student, torch.eye(8), 0.1, "all")
    assert (info_nce(student, torch.eye(8), 0.1, mining) < all_negatives) == (mining == "hard")


def test_one_embedding_alone_is_refused():
    with pytest.raises(ValueError, match="no negatives"):
        info_nce(*embeddings(1, 4), 0.07)


def test_one_point_for_everything_is_no_minimum():
    same = F.normalize(torch.ones(6, 4), dim=1)
    apart = torch.eye(6)
    assert info_nce(same, same, 0.07, "all").item() == pytest.approx(math.log(5), rel=1e-5)
    assert info_nce(apart, apart, 0.07, "all") < 0


# ---- patches

def test_patches_are_what_slices_are():
    image = torch.rand(3, 2, 9, 11)
    rows, columns = places = draw_places(image, 4, 6)
    expected = [image[b, :, r:r + 4, c:c + 4] for b in range(3) for r, c in zip(rows[b].tolist(), columns[b].tolist())]
    assert rows.shape == (3, 6) and torch.equal(crop(image, places, 4), torch.stack(expected))


def test_places_cover_the_image_and_differ():
    rows, columns = draw_places(torch.zeros(50, 3, 6, 7), 4, 12)  # 3 x 4 places
    assert all(len(set(zip(*x))) == 12 for x in zip(rows.tolist(), columns.tolist()))
    rows, columns = draw_places(torch.zeros(200, 3, 6, 7), 4, 1)
    assert set(rows.flatten().tolist()) == {0, 1, 2} and set(columns.flatten().tolist()) == {0, 1, 2, 3}


def test_student_and_teacher_patches_come_from_the_same_places():
    net = make_loss(nce_type="patch").terms["NCE"]
    student, seen = images(4, 3, 12, 12, count=1)[0], []
    for _ in range(2):
        patches = net.patches(student, student + 1)
        assert torch.equal(patches[0] + 1, patches[1])
        seen.append(patches[0])
    assert not torch.equal(*seen)
    state = torch.get_rng_state()
    again = []
    for _ in range(2):
        torch.set_rng_state(state)
        again.append(net.patches(student, student)[0])
    assert torch.equal(*again)


def test_images_smaller_than_the_crops_give_the_patches_they_have():
    net = make_loss(nce_type="patch", nce_patches=8).terms["NCE"]
    assert net.patches(*images(4, 3, 6, 6))[0].shape == (16, 3, 5, 5)
    assert net.patches(*images(4, 3, 4, 4))[1].shape == (4, 3, 4, 4)


# ---- the term

def plain_embedding(state, kind, x):
    """METHODS.md's networks, from the term's state_dict."""
    for index in (0,) if kind == "image" else (0, 2):
        name = f"embeddings.{kind}.{index}"
        x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
    last = max(int(key.split(".")[2]) for key in state if key.startswith(f"embeddings.{kind}"))
    x = x.mean((2, 3)) @ state[f"embeddings.{kind}.{last}.weight"].T + state[f"embeddings.{kind}.{last}.bias"]
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rgb_range", [255, 1])
def test_hybrid_is_a_weighted_sum_of_images_and_patches(rgb_range):
    net = make_loss("0.5*NCE", rgb_range=rgb_range)
    term, (student, teacher) = net.terms["NCE"], images(4, 3, 12, 12)
    step = make_step(student * rgb_range / 255, teacher * rgb_range / 255)
    torch.manual_seed(5)
    value = net(step)[0].item()  # 0.5, once
    torch.manual_seed(5)
    places, state = draw_places(student, 5, 3), term.state_dict()
    parts = [plain_info_nce(*(plain_embedding(state, kind, x / 255) for x in pair), 0.07, "hard", "negatives")
             for kind, pair in (("image", (student, teacher)),
                                ("patch", [crop(x, places, 5) for x in (student, teacher)]))]
    assert value == pytest.approx(0.5 * (0.3 * parts[0] + 0.7 * parts[1]), rel=1e-4)
    shapes = {tuple(p.shape) for p in term.parameters() if p.dim() > 1}
    assert shapes == {(128, 3, 3, 3), (256, 128), (64, 3, 3, 3), (128, 64, 3, 3)}


@pytest.mark.parametrize("kind", ["image", "patch"])
def test_a_single_type_has_a_single_embedding_at_full_weight(kind):
    net = make_loss(nce_type=kind, nce_mining="all", nce_denominator="standard")
    assert set(net.terms["NCE"].embeddings) == {kind}
    step = make_step(*images(4, 3, 12, 12))
    torch.manual_seed(5)
    value = net(step)[0].item()
    torch.manual_seed(5)
    pair = step.student.sr, step.teacher.sr
    if kind == "patch":
        pair = net.terms["NCE"].patches(*pair)
    state = net.terms["NCE"].state_dict()
    expected = plain_info_nce(*(plain_embedding(state, kind, x / 255) for x in pair), 0.07, "all", "standard")
    assert value == pytest.approx(expected, rel=1e-4)


def test_gradient_of_the_term_is_that_of_its_value():
    net = make_loss(rgb_range=1, nce_patch_size=3, nce_patches=2).double()
    student, teacher = (x.double() / 255 for x in images(2, 3, 4, 4))

    def value(x):
        torch.manual_seed(3)
        return net(make_step(x, teacher))[0]
    assert torch.autograd.gradcheck(value, student.requires_grad_())


def test_images_of_reduced_precision_are_embedded_in_float32():
    student, teacher = images(4, 3, 12, 12)
    torch.manual_seed(3)
    half = make_loss()(make_step(student.bfloat16(), teacher.bfloat16()))[0]
    torch.manual_seed(3)
    assert half.dtype == torch.float32
    assert half == make_loss()(make_step(student.bfloat16().float(), teacher.bfloat16().float()))[0]


def test_embeddings_and_temperature_learn():
    net, step = make_loss(), make_step(*(x.requires_grad_() for x in images(4, 3, 12, 12)))
    names = {f"terms.NCE.{name}" for name in (
        "log_temperatures.image", "log_temperatures.patch", "embeddings.image.0.weight", "embeddings.image.4.weight",
        "embeddings.patch.0.weight", "embeddings.patch.6.bias")}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert names <= set(before) and len(net.trainable_parameters()) == len(before)
    assert [before[f"terms.NCE.log_temperatures.{kind}"].exp().item() for kind in ("image", "patch")] == 2 * [
        pytest.approx(0.07)]
    optimizer, values = torch.optim.Adam(net.trainable_parameters(), 1e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        total, _ = net(step)
        total.backward()
        optimizer.step()
        net.update(step)
        values.append(total.item())
    assert all(not torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert step.student.sr.grad.abs().sum() > 0 and step.teacher.sr.grad.abs().sum() > 0  # learns from both sides
    assert sum(values[-3:]) < sum(values[:3])


def test_the_temperature_stays_positive():
    net = make_loss(nce_type="image")
    teacher, = images(4, 3, 12, 12, count=1)
    step, temperature = make_step(teacher, teacher), net.terms["NCE"].log_temperatures["image"]
    optimizer = torch.optim.SGD([temperature], 1000)  # the positive is the best: the loss falls as long as tau does
    for _ in range(3):
        optimizer.zero_grad()
        total, _ = net(step)
        total.backward()
        optimizer.step()
        net.update(step)
        assert torch.isfinite(total)
    assert temperature.exp().item() == pytest.approx(0.01)


@pytest.mark.parametrize("flags, words", [
    (dict(batch_size=1), "--batch_size 1 has none.*--nce_type patch"),
    (dict(batch_size=1, nce_type="image"), "--batch_size 1 has none"),
    (dict(batch_size=1, nce_type="patch", nce_patches=1), "no negatives"),
    (dict(nce_patch_size=13), "--nce_patch_size 13 are larger.*--patch_size 12"),
    (dict(nce_patch_size=12), "--nce_patches 3 different patches.* 1 of"),
])
def test_what_cannot_be_contrasted_is_explained(flags, words):
    with pytest.raises(UserError, match=words):
        make_loss(**flags)


def test_what_a_type_does_not_use_is_not_asked_for():
    make_loss(nce_type="image", nce_patch_size=99)
    net = make_loss(nce_type="patch", batch_size=1)
    assert torch.isfinite(net(make_step(*images(1, 3, 12, 12)))[0])
