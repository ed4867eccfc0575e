"""export.py: files in every format compute the network; refusals; a program without PyTorch."""
import copy
import json
import re
import subprocess
import sys
import types

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import compare_formats
import exporting
import option
from checkpoint import save_model
from conftest import ROOT
from exporting.common import describe, sample_images
from model import fuse, load_model, san
from model.common import ImageConv, pad_to_window, reflected_positions
from model.compact import Compact
from model.nafnet import NAFNet
from model.rcan import RCAN
from model.rrdb import RRDB
from model.span import SPAN
from model.swinir import SwinIR
from system.errors import UserError
from test_all_networks import each_network
from test_all_networks import small as small_network
from test_swinir import perturbed

pytest.importorskip("onnxruntime", reason="the packages of requirements-export.txt are not installed")
SUFFIXES = dict(onnx=".onnx", safetensors=".safetensors", torchscript=".pt", ncnn=".param", spandrel=".pth")
ODD_SIZES = (2, 3, 9, 11), (1, 3, 16, 31)  # neither of the recorded image nor of the check
TINY = dict(n_resgroups=1, n_resblocks=1, n_feats=8, reduction=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(name, scale=None):
    net = small_network(name, scale, n_resgroups=1, n_modules=1, depths=[2], num_heads=[2], RDNconfig="1,2,8")
    return perturbed(net) if name == "SwinIR" else net  # its initial weights are tiny


def unit(net):
    """The network in its form for tests, for images in [0, 1]."""
    net = fuse(net.eval()).requires_grad_(False)
    net.rgb_range = 1
    return net


def export(net, folder, kind, precision="single", calibration=None, suffix=None):
    path = folder / f"net{suffix or SUFFIXES[kind]}"
    files, difference = exporting.export(net, path, kind, precision, describe(net, precision, "a.pt", "MIT"), calibration)
    assert files[0] == path and all(file.stat().st_size for file in files)
    assert sorted(folder.iterdir()) == sorted(files)
    return exporting.module_of(kind).runner(path), difference


def assert_close(net, run, tolerance=1e-4):
    for shape in ODD_SIZES:
        x = torch.rand(shape)
        expected = net(x)
        assert torch.allclose(run(x), expected, atol=tolerance * max(1, expected.abs().max().item()))


# ---- every network

@each_network
def test_onnx_of_every_network_at_any_size(tmp_path, name):
    net = unit(small(name))
    run, difference = export(net, tmp_path, "onnx")
    assert difference < 1e-5
    assert_close(net, run)


@each_network
def test_torchscript_and_safetensors_of_every_network(tmp_path, name):
    net = unit(small(name))
    for kind in ("torchscript", "safetensors"):
        (tmp_path / kind).mkdir()
        run, difference = export(net, tmp_path / kind, kind)
        assert difference < 1e-5
        assert_close(net, run)
    loaded = load_model(tmp_path / "safetensors" / "net.safetensors")
    assert type(loaded) is type(net) and loaded.config == net.config


def test_the_metadata_hold_what_a_program_needs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    safetensors = pytest.importorskip("safetensors")
    net = unit(Compact(2, 8, 2))
    for kind in ("onnx", "safetensors", "torchscript"):
        (tmp_path / kind).mkdir()
        export(net, tmp_path / kind, kind)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "net.onnx")
    found = session.get_modelmeta().custom_metadata_map
    assert found == dict(network="Compact", config=json.dumps(net.config), scale="2", rgb_range="1", multiple="1",
                         window="1", receptive_field="4", precision="single", source="a.pt", license="MIT")
    assert [blob.name for blob in (*session.get_inputs(), *session.get_outputs())] == ["input", "output"]
    with safetensors.safe_open(tmp_path / "safetensors" / "net.safetensors", "pt") as file:
        assert file.metadata() == found
    extra = {"metadata.json": ""}
    torch.jit.load(tmp_path / "torchscript" / "net.pt", _extra_files=extra)
    assert json.loads(extra["metadata.json"]) == found


