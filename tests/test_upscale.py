"""upscale.py: image files with their channels, bit depth and profile; folders and patterns; ONNX files; raw video."""
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

import upscale
import upscaler
from checkpoint import save_model
from conftest import ROOT
from data import image as image_files
from data.image import read_channels, write_image
from model.compact import Compact
from model.onnx_file import OnnxNetwork
from option_types import OutputSize
from system.errors import UserError
from system.memory import LiveMemory

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape, dtype=np.uint8, seed=0):
    """Smooth random images: their upscaled images leave [0, 255] rarely."""
    values = np.random.RandomState(seed).uniform(0.2, 0.8, shape)
    return (values * np.iinfo(dtype).max).round().astype(dtype)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Compact(2, 4, 1).eval()


@pytest.fixture(scope="module")
def flags(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.pt"
    save_model(net, path)
    return f"--cpu --ckp_path {path}"


def by_hand(net, image, factor=2):
    """Upscale H x W x C in float64, alpha with the network too, and round once."""
    peak = np.iinfo(image.dtype).max
    net = Compact(**net.config).double().requires_grad_(False)
    net.load_state_dict(by_hand.state)

    def run(channels):
        x = torch.from_numpy(channels.astype(np.float64) / peak * 255).permute(2, 0, 1)[None]
        sr = net(x.expand(-1, 3, -1, -1))
        return (sr if x.shape[1] == 3 else sr.mean(1, keepdim=True))[0].permute(1, 2, 0).numpy()

    colours = image.shape[2] - (image.shape[2] in (2, 4))
    parts = [run(part) for part in np.split(image, [colours], axis=2) if part.size]
    return np.clip(np.concatenate(parts, axis=2) * peak / 255, 0, peak)


@pytest.fixture(autouse=True)
def weights(net):
    by_hand.state = net.state_dict()


# ---- image files

@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_files_keep_channels_bit_depth_and_profile(tmp_path, suffix, channels, dtype):
    image = np.random.RandomState(0).randint(0, np.iinfo(dtype).max + 1, (9, 7, channels)).astype(dtype)
    path = tmp_path / f"a{suffix}"
    write_image(path, image, SRGB if channels > 2 else None)
    if (suffix, channels, dtype) == (".tif", 2, np.uint16):  # which Pillow cannot read
        assert np.array_equal(tifffile.imread(path), image)
        return
    found, profile = read_channels(path)
    assert found.dtype == dtype and np.array_equal(found, image) and profile == (SRGB if channels > 2 else None)


@pytest.mark.parametrize("settings", [
    {}, {"byteorder": ">"}, {"tile": (16, 16)}, {"compression": "zlib"}, {"rowsperstrip": 3},
    {"byteorder": ">", "compression": "zlib", "predictor": True}])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_files_of_16_bits(tmp_path, settings, channels):
    image = noise(20, 33, channels, dtype=np.uint16)
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(tmp_path / "a.tif", image.squeeze(), photometric="rgb" if channels > 1 else "minisblack",
                     extratags=[(274, "H", 1, 6)], **settings, **extra)
    assert np.array_equal(read_channels(tmp_path / "a.tif")[0], np.rot90(image, -1))  # the orientation


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_separate_planes_of_16_bits_are_refused(tmp_path, compression):
    tifffile.imwrite(tmp_path / "a.tif", noise(3, 20, 30, dtype=np.uint16), photometric="rgb", planarconfig="separate",
                     compression=compression)
    with pytest.raises(UserError, match="separate planes"):
        read_channels(tmp_path / "a.tif")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits_becomes_alpha(tmp_path, channels):
    image = noise(4, 5, channels, dtype=np.uint16)
    data = image_files._png_of_16_bits(image, None).tobytes()
    chunk = io.BytesIO()
    image_files.PngImagePlugin.putchunk(chunk, b"tRNS", image[1, 2].astype(">u2").tobytes())
    (tmp_path / "a.png").write_bytes(data[:33] + chunk.getvalue() + data[33:])
    found, _ = read_channels(tmp_path / "a.png")
    assert np.array_equal(found[..., :-1], image) and np.argwhere(found[..., -1] == 0).tolist() == [[1, 2]]


@pytest.mark.parametrize("mode, settings, channels", [
    ("L", {}, 1), ("1", {}, 1), ("L", {"transparency": 3}, 2), ("LA", {}, 2), ("P", {}, 3), ("P", {"transparency": 0}, 4)])
def test_the_channels_of_other_modes(tmp_path, mode, settings, channels):
    Image.fromarray(noise(8, 9, 3)).convert(mode).save(tmp_path / "a.png", **settings)
    assert read_channels(tmp_path / "a.png")[0].shape == (8, 9, channels)


@pytest.mark.parametrize("profile", [None, bytes(16) + b"CMYK" + bytes(200)])
def test_cmyk_becomes_rgb_without_its_profile(tmp_path, profile):
    image, exif = np.full((8, 10, 3), (200, 100, 50), np.uint8), Image.Exif()
    exif[274] = 6
    Image.fromarray(image).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=profile, exif=exif)
    found, profile = read_channels(tmp_path / "a.jpg")
    assert found.shape == (10, 8, 3) and np.abs(found.astype(int) - image.swapaxes(0, 1)).max() <= 8 and profile is None


