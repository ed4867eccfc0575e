"""The worked examples of code/README.md, executed as they stand there."""
import re
import sys
import types

import pytest
import torch

import data.views
import loss
import model
import option
from checkpoint import save_model
from conftest import ROOT
from data.views import make_views, plan
from model.edsr import EDSR

README = (ROOT / "code" / "README.md").read_text()


def example(title):
    """Return the Python code of a section."""
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def module_of(title, name, monkeypatch):
    """Execute a section's code as a module of that name."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(example(title), module.__dict__)
    return module


def test_a_term_in_another_script():
    student, teacher = EDSR(2, n_resblocks=3, n_feats=8), EDSR(2, n_resblocks=3, n_feats=12)
    names = dict(lr=255 * torch.rand(2, 3, 8, 8), hr=255 * torch.rand(2, 3, 16, 16), student=student, teacher=teacher,
                 torch=torch)
    exec(example("A term in your own training script"), names)
    names["loss"].backward()
    assert student.body[0].body[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_new_term(monkeypatch):
    family = module_of("Add a term", "loss.huber", monkeypatch)
    monkeypatch.setitem(loss.FAMILIES, "Huber", family)
    monkeypatch.setitem(loss.TERMS, "Huber", family.Huber)
    criterion = loss.build_loss("2*Huber+1*TS", loss.Context(option.parse([]), None, []))
    sr, hr = 255 * torch.rand(2, 1, 3, 8, 8)
    total, values = criterion(loss.LossInputs(hr, hr, loss.Output(sr), loss.Output(sr)))
    error = (sr - hr).abs()
    expected = torch.where(error < 1, error ** 2 / 2, error - 0.5).mean()
    assert values[0].item() == pytest.approx(2 * expected.item(), rel=1e-5)
    assert values[1] == 0 and total == values.sum()
    assert criterion.terms_on("zoom_in", False) == ["TS"]


def test_a_new_network(monkeypatch, tmp_path):
    espcn = module_of("Add a network", "model.espcn", monkeypatch)
    monkeypatch.setitem(model.NETWORKS, "ESPCN", (espcn.ESPCN, espcn.LAYOUTS))
    net = model.make_model("ESPCN", option.parse(["--model", "ESPCN", "--scale", "3", "--n_feats", "8"]))
    x = 255 * torch.rand(1, 3, 6, 7)
    sr, feature_maps = net(x, features=True)
    assert sr.shape == (1, 3, 18, 21) and [x.shape for x in feature_maps] == 4 * [(1, 8, 6, 7)]
    save_model(net, tmp_path / "ours.pt")
    torch.save(net.state_dict(), tmp_path / "state.pt")  # recognised by names and shapes alone
    for name in ("ours.pt", "state.pt"):
        assert torch.equal(model.load_model(tmp_path / name)(x), sr)


def test_a_new_view(monkeypatch):
    module = module_of("Add a view", "blurred_view", monkeypatch)
    monkeypatch.setitem(data.views.MAKERS, "blurred", module.blurred)
    args = types.SimpleNamespace(patch_size=16, scale=2, upcycle=[(0.5, "blurred")], n_zoom_in=1, zoom_in_tiles="image")
    (view,) = plan(args)
    assert (view.name, view.has_hr, view.side) == ("blurred", True, 16)
    lr, hr = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    original, blurred = make_views(lr, hr, 2, args.upcycle)
    assert torch.equal(original.lr, lr) and torch.allclose(blurred.lr, lr.float()) and blurred.hr is hr
    assert blurred.weight == 0.5