@pytest.mark.parametrize("height, width", [(24, 20), (9, 30), (31, 8)])
def test_the_centre_crop_of_san_is_recorded_for_any_size(monkeypatch, height, width):
    monkeypatch.setattr(san, "COVARIANCE_SIDE", 11)
    net = unit(small("SAN"))
    traced, x = exporting.common.trace(net, "single"), torch.rand(1, 3, height, width)
    assert torch.allclose(traced(x), net(x), atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("window", [2, 4, 8])
def test_the_recorded_padding_is_that_of_training(size, window):
    x = torch.arange(float(size)).view(1, 1, size, 1).expand(1, 1, size, window)
    assert pad_to_window(x, window)[0, 0, :, 0].tolist() == reflected_positions(size, window, x.device).tolist()


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "ncnn"])
def test_a_network_that_distinguishes_large_images_is_not_recorded(tmp_path, kind):
    pytest.importorskip("ncnn")
    with pytest.raises(UserError, match=r"--tlc_size 64 .* give --tlc_size 0"):
        export(unit(NAFNet(1, 8, [1], 1, [1], tlc_size=64)), tmp_path, kind)
    assert not list(tmp_path.iterdir())


# ---- float16 and int8

@pytest.mark.parametrize("name", ["RCAN", "SwinIR", "SAN", "Restormer"])
def test_half_precision_computes_in_float16_between_float32(tmp_path, name):
    onnx = pytest.importorskip("onnx")
    net = unit(small(name))
    run, difference = export(net, tmp_path, "onnx", "half")
    assert 1e-5 < difference < 5e-3
    assert_close(net, run, 5e-3)
    graph = onnx.load(tmp_path / "net.onnx").graph
    kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    assert {blob.type.tensor_type.elem_type for blob in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert {weight.data_type for weight in graph.initializer if weight.name.endswith("weight")} & kinds == {
        onnx.TensorProto.FLOAT16}


def test_int8_quantises_all_convolutions_but_those_of_images(run_main, tiny_data, tmp_path):
    onnx = pytest.importorskip("onnx")
    net = RCAN(2, **TINY)
    save_model(net, tmp_path / "net.pt")
    status, out, _ = run_main("export", f"--ckp_path {tmp_path / 'net.pt'} --format onnx -o {tmp_path / 'net.onnx'} --int8 "
                              f"{tiny_data / 'tiny' / 'HR'} --data_test tiny --dir_data {tiny_data}")
    assert status == 0
    assert "largest difference" in out[1] and "times as fast as float32" in out[2]
    int8, single = map(float, re.search(r"tiny: ([0-9.]+) dB in int8, ([0-9.]+) dB in float32", out[3]).groups())
    assert abs(int8 - single) < 1
    graph = onnx.load(tmp_path / "net.onnx").graph
    floats = {tensor.name for tensor in graph.initializer
              if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4}
    images = {f"net.{name}.weight" for name, module in net.named_modules() if isinstance(module, ImageConv)}
    assert {"net.head.0.weight", "net.tail.1.weight"} <= floats <= images  # the two mean shifts share one weight
    scales = [weight for weight in graph.initializer if weight.name.endswith("weight_scale")]
    assert scales and all(weight.dims for weight in scales)  # per channel
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert about["precision"] == "int8" and about["network"] == "RCAN"


# ---- ncnn

def test_ncnn(tmp_path):
    pytest.importorskip("ncnn")
    net = unit(Compact(2, 8, 2))
    run, difference = export(net, tmp_path, "ncnn")
    assert difference < 1e-5
    assert_close(net, run)
    text = (tmp_path / "net.param").read_text()
    assert re.search(r"^Input \S+ 0 1 data\b", text, re.MULTILINE) and re.search(r" output\b", text)


def test_ncnn_has_no_windows(tmp_path):
    pytest.importorskip("ncnn")
    with pytest.raises(UserError, match=r"SwinIR cannot be converted \(.*\); give --format onnx"):
        export(unit(small("SwinIR")), tmp_path, "ncnn")
    assert not list(tmp_path.iterdir())


# ---- spandrel

def swinir(**sizes):
    return perturbed(SwinIR(**{**dict(scale=2, depths=[2, 2], n_feats=12, num_heads=[2, 2], window_size=8), **sizes}))


SPANDREL = {  # a network, names by which spandrel detects it, and shapes from which it reads sizes
    "RCAN": (lambda: RCAN(2, 2, 2, 16, 4), {
        "head.0.weight": (16, 3, 3, 3), "tail.1.weight": (3, 16, 3, 3), "tail.0.0.weight": (64, 16, 3, 3),
        "body.0.body.0.body.0.weight": (16, 16, 3, 3), "body.0.body.0.body.3.conv_du.0.weight": (4, 16, 1, 1),
        "sub_mean.weight": (3, 3, 1, 1)}),
    "Compact": (lambda: Compact(4, 8, 2), {"body.0.weight": (8, 3, 3, 3), "body.1.weight": (8,), "body.6.bias": (48,)}),
    "Compact, relu": (lambda: Compact(2, 8, 2, "relu"), {"body.1.weight": (8,), "body.5.weight": (8,)}),
    "Compact, leakyrelu": (lambda: Compact(2, 8, 2, "leakyrelu"), {"body.1.weight": (8,)}),
    "SPAN": (lambda: SPAN(2, 12), {
        "conv_1.sk.weight": (12, 3, 1, 1), "block_1.c1_r.sk.weight": (12, 12, 1, 1), "conv_cat.weight": (12, 48, 1, 1),
        "block_1.c1_r.eval_conv.weight": (12, 12, 3, 3), "block_1.c3_r.eval_conv.weight": (12, 12, 3, 3),
        "conv_2.sk.weight": (12, 12, 1, 1), "conv_2.eval_conv.weight": (12, 12, 3, 3),
        "upsampler.0.weight": (12, 12, 3, 3)}),
    "Compact, scale 1": (lambda: Compact(1, 8, 2), {"body.6.bias": (3,)}),
    "SPAN, scale 1": (lambda: SPAN(1, 12), {"upsampler.0.weight": (3, 12, 3, 3)}),
    "NAFNet": (lambda: small("NAFNet"), {"intro.weight": (16, 3, 3, 3), "middle_blks.0.sca.1.weight": (64, 64, 1, 1)}),
    "RRDB": (lambda: RRDB(4, 16, 1), {"conv_first.weight": (16, 3, 3, 3), "body.0.rdb1.conv1.weight": (32, 16, 3, 3),
                                     "conv_body.weight": (16, 16, 3, 3), "conv_last.weight": (3, 16, 3, 3)}),
    "RRDB, scale 2": (lambda: RRDB(2, 16, 1), {"conv_first.weight": (16, 12, 3, 3)}),
    "SwinIR": (swinir, {
        "layers.0.residual_group.blocks.0.norm1.weight": (12,), "conv_first.weight": (12, 3, 3, 3),
        "layers.0.residual_group.blocks.0.mlp.fc1.bias": (24,),
        "layers.0.residual_group.blocks.0.attn.relative_position_index": (64, 64),
        "layers.1.residual_group.blocks.1.attn_mask": (64, 64, 64)}),
    "SwinIR, light": (lambda: swinir(scale=3, upsampler="pixelshuffledirect", window_size=4), {
        "layers.0.residual_group.blocks.1.attn_mask": (256, 16, 16)}),
    "SwinIR, denoising": (lambda: swinir(scale=1, upsampler=""), {"conv_last.weight": (3, 12, 3, 3)}),
    "SwinIR, real": (lambda: swinir(scale=4, upsampler="nearest+conv", resi_connection="3conv"), {
        "conv_up2.weight": (64, 64, 3, 3), "conv_after_body.0.weight": (3, 12, 3, 3)}),
}


@pytest.fixture
def spandrel(monkeypatch):
    """The package, with an empty torchvision where there is none for this PyTorch: two of its other networks import it."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    functional = sys.modules["torchvision.transforms.functional"]
    functional.normalize = functional.rotate = functional.InterpolationMode = None
    return pytest.importorskip("spandrel", exc_type=ImportError)


@pytest.mark.parametrize("name", SPANDREL)
def test_files_for_spandrel_have_its_names_and_shapes(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    make, expected = SPANDREL[name]
    net = unit(make())
    run, difference = export(net, tmp_path, "spandrel")
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert difference < 1e-5
    assert_close(net, run)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", SPANDREL)
def test_spandrel_computes_the_network(spandrel, tmp_path, name, suffix):
    net = unit(SPANDREL[name][0]())
    _, difference = export(net, tmp_path, "spandrel", suffix=suffix)
    model = spandrel.ModelLoader("cpu").load_from_file(tmp_path / f"net{suffix}").eval()  # without stochastic depth
    assert model.architecture.id == name.partition(",")[0].replace("RRDB", "ESRGAN") and model.scale == net.scale
    assert difference < 1e-5
    x = torch.rand(1, 3, 23, 18)
    assert torch.allclose(model.model(x.clone()), net(x), atol=1e-4 * max(1, net(x).abs().max().item()))


@pytest.mark.parametrize("net, words", [
    (lambda: small("IMDN"), "spandrel has no IMDN"), (lambda: swinir(img_range=2), "img_range 2"),
    (lambda: SPAN(2, 12, img_range=1), "img_range 1"), (lambda: RCAN(1, **TINY), "scale 1"),
    (lambda: NAFNet(1, 8, [1], 1, [1], tlc_size=64), "tlc_size 64"), (lambda: RRDB(4, 8, 1, 8), "num_grow_ch 8")])
def test_networks_that_spandrel_lacks_are_refused(tmp_path, net, words):
    with pytest.raises(UserError, match=f"--format spandrel: .*{words}.*; give --format onnx"):
        export(unit(net()), tmp_path, "spandrel")
    assert not list(tmp_path.iterdir())


# ---- what is refused

@pytest.fixture
def checkpoint(tmp_path):
    save_model(Compact(2, 8, 2), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize("line, words", [
    ("", "give --ckp_path FILE, --format"), ("--format onnx -o a.onnx", "give --ckp_path"),
    ("--ckp_path {net} --format onnx", "-o FILE"),
    ("--ckp_path {net} --format onnx -o {folder}/a.pth", "ends in .onnx"),
    ("--ckp_path {net} --format ncnn -o {folder}/a.bin", "ends in .param"),
    ("--ckp_path {net} --format onnx -o {folder}/a.onnx --precision bf16", "single or half"),
    ("--ckp_path {net} --format onnx -o {folder}/a.onnx --int8 {folder} --precision half", "int8 from single"),
    ("--ckp_path {net} --format torchscript -o {net}", "would be replaced"),
    ("--ckp_path {net} --format onnx -o {folder}/a.onnx --int8 {folder}/none", "no images"),
    ("--ckp_path {net} --format ncnn -o {folder}/a.param --int8 {folder}", "--format onnx"),
    ("--ckp_path {net} --format spandrel -o {folder}/a.pth --rgb_range 255", "[0, 1]"),
    ("--ckp_path {net} --format safetensors -o {net}/a.safetensors", "cannot write"),
    ("--ckp_path {folder}/none.pt --format onnx -o {folder}/a.onnx", "no such file")])
def test_mistakes_get_one_line_and_nothing_is_written(run_main, checkpoint, tmp_path, line, words):
    before = checkpoint.read_bytes()
    status, _, err = run_main("export", line.format(net=checkpoint, folder=tmp_path))
    assert status == 2 and len(err) == 1 and words in err[0]
    assert list(tmp_path.iterdir()) == [checkpoint] and checkpoint.read_bytes() == before


@pytest.mark.parametrize("kind, package", [("onnx", "onnx"), ("onnx", "onnxruntime"), ("ncnn", "ncnn"), ("ncnn", "pnnx"),
                                           ("safetensors", "safetensors")])
def test_a_missing_package_gets_one_line(run_main, monkeypatch, checkpoint, tmp_path, kind, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run_main("export", f"--ckp_path {checkpoint} --format {kind} -o {tmp_path / 'net'}{SUFFIXES[kind]}")
    assert status == 2 and len(err) == 1
    assert f"needs the package {package} " in err[0] and "pip install -r requirements-export.txt" in err[0]
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("kind", option.EXPORT_FORMATS)
def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch, kind):
    module, net = exporting.module_of(kind), unit(Compact(2, 8, 2))
    other = copy.deepcopy(net)
    if kind == "ncnn":
        pytest.importorskip("ncnn")
    with torch.no_grad():
        other.body[-1].bias += 0.01
    write = module.write
    monkeypatch.setattr(module, "write", lambda net, *rest: write(other, *rest))
    path = tmp_path / f"net{SUFFIXES[kind]}"
    path.write_text("an earlier file")
    with pytest.raises(UserError, match=r"differs by up to 0.01 .*nothing was written"):
        exporting.export(net, path, kind, "single", describe(net, "single", "", ""))
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "an earlier file"


def test_images_in_0_to_255_on_request(run_main, checkpoint, tmp_path):
    status, out, _ = run_main("export", f"--ckp_path {checkpoint} --format onnx -o {tmp_path / 'net.onnx'} --rgb_range 255")
    assert status == 0 and "images in [0, 255]" in out[-1]
    x = 255 * torch.rand(1, 3, 12, 10)
    with torch.no_grad():
        found = exporting.module_of("onnx").runner(tmp_path / "net.onnx")(x)
        assert torch.allclose(found, load_model(checkpoint)(x), atol=0.01)


# ---- the table of formats, and the example

def test_the_table_of_formats(run_main, monkeypatch, tiny_data, checkpoint, tmp_path):
    monkeypatch.setattr(compare_formats, "SIDE", 32)
    status, _, _ = run_main("compare_formats", f"--ckp_path tiny={checkpoint} --int8 {tiny_data / 'tiny' / 'HR'} "
                            f"--data_test tiny --dir_data {tiny_data} -o {tmp_path / 'formats.csv'}")
    lines = (tmp_path / "formats.csv").read_text().splitlines()
    assert status == 0 and lines[0] == "network,format,difference,bytes,ms,tiny"
    assert [line.split(",")[1] for line in lines[1:5]] == ["PyTorch float32", "PyTorch bf16", "onnxruntime float32",
                                                           "onnxruntime float16"]
    psnrs = [float(line.split(",")[-1]) for line in lines[1:]]
    assert max(psnrs) - min(psnrs) < 1 and psnrs[0] == psnrs[2]


def test_the_example_upscales_without_pytorch(tmp_path):
    section = (ROOT / "code" / "README.md").read_text().split("## An exported network without PyTorch\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    net = unit(Compact(2, 8, 2))
    export(net, tmp_path, "onnx")
    (tmp_path / "net.onnx").rename(tmp_path / "student.onnx")
    photo = (sample_images(255)[0][0].permute(1, 2, 0)).numpy().astype(np.uint8)
    iio.imwrite(tmp_path / "photo.png", photo)
    subprocess.run([sys.executable, "-c", f"import sys; sys.modules['torch'] = None\n{code}"], cwd=tmp_path, check=True)
    expected = net(torch.tensor(photo).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0).mul(255).clamp(0, 255).round()
    assert np.abs(iio.imread(tmp_path / "photo_x2.png") - expected.numpy()).max() <= 1