# ---- upscaling

@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_is_upscaled_with_its_channels_and_bits(run_main, tmp_path, flags, net, channels, dtype):
    image = noise(12, 15, channels, dtype=dtype)
    write_image(tmp_path / "in.png", image, SRGB if channels > 2 else None)
    status, out, _ = run_main("upscale", f"-i {tmp_path}/in.png -o {tmp_path}/new/out.png {flags}")
    found, profile = read_channels(tmp_path / "new" / "out.png")
    assert status == 0 and out[-1] == "1 of 1 images upscaled" and profile == (SRGB if channels > 2 else None)
    assert found.dtype == dtype and np.abs(found - by_hand(net, image)).max() < 0.6  # 0.5 and float32


def test_alpha_bicubic_and_constant_alpha_do_not_pass_the_network(run_main, tmp_path, flags, net):
    image = noise(12, 15, 4)
    write_image(tmp_path / "a.png", image)
    image[..., 3] = 17
    write_image(tmp_path / "b.png", image)
    status, _, _ = run_main("upscale", f"-i {tmp_path} -o {tmp_path}/out --alpha bicubic {flags}")
    alpha = np.array(Image.open(tmp_path / "out" / "a.png"))[..., 3]
    bicubic = np.array(Image.fromarray(noise(12, 15, 4)[..., 3]).resize((30, 24), Image.BICUBIC))
    assert status == 0 and np.abs(alpha.astype(int) - bicubic).max() <= 1
    assert run_main("upscale", f"-i {tmp_path}/b.png -o {tmp_path}/b_x2.png {flags}")[0] == 0
    assert (np.array(Image.open(tmp_path / "b_x2.png"))[..., 3] == 17).all()


@pytest.mark.parametrize("outscale, size", [
    (3.5, (42, 38)), (1.5, (18, 16)), (2, (24, 22)), (0.01, (1, 1)), (2.04, (24, 22))])
def test_outscale_gives_the_rounded_size(run_main, tmp_path, flags, outscale, size):
    write_image(tmp_path / "a.png", noise(12, 11, 3))
    assert run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/b.png --outscale {outscale} {flags}")[0] == 0
    assert read_channels(tmp_path / "b.png")[0].shape[:2] == size


def test_the_orientation_is_applied_and_removed(run_main, tmp_path, flags):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(16, 24, 3)).save(tmp_path / "a.jpg", exif=exif, icc_profile=SRGB)
    assert run_main("upscale", f"-i {tmp_path}/a.jpg -o {tmp_path}/out {flags}")[0] == 0
    with Image.open(tmp_path / "out" / "a.jpg") as file:
        assert file.size == (32, 48) and 274 not in file.getexif() and file.info["icc_profile"] == SRGB


