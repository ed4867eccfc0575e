"""Re-parameterised convolutions: fused kernels against the branches, training form in files, and training end to end."""
import pytest
import torch
from torch.nn import functional as F

import evaluation
import summary
from checkpoint import save_model
from model import CheckpointError, fuse, inherit, load_model, make_model, slim
from model.compact import Compact
from model.reparameterisation import BLOCKS, ECB, LAPLACIAN, SOBEL, Conv3XC, DOConv, Reparameterised, conv3x3
from model.roles import make_networks
from model.span import SPAN
from option import parse
from system.errors import UserError

SMALL = [(Compact, dict(scale=2, n_feats=6, n_convs=3, reparameterise=block)) for block in BLOCKS]
SMALL += [(Compact, dict(scale=3, n_feats=4, n_convs=2, act_type="relu", reparameterise="ECB")),
          (SPAN, dict(scale=2, n_feats=6)), (SPAN, dict(scale=4, n_feats=4, reparameterise="DOConv"))]
each_small = pytest.mark.parametrize("network, sizes", SMALL, ids=lambda value: getattr(value, "__name__", str(value)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(module):
    """Set random weights of the size of trained ones, also where the initial ones are 0."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3 / max(1, p[0].numel()) ** 0.5)
    return module


def by_branches(block, x):
    """The published training forward pass of a block: one convolution for each branch."""
    def padded(y, value):  # pad with the response to zeros
        padded = F.pad(y, (1, 1, 1, 1))
        inside = F.pad(torch.ones_like(y), (1, 1, 1, 1)).bool()
        return torch.where(inside, padded, value[None, :, None, None])

    if isinstance(block, Conv3XC):
        return block.conv(F.pad(x, (1, 1, 1, 1))) + block.sk(x)
    if isinstance(block, DOConv):
        kernel = torch.stack([block.weight[:, i].flatten(1) @ (torch.eye(9) + block.D[i]).T.to(x)
                              for i in range(x.shape[1])], 1)
        return F.conv2d(x, kernel.view_as(block.weight), block.bias, padding=1)
    y = block.conv3x3(x) + block.squeeze(padded(block.expand(x), block.expand.bias))
    masks = [torch.tensor(SOBEL), torch.tensor(SOBEL).T, torch.tensor(LAPLACIAN)]
    for mask, layer, scale, shift in zip(masks, block.edges, block.scales, block.shifts):
        depthwise = mask.to(x) * scale[:, None, None, None]
        y = y + F.conv2d(layer(x), depthwise, shift, padding=1, groups=len(scale))
    return y


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("channels", [(3, 5), (6, 6), (1, 1)])
def test_a_block_equals_its_branches(name, channels):
    block = trained(BLOCKS[name](*channels).double())
    if isinstance(block, ECB):
        with torch.no_grad():
            block.scales.normal_()
    x = torch.randn(2, channels[0], 5, 7, dtype=torch.float64)
    expected = by_branches(block, x)
    assert torch.allclose(block(x), expected, rtol=1e-10, atol=1e-10)
    block, x = block.float(), x.float()
    assert torch.allclose(block(x).double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@each_small
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_fused_network_has_equal_output(network, sizes, dtype, tolerance):
    net = trained(network(**sizes)).to(dtype).train()
    net.rgb_range = 1
    fused, x = fuse(net), torch.rand(2, 3, 7, 9, dtype=dtype)
    assert not any(isinstance(module, Reparameterised) for module in fused.modules())
    assert fused.config == {**net.config, "reparameterise": "none"} and fused.rgb_range == 1 and fused.training
    with torch.no_grad():
        for one, other in zip((net(x, features=True)[0], *net(x, features=True)[1]),
                              (fused(x, features=True)[0], *fused(x, features=True)[1])):
            assert (one - other).abs().max() <= tolerance * one.abs().max()


def test_a_plain_network_is_fused_already():
    net = Compact(2, n_feats=4, n_convs=1)
    assert fuse(net) is net


def test_fused_weights_follow_the_weights():
    net, x = Compact(2, n_feats=4, n_convs=1, reparameterise="DOConv"), torch.rand(1, 3, 6, 6)
    before = fuse(net)
    trained(net)
    with torch.no_grad():
        assert not torch.allclose(before(x), net(x)) and torch.allclose(fuse(net)(x), net(x), rtol=1e-4)


@each_small
def test_a_slice_is_fused(network, sizes):
    student, x = slim(trained(network(**sizes)), 0.5), torch.rand(1, 3, 6, 6)
    fused = fuse(student)
    assert type(fused) is network and fused.n_feats == student.n_feats
    with torch.no_grad():
        assert torch.allclose(fused(x), student(x), rtol=1e-4, atol=1e-3)


@each_small
def test_gradient_reaches_every_parameter(network, sizes):
    net = trained(network(**sizes))
    net(torch.rand(2, 3, 8, 8) * 255).abs().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name, smallest, largest", [("DOConv", 0.95, 1.05), ("ECB", 1.05, 1.3)])
def test_the_initial_kernel_is_distributed_as_a_plain_one(name, smallest, largest):
    plain, block = conv3x3(32, 64, "none"), conv3x3(32, 64, name)
    ratio = block.kernel()[0].std() / plain.weight.std()
    assert smallest < ratio < largest


@each_small
def test_files_keep_the_training_form(tmp_path, network, sizes):
    net, x = trained(network(**sizes)).eval(), torch.rand(1, 3, 6, 6)
    save_model(net, tmp_path / "model_best.pt")
    loaded = load_model(tmp_path / "model_best.pt")
    assert loaded.config == net.config and loaded.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    save_model(fuse(net), tmp_path / "fused.pt")
    assert load_model(tmp_path / "fused.pt").config["reparameterise"] == "none"


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="reparameterise RepVGG is none of none, Conv3XC"):
        Compact(2, n_feats=4, reparameterise="RepVGG")
    with pytest.raises(UserError, match="the student's reparameterise is ECB, the teacher's none"):
        inherit(Compact(2, n_feats=4, reparameterise="ECB"), Compact(2, n_feats=4))


def test_a_student_inherits_branches_and_its_teacher_is_fused(tmp_path):
    teacher = trained(SPAN(2, n_feats=8))
    save_model(teacher, tmp_path / "span.pt")
    args = parse(f"--model SPAN --n_feats 4 --scale 2 --teacher {tmp_path / 'span.pt'} --init_from_teacher".split())
    student, teachers = make_networks(args, {"teacher"})
    assert torch.equal(student.block_2.c1_r.sk.weight, teacher.block_2.c1_r.sk.weight[:4, :4])
    assert [net.config["reparameterise"] for net in teachers] == ["none"]


def test_a_test_fuses_once(monkeypatch):
    net = make_model("SPAN", parse(["--model", "SPAN", "--n_feats", "4", "--scale", "2"]))
    kernels = []
    monkeypatch.setattr(Conv3XC, "kernel", lambda block, original=Conv3XC.kernel: kernels.append(block) or original(block))
    upscale = evaluation.by_network(net, torch.device("cpu"), parse([]))
    for _ in range(3):
        upscale(torch.zeros(6, 5, 3, dtype=torch.uint8).numpy())
    assert len(kernels) == 20


def test_summary_counts_the_fused_network():
    (_, net), = summary.load(parse(["--template", "SPAN", "--scale", "2"]))
    assert sum(p.numel() for p in net.parameters()) == 481_324  # the paper: 481 K
    flops = summary.count(net).flops
    assert abs(flops / 2 / 1e9 - 481_324 * 640 * 360 / 1e9) < 1


@pytest.mark.parametrize("model, flag, block", [
    ("Compact", "--n_convs 2 --n_feats 4 --reparameterise ECB", "ECB"), ("SPAN", "--n_feats 4", "Conv3XC"),
    ("Compact", "--n_convs 2 --n_feats 4 --reparameterise DOConv --ema 0.9 --precision bf16", "DOConv")])
def test_training_and_testing_end_to_end(run_main, tiny_data, tmp_path, model, flag, block):
    torch.save({"params": SPAN(2, n_feats=4).state_dict()}, tmp_path / "teacher.pth")
    data = f"--dir_data {tiny_data} --data_test tiny --scale 2 --cpu --n_threads 0 --dir_cache {tmp_path / 'cache'} "
    status, out, _ = run_main("train", f"--model {model} {flag} {data} --data_train tiny --patch_size 24 --batch_size 2 "
                              f"--epochs 1 --test_every 2 --teacher {tmp_path / 'teacher.pth'} "
                              f"--loss 1*DS+1*TS+1*SA --ckp_dir {tmp_path / 'run'}")
    assert status == 0
    best = tmp_path / "run" / "model" / "model_best.pt"
    assert torch.load(best, weights_only=True)["config"]["reparameterise"] == block
    trained_psnr = next(line.split()[2] for line in reversed(out) if line.startswith("tiny"))
    precision = "--precision bf16" if "bf16" in flag else ""
    status, out, _ = run_main("test", f"--ckp_path {best} {precision} {data}")
    assert status == 0 and out[-1].split()[2] == trained_psnr
    status, out, _ = run_main("compare", f"--ckp_path a={best}+b={tmp_path / 'teacher.pth'} {data} "
                              f"--ckp_dir {tmp_path / 'compare'}")
    assert status == 0
    fused = sum(p.numel() for p in fuse(load_model(best)).parameters())
    assert next(line.split()[5] for line in out if line.startswith("a ")) == str(fused)


def test_a_form_that_contradicts_the_file_is_refused(tmp_path):
    torch.save(SPAN(2, n_feats=4).state_dict(), tmp_path / "span.pth")
    with pytest.raises(CheckpointError, match="holds SPAN with reparameterise Conv3XC, not none"):
        load_model(tmp_path / "span.pth", reparameterise="none")