@pytest.mark.parametrize("ext, kind", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF")])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(run_main, tmp_path, flags, ext, kind, channels):
    write_image(tmp_path / "a.png", noise(12, 15, channels, dtype=np.uint16), SRGB if channels > 1 else None)
    status, out, _ = run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/out --ext {ext} --suffix _x2 {flags}")
    with Image.open(tmp_path / "out" / f"a_x2.{ext}") as file:
        assert status == 0 and file.format == kind and file.size == (30, 24)
        assert file.info.get("icc_profile") == (SRGB if channels > 1 else None)
        assert np.array(file).ndim == (3 if channels > 1 or ext == "webp" else 2)
    assert any("become 8" in line for line in out) == (ext in ("jpg", "webp"))


def test_tiles_and_self_ensemble_give_nearly_the_same(run_main, tmp_path, flags):
    write_image(tmp_path / "a.png", noise(40, 50, 3))
    for name, more in (("b", ""), ("c", "--chop_mem 1e-3"), ("d", "--self_ensemble")):
        assert run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/{name}.png {more} {flags}")[0] == 0
    b, c, d = (read_channels(tmp_path / f"{name}.png")[0].astype(int) for name in "bcd")
    assert np.abs(b - c).max() <= 1 and np.abs(b - d).max() > 1


# ---- folders and patterns

def make_tree(folder, *names, bad=()):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 9, 3, seed=number)).save(folder / name)
    for name in bad:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_bad_file_does_not_stop_the_others_and_outputs_are_kept(run_main, tmp_path, flags):
    make_tree(tmp_path / "in", "a.png", "b/c.bmp", "d.png", bad=["b.png", ".e.png", "f.txt"])
    command = f"-i {tmp_path}/in -o {tmp_path}/out {flags}"
    status, out, err = run_main("upscale", command)
    errors = [line for line in err if "error:" in line]
    assert status == 1 and len(errors) == 1 and f"{tmp_path}/in/b.png: unreadable image" in errors[0]
    assert out[-1] == "3 of 4 images upscaled" and tree(tmp_path / "out") == ["a.png", "b/c.png", "d.png"]
    (tmp_path / "in" / "b.png").unlink()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    (tmp_path / "out" / "d.png").unlink()
    status, out, _ = run_main("upscale", command)
    assert status == 0 and "2 of 3 outputs exist and are kept; --overwrite replaces them" in out
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine" and (tmp_path / "out" / "d.png").exists()
    assert run_main("upscale", f"{command} --overwrite")[0] == 0
    assert read_channels(tmp_path / "out" / "a.png")[0].shape == (16, 18, 3)


@pytest.mark.parametrize("pattern, expected", [
    ("*.png", ["a.png", "b.png"]), ("**/*.png", ["a.png", "b.png", "s/c.png", "s/t/e.png"]), ("s/*", ["c.png", "d.jpg"]),
    ("[ab].png", ["a.png", "b.png"])])
def test_patterns_keep_the_folders_below_their_fixed_part(run_main, tmp_path, flags, pattern, expected):
    make_tree(tmp_path / "in", "a.png", "b.png", "s/c.png", "s/d.jpg", "s/t/e.png", bad=["s/f.txt"])
    assert run_main("upscale", f"-i {tmp_path}/in/{pattern} -o {tmp_path}/out {flags}")[0] == 0
    assert tree(tmp_path / "out") == expected


def test_outputs_in_the_folder_of_the_inputs_are_not_upscaled_again(run_main, tmp_path, flags):
    make_tree(tmp_path, "a.png", "s/b.png")
    for out in (tmp_path, tmp_path / "x"):
        for _ in range(2):
            assert run_main("upscale", f"-i {tmp_path} -o {out} --suffix _x2 {flags}")[0] == 0
        assert tree(out) == sorted(["a_x2.png", "s/b_x2.png", *(["a.png", "s/b.png"] if out == tmp_path else [])])
        for name in ("a_x2.png", "s/b_x2.png"):
            (out / name).unlink()


def test_several_inputs_and_a_name_with_brackets(run_main, tmp_path, flags):
    make_tree(tmp_path, "a[1].png", "b.png")
    assert run_main("upscale", f"-i {tmp_path}/a[1].png {tmp_path}/b.png -o {tmp_path}/out {flags}")[0] == 0
    assert tree(tmp_path / "out") == ["a[1].png", "b.png"]


@pytest.mark.parametrize("line, words", [
    ("-i {in} -o {out} --ext png", "a.jpg and {in}/a.png have the same output {out}/a.png"),
    ("-i {in}/missing.png -o {out}", "missing.png: no such file"), ("-i {in}/s -o {out}", "no images there"),
    ("-i {in}/*.tif -o {out}", "no images there"), ("-i {in} -o {in}", "would replace it"),
    ("-i {in}/a.png -o {in}/a.png --overwrite", "would replace it"), ("-i {in} -o {out}.png", "not a single image"),
    ("-i {in}/*.*g -o {out}.png", "not a single image"), ("-i {in}/a.png -o {out}.gif", "cannot be written"),
    ("-i {in}/a.png -o {out}.png --ext jpg", "apply to a folder"), ("-o {out}", "-i IN missing"), ("", "-i IN and -o OUT"),
    ("-i {in} -o {out} --suffix a/b", "--suffix a/b"), ("-i {in} --pipe 4x4", "--input has no effect with --pipe"),
    ("-i {in} -o {out} --model a.onnx --scale 2", "--scale has no effect with --model"),
    ("-i {in} -o {out} --outscal 2", "did you mean --outscale"), ("-i {in} -o {out} --outscale 0", "above 0"),
    ("-i {in} -o {in}/a.png/b", "cannot write"), ("-i {in} -o {out} --model none.onnx", "none.onnx"),
    ("-i {in} -o {out} --scale 4 --ckp_path {net}", "scale 2, not 4"), ("--pipe 4x4", "")])
def test_a_mistake_gets_one_line_before_anything_starts(run_main, tmp_path, flags, monkeypatch, line, words):
    monkeypatch.setattr(upscaler.os, "isatty", lambda number: True)
    make_tree(tmp_path / "in", "a.png", "a.jpg", bad=["s/x.txt"])
    names = {"in": tmp_path / "in", "out": tmp_path / "out", "net": flags.split()[-1]}
    before = tree(tmp_path)
    status, _, err = run_main("upscale", line.format(**names))
    assert status == 2 and len(err) == 1 and err[0].startswith("error: ") and words.format(**names) in err[0]
    assert tree(tmp_path) == before


def test_what_a_format_cannot_hold_is_reported(run_main, tmp_path, flags, monkeypatch):
    monkeypatch.setitem(image_files.MAX_SIDE, ".webp", 29)
    write_image(tmp_path / "a.png", noise(8, 15, 4))
    write_image(tmp_path / "b.png", np.dstack([noise(8, 15, 3), np.full((8, 15), 255, np.uint8)]))
    status, _, err = run_main("upscale", f"-i {tmp_path} -o {tmp_path}/out --ext jpg {flags}")
    assert status == 1 and sum("transparent parts, which JPEG" in line for line in err) == 1
    assert tree(tmp_path / "out") == ["b.jpg"]
    status, _, err = run_main("upscale", f"-i {tmp_path}/b.png -o {tmp_path}/c.webp {flags}")
    assert status == 1 and any("sides of at most 29 pixels" in line for line in err)


def test_an_interruption_leaves_complete_files(tmp_path, monkeypatch):
    make_tree(tmp_path, "a.png", "b.png", "c.png")
    calls = []

    def forward(x):
        calls.append(x)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    jobs = [upscaler.Job(tmp_path / name, tmp_path / "out" / name) for name in ("a.png", "b.png", "c.png")]
    with pytest.raises(KeyboardInterrupt):
        upscaler.upscale_files(jobs, upscaler.Upscaler(forward, 2, "network"))
    assert tree(tmp_path / "out") == ["a.png"] and len(calls) == 2
    assert read_channels(tmp_path / "out" / "a.png")[0].shape == (16, 18, 3)


def test_errors_of_writing_and_of_memory_and_infinite_outputs_count_as_failed(tmp_path, capsys, monkeypatch):
    make_tree(tmp_path, "a.png", "b.png", "c.png", "d.png")
    problems = [FloatingPointError("infinite"), MemoryError(), None, None]

    def forward(x):
        problem = problems.pop(0)
        if problem:
            raise problem
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    jobs = [upscaler.Job(tmp_path / f"{name}.png", tmp_path / "out" / f"{name}.png") for name in "abcd"]
    (tmp_path / "out" / "c.png").mkdir(parents=True)
    assert upscaler.upscale_files(jobs, upscaler.Upscaler(forward, 2, "network")) == 1
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error:" in line]
    assert [next(word for word in ("infinite", "out of memory", "cannot write") if word in line) for line in errors] == [
        "infinite", "out of memory", "cannot write"]
    assert tree(tmp_path / "out") == ["d.png"]


# ---- the default network

def test_the_default_network_is_the_one_that_reaches_the_scale(run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(upscaler, "FOLDER", tmp_path)
    write_image(tmp_path / "a.png", noise(6, 7, 3))
    status, _, err = run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/out.png --cpu")
    assert status == 2 and "no default network for scale 2; give" in err[0] and "--ckp_path FILE" in err[0]
    for scale in (2, 4):
        save_model(Compact(scale, 4, 1), tmp_path / f"Compact_M_x{scale}.pt")
    for more, size in (("", 14), ("--scale 4", 28), ("--outscale 3.5", 24), ("--outscale 6", 42), ("--outscale 1.5", 10)):
        status, out, _ = run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/out.png --cpu --overwrite {more}")
        scale = 4 if size in (28, 24, 42) else 2
        assert status == 0 and f"Compact_M_x{scale}.pt: Compact, scale {scale}" in out[0]
        assert read_channels(tmp_path / "out.png")[0].shape[1] == size
    status, _, err = run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/out --cpu --scale 3")
    assert status == 2 and "no default network for scale 3, only for 2, 4; give" in err[0]


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "upscale.py", "--help"]
    ran = subprocess.run(command, cwd=ROOT / "code", capture_output=True, text=True, check=True)
    assert "--outscale" in ran.stdout and "upscale" in ran.stdout
    assert not {"torch", "numpy", "PIL"} & {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}


# ---- ONNX files

def export(net, path, maximum=1, half=False, dynamic=True, **metadata):
    """Export the network for images in [0, maximum], with metadata."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = Compact(**net.config).eval()
    net.load_state_dict(by_hand.state)
    net.rgb_range = maximum
    axes = {0: "n", 2: "h", 3: "w"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net.half() if half else net, torch.rand(1, 3, 8, 8, dtype=torch.half if half else torch.float),
                          str(path), dynamo=False, input_names=["input"], output_names=["output"],
                          dynamic_axes={"input": axes, "output": axes} if dynamic else None)
    if metadata:
        model = onnx.load(path)
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, path)
    return path


@pytest.mark.parametrize("settings, tolerance", [
    ({}, 1), (dict(maximum=255, rgb_range="255", multiple="4"), 1), (dict(half=True), 3 * 257)])
def test_an_onnx_file_gives_what_the_checkpoint_gives(run_main, tmp_path, flags, net, monkeypatch, settings, tolerance):
    monkeypatch.setattr(OnnxNetwork, "tile", 16)
    write_image(tmp_path / "a.png", noise(103, 37, 4, dtype=np.uint16))
    path = export(net, tmp_path / "net.onnx", **settings)
    assert run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/b.png {flags}")[0] == 0
    status, out, _ = run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/c.png --cpu --model {path}")
    b, c = (read_channels(tmp_path / f"{name}.png")[0].astype(int) for name in "bc")
    assert status == 0 and out[0] == f"{path}: ONNX, scale 2"
    border = 6 if "multiple" in settings else 0  # where the padding is a reflection instead of zeros
    assert np.abs(b - c)[:206 - border, :74 - border].max() <= tolerance


def test_inputs_of_an_onnx_file_are_multiples_and_tiles_have_a_fixed_size(tmp_path, net, monkeypatch):
    monkeypatch.setattr(OnnxNetwork, "tile", 16)
    network = OnnxNetwork(export(net, tmp_path / "net.onnx", multiple="8"), cpu=True)
    shapes, run = [], network.run
    monkeypatch.setattr(network, "run", lambda x: shapes.append(x.shape) or run(x))
    upscaled = upscaler.inference.upscale(network, torch.rand(1, 3, 203, 37), tiled=True)
    assert upscaled.shape == (1, 3, 406, 74) and network.window == 8
    assert len(shapes) > 1 and all(height % 8 == width % 8 == 0 and height <= 80 for _, _, height, width in shapes)


def test_an_onnx_file_without_onnxruntime_and_wrong_files_get_one_line(run_main, tmp_path, net, monkeypatch):
    write_image(tmp_path / "a.png", noise(6, 7, 3))
    (tmp_path / "text.onnx").write_text("no network")
    files = {"text.onnx": "onnxruntime cannot load it", "fixed.onnx": "8 x 8 pixels only", "range.onnx": "in its metadata"}
    export(net, tmp_path / "fixed.onnx", dynamic=False)
    export(net, tmp_path / "range.onnx", multiple="0")
    for name, words in files.items():
        status, _, err = run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/b.png --model {tmp_path}/{name}")
        assert status == 2 and len(err) == 1 and f"{tmp_path}/{name}" in err[0] and words in err[0]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, err = run_main("upscale", f"-i {tmp_path}/a.png -o {tmp_path}/b.png --model {tmp_path}/text.onnx")
    assert status == 2 and err == [f"error: {tmp_path}/text.onnx: an ONNX file needs the package onnxruntime: pip install "
                                   "onnxruntime"]


# ---- raw video

def frames_of(flags, dtype="u1", count=3):
    args = upscale.parse(["--pipe", "9x8", *flags.split()])
    frames = [noise(8, 9, 3, dtype=np.uint16 if dtype != "u1" else np.uint8, seed=n).astype(dtype) for n in range(count)]
    return upscaler.make_upscaler(args), frames


@pytest.mark.parametrize("pix_fmt, dtype", upscaler.DTYPES.items())
@pytest.mark.parametrize("outscale, size", [("", (16, 18)), ("--outscale 1.5", (12, 14))])
def test_frames_equal_files(run_main, tmp_path, flags, pix_fmt, dtype, outscale, size):
    upscale_array, frames = frames_of(f"{flags} {outscale}", dtype)
    sink = io.BytesIO()
    upscaler.upscale_frames(io.BytesIO(b"".join(map(np.ndarray.tobytes, frames))), sink, OutputSize(9, 8), pix_fmt,
                            upscale_array)
    found = np.frombuffer(sink.getvalue(), dtype).reshape(-1, *size, 3)
    for number, frame in enumerate(frames):
        write_image(tmp_path / f"{number}.png", frame.astype(frame.dtype.newbyteorder("=")))
    assert run_main("upscale", f"-i {tmp_path} -o {tmp_path}/out {outscale} {flags}")[0] == 0
    for number, frame in enumerate(found):
        assert np.array_equal(frame, read_channels(tmp_path / "out" / f"{number}.png")[0])
    assert len(found) == 3


class Sink(io.RawIOBase):
    """Counts bytes, and fails after `limit` of them."""

    def __init__(self, limit=10**9):
        self.limit, self.written = limit, 0

    def write(self, data):
        self.written += memoryview(data).nbytes
        if self.written > self.limit:
            raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("cut, limit, words, written", [
    (-1, 10**9, "stdin ended after 215 of the 216 bytes of frame 3 in rgb24", 2), (0, 10**9, "no frames on stdin", 0),
    (None, 1000, "frame 2 cannot be written to stdout (Broken pipe)", 2)])
def test_incomplete_frames_and_a_closed_pipe_get_one_line(flags, cut, limit, words, written):
    upscale_array, frames = frames_of(flags)
    data, sink = b"".join(map(np.ndarray.tobytes, frames)), Sink(limit)
    with pytest.raises(UserError) as error:
        upscaler.upscale_frames(io.BytesIO(data[:cut]), sink, OutputSize(9, 8), "rgb24",
                                upscale_array)
    assert words in str(error.value) and sink.written == written * 864


def test_memory_does_not_grow_with_the_number_of_frames(flags):
    peaks = []
    for count in (2, 12):
        upscale_array, frames = frames_of(flags, count=count)
        with LiveMemory() as memory:
            upscaler.upscale_frames(io.BytesIO(b"".join(map(np.ndarray.tobytes, frames))), Sink(), OutputSize(9, 8), "rgb24",
                                    upscale_array)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1] > 0


def test_a_pipe_carries_nothing_but_frames(flags):
    _, frames = frames_of(flags)
    data = b"".join(map(np.ndarray.tobytes, frames))
    ran = subprocess.run([sys.executable, "upscale.py", "--pipe", "9x8", *flags.split()], cwd=ROOT / "code",
                         input=data + b"half", capture_output=True, check=False)
    lines = ran.stderr.decode().replace("\r", "\n").splitlines()
    assert ran.returncode == 2 and len(ran.stdout) == 4 * len(data)
    assert any("9x8 become 18x16" in line for line in lines) and sum(line.startswith("error: ") for line in lines) == 1
