"""Datasets, image files, bicubic resizing, crops."""
import errno
import gc
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluation
import option
from data import dataset, degrade
from data.image import list_images, read_image, read_photo
from data.source import find
from system import files
from system.errors import UserError

CODE = os.path.dirname(option.__file__)


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def save_png16(path, image):
    """A PNG of 16 bits per channel, which Pillow does not write: uint16 H x W x 1 to 4."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))
    return path


@pytest.fixture
def args(tmp_path):
    """args(flag...): what option.parse makes of them, with data, images and cache under tmp_path."""
    def parse(*flags):
        return option.parse(["--dir_data", str(tmp_path), "--dir_demo", str(tmp_path / "demo"), "--n_threads", "0",
                             "--dir_cache", str(tmp_path / "cache"), "--scale", "2", "--patch_size", "16", *flags])
    return parse


def make_dataset(folder, number=3, size=(24, 30), lr=False):
    for n in range(number):
        image = noise(*size, 3, seed=n)
        save(folder / "HR" / f"{n}.png", image)
        if lr:
            save(folder / "LR_bicubic" / "X2" / f"{n}x2.png", degrade.downscale(image, 2))


def message(call, *arguments):
    """The one line of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- bicubic resizing

@pytest.mark.parametrize("name, number", [("Set5", 5), ("Set14", 14)])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_downscale_is_bit_identical_to_the_official_images(shared, name, number, scale):
    folder = shared / "data" / "benchmark" / name
    files = list_images(folder / "HR")
    assert len(files) == number
    for file in files:
        official = next(lr for lr in list_images(folder / "LR_bicubic" / f"X{scale}") if lr.stem == f"{file.stem}x{scale}")
        assert np.array_equal(degrade.downscale(read_photo(file), scale), read_photo(official)), file


def imresize(image, ratio):
    """MATLAB's imresize of uint8 H x W x C by sums over the kernel."""
    for axis in (0, 1):
        size = image.shape[axis]
        stretch = min(ratio, 1)
        lines = []
        for k in range(round(size * ratio)):
            centre = (k + 0.5) / ratio - 0.5
            places = np.arange(np.floor(centre - 2 / stretch), np.ceil(centre + 2 / stretch) + 1).astype(int)
            x = np.abs(stretch * (centre - places))
            weights = np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x <= 2)
            mirrored = np.concatenate([np.arange(size), np.arange(size)[::-1]])[places % (2 * size)]
            lines.append(np.tensordot(weights / weights.sum(), image.take(mirrored, axis).astype(float), (0, axis)))
        image = np.clip(np.floor(np.stack(lines, axis) + 0.5), 0, 255).astype(np.uint8)
    return image


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (11, 7)])
def test_resizing_equals_sums_over_the_kernel(size, scale):
    large, small = noise(size[0] * scale, size[1] * scale, 3), noise(*size, 3)
    assert np.array_equal(degrade.downscale(large, scale), imresize(large, 1 / scale))
    assert np.array_equal(degrade.upscale(small, scale), imresize(small, scale))


def test_downscale_crops_odd_sizes_at_the_bottom_and_right():
    image = noise(23, 31, 3)
    assert np.array_equal(degrade.downscale(image, 4), degrade.downscale(image[:20, :28], 4))


def test_downscale_refuses_an_image_smaller_than_the_scale():
    with pytest.raises(ValueError, match="smaller than the scale 4"):
        degrade.downscale(noise(3, 9, 3), 4)


# ---- image files

def test_grey_becomes_three_channels(tmp_path):
    image = noise(8, 9)
    colour, alpha = read_image(save(tmp_path / "grey.png", image))
    assert alpha is None
    assert np.array_equal(colour, np.stack(3 * [image], 2))


def test_alpha_is_kept_apart_and_only_where_something_is_transparent(tmp_path):
    image = noise(8, 9, 4)
    colour, alpha = read_image(save(tmp_path / "some.png", image))
    assert np.array_equal(colour, image[..., :3])
    assert np.array_equal(alpha, image[..., 3])
    image[..., 3] = 255
    assert read_image(save(tmp_path / "none.png", image))[1] is None


def test_photo_with_transparent_parts_is_refused(tmp_path):
    assert "transparent" in message(read_photo, save(tmp_path / "photo.png", noise(8, 9, 4)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_become_8(tmp_path, channels):
    image = np.random.RandomState(0).randint(0, 65536, (8, 9, channels)).astype(np.uint16)
    colour, alpha = read_image(save_png16(tmp_path / "deep.png", image))
    colours = channels - (channels in (2, 4))
    assert np.abs(colour - np.broadcast_to(image[..., :colours] / 257, colour.shape)).max() <= 1
    assert alpha is None or np.abs(alpha - image[..., -1] / 257).max() <= 1
    assert (alpha is None) == (colours == channels)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_becomes_its_colours(tmp_path, transparent):
    image = Image.fromarray(noise(8, 9, 3)).quantize(4)
    path = tmp_path / "palette.png"
    image.save(path, **(dict(transparency=2) if transparent else {}))
    colour, alpha = read_image(path)
    assert np.array_equal(colour, np.array(image.convert("RGB")))
    assert (alpha is None) if not transparent else np.array_equal(alpha == 0, np.array(image) == 2)


def test_transparent_colour_becomes_alpha(tmp_path):
    image = noise(8, 9, 3)
    image[2, 3] = 1, 2, 3
    alpha = read_image(save(tmp_path / "key.png", image, transparency=(1, 2, 3)))[1]
    assert np.argwhere(alpha == 0).tolist() == [[2, 3]]


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_becomes_rgb(tmp_path, suffix):
    image = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    path = tmp_path / f"print.{suffix}"
    Image.fromarray(image).convert("CMYK").save(path)
    assert np.abs(read_photo(path).astype(int) - image).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_turned_as_its_camera_says(tmp_path, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[16:, 24:] = 255, 128
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
              6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path / "photo.jpg", np.ascontiguousarray(stored), exif=exif, quality=95)
    assert np.abs(read_photo(path).astype(int) - upright).max() <= 8


def test_float_tiff_is_refused(tmp_path):
    path = save(tmp_path / "float.tif", np.zeros((8, 9), np.float32))
    assert str(path) in message(read_image, path)


@pytest.mark.parametrize("name, shape", [("pages.tif", (8, 9, 3)), ("grey.tif", (8, 3)), ("film.png", (8, 9, 3)),
                                         ("film.webp", (8, 9, 3))])
def test_several_images_in_a_file_are_refused(tmp_path, name, shape):
    path = save(tmp_path / name, noise(*shape), save_all=True, append_images=[Image.fromarray(noise(*shape, seed=1))])
    assert "several images" in message(read_image, path)


def test_preview_in_a_photo_is_no_second_image(tmp_path):
    photo, preview = (np.full((16, 16, 3), value, np.uint8) for value in (90, 160))
    path = save(tmp_path / "photo.jpg", photo, format="MPO", save_all=True, append_images=[Image.fromarray(preview)])
    assert np.array_equal(read_photo(path), photo)


def damaged(path, how):
    """Replace the PNG file by one that cannot be read."""
    content = path.read_bytes()
    header = content[12:16] + struct.pack(">II", 50_000, 50_000) + content[24:29]
    bomb = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    path.write_bytes({"half": content[:2000], "start": content[:20], "header": content[:8] + bytes(40), "empty": b"",
                      "text": b"hello", "bomb": bomb}[how])
    return path


@pytest.mark.parametrize("how, reason", [
    ("half", "truncated"), ("start", "Truncated"), ("header", "its PNG header is damaged or cut off"), ("empty", "empty"),
    ("text", "none of PNG, JPEG"), ("bomb", "more than 178,956,970 pixels"),
])
def test_unreadable_image_is_named_with_the_reason_and_nothing_else_is_printed(tmp_path, how, reason, monkeypatch):
    path = damaged(save(tmp_path / "broken.png", noise(40, 40, 3)), how)
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)  # "Exception ignored in ..."
    text = message(read_image, path)
    gc.collect()
    assert text.startswith(f"{path}: unreadable image (") and reason in text and not ignored


@pytest.mark.parametrize("problem", [PermissionError(errno.EACCES, "Permission denied"),
                                     OSError(errno.EIO, "Input/output error")])
def test_an_image_that_may_not_be_read_is_named_with_the_reason(tmp_path, problem, monkeypatch):
    path = save(tmp_path / "secret.png", noise(8, 8, 3))
    monkeypatch.setattr("builtins.open", raising(problem))
    assert message(read_image, path) == f"{path}: unreadable image ({problem.strerror}); repair or remove it"


def raising(problem):
    def call(*_, **__):
        raise problem
    return call


@pytest.mark.parametrize("kind", ["GIF", "ICO", "PCX", "EPS", "TGA", "SGI", "ICNS"])
def test_formats_that_no_suffix_names_are_not_decoded(tmp_path, kind, monkeypatch):
    run = []
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: run.append(command))  # Ghostscript reads EPS
    path = save(tmp_path / "image.png", noise(32, 32, 3), format=kind)
    assert "none of PNG, JPEG" in message(read_image, path) and not run


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_named_format_is_read_under_any_suffix(tmp_path, kind):
    image = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(read_photo(save(tmp_path / "image.png", image, format=kind)).astype(int) - image).max() <= 4


def test_palette_image_is_turned_like_a_photo(tmp_path):
    exif = Image.Exif()
    exif[274] = 2
    image = Image.fromarray(noise(8, 9, 3)).quantize(4)
    image.save(tmp_path / "palette.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "palette.png"), np.array(image.convert("RGB"))[:, ::-1])


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_tiff_image_with_an_orientation_is_upright(tmp_path, mode):
    exif = Image.Exif()
    exif[274] = 6
    image = Image.fromarray(noise(8, 9, 3)).convert(mode)
    image.save(tmp_path / "turned.tif", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "turned.tif"), np.rot90(np.array(image.convert("RGB")), -1))


# ---- datasets

def test_sample_scores_on_no_scene_that_it_trains_on(args):
    train, test = ({pair.name for pair in find("Sample", args(), train=of_train).pairs} for of_train in (True, False))
    assert len(train) == 8
    assert len(test) == 4
    assert not train & test
    assert {"motorcycle_left", "motorcycle_right"} <= train  # two views of one scene
    assert "cat" not in train | test  # chelsea under another name


def test_sample_images_are_photos_larger_than_a_patch(args):
    for train in (True, False):
        for pair in find("Sample", args(), train).pairs:
            image = read_photo(pair.hr)
            assert image.shape[2] == 3
            assert min(image.shape[:2]) >= 192


@pytest.mark.parametrize("where", ["A", "benchmark/A"])
def test_folder_with_lr_images_gives_those(tmp_path, args, where):
    make_dataset(tmp_path / where)
    for n in range(3):
        save(tmp_path / where / "LR_bicubic" / "X2" / f"{n}x2.png", noise(12, 15, 3, seed=10 + n))
    images = dataset.Images("A", args(), train=False)
    assert images.prepare() == 3 * [(24, 30)]
    assert [pair.name for pair in images.pairs] == ["0", "1", "2"]
    assert np.array_equal(images.lr(2), noise(12, 15, 3, seed=12))


def test_folder_without_lr_images_has_them_made(tmp_path, args):
    make_dataset(tmp_path / "A", size=(25, 31))
    images = dataset.Images("A", args(), train=True)
    assert images.hr(0).shape == (24, 30, 3)
    assert np.array_equal(images.lr(0), degrade.downscale(noise(25, 31, 3), 2))


def test_div2k_is_split_by_data_range(tmp_path, args):
    for n in range(1, 7):
        save(tmp_path / "DIV2K" / "DIV2K_train_HR" / f"{n:04}.png", noise(16, 16, 3))
        save(tmp_path / "DIV2K" / "DIV2K_train_LR_bicubic" / "X2" / f"{n:04}x2.png", noise(8, 8, 3))
    split = args("--data_range", "1-3/5-6")
    names = [[pair.name for pair in find("DIV2K", split, train).pairs] for train in (True, False)]
    assert names == [["0001", "0002", "0003"], ["0005", "0006"]]
    assert find("DIV2K", args(), train=True).pairs[3].lr.name == "0004x2.png"


@pytest.mark.parametrize("data_range", ["7-9/7-9", "some", "1-2-3", "1-1/1-1/junk", "1-1/junk"])
def test_data_range_without_images_is_an_error(tmp_path, args, data_range):
    save(tmp_path / "DIV2K" / "DIV2K_train_HR" / "0001.png", noise(16, 16, 3))
    assert "--data_range" in message(find, "DIV2K", args("--data_range", data_range), True)


def test_demo_upscales_grey_and_keeps_transparency(tmp_path, args):
    grey, glass = noise(12, 13), noise(12, 13, 4)
    save(tmp_path / "demo" / "grey.png", grey)
    save(tmp_path / "demo" / "glass.png", glass)
    images = dataset.Images("Demo", args(), train=False)
    with evaluation.Writer(tmp_path / "out", save_gt=True) as writer:
        score = evaluation.score(evaluation.by_bicubic(2), images, writer)
    assert score.psnr is None
    assert score.images == 2
    written = {file.name: np.array(Image.open(file)) for file in (tmp_path / "out" / "results-Demo").iterdir()}
    assert sorted(written) == ["glass_x2_SR.png", "grey_x2_SR.png"]
    assert np.array_equal(written["grey_x2_SR.png"], degrade.upscale(np.stack(3 * [grey], 2), 2))
    assert np.array_equal(written["glass_x2_SR.png"], degrade.upscale(glass, 2))


@pytest.mark.parametrize("name", ["A", "DIV2K"])
def test_missing_dataset_says_both_ways_to_get_one(tmp_path, args, name):
    text = message(find, name, args(), True)
    assert "scripts/download_data.sh" in text
    assert "Sample" in text
    assert str(tmp_path / ("A/HR" if name == "A" else "DIV2K/DIV2K_train_HR")) + ";" in text


@pytest.mark.parametrize("name", ["A", "Demo"])
def test_empty_folder_is_an_error(tmp_path, args, name):
    (tmp_path / "A" / "HR").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    assert "no images" in message(find, name, args(), False)


@pytest.mark.parametrize("name", ["A", "Demo"])
def test_images_of_one_name_do_not_become_one_file(tmp_path, args, name):
    for suffix in ("png", "jpg"):
        save(tmp_path / ("demo" if name == "Demo" else "A/HR") / f"same.{suffix}", noise(24, 24, 3))
    if name == "Demo":
        assert [pair.name for pair in find("Demo", args(), False).pairs] == ["same_jpg", "same_png"]
    else:
        text = message(find, "A", args(), False)
        assert "same.jpg" in text and "same.png" in text


def test_a_folder_is_no_image_and_a_link_to_nothing_is_named(tmp_path, args):
    make_dataset(tmp_path / "A")
    (tmp_path / "A" / "HR" / "z.png").mkdir()
    assert len(find("A", args(), True).pairs) == 3
    (tmp_path / "A" / "HR" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "gone.png: cannot be read (No such file or directory)" in message(find, "A", args(), True)


@pytest.mark.parametrize("name", ["A", "Demo"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, args, name):
    folder = tmp_path / ("demo" if name == "Demo" else "A/HR")
    save(folder / "0.png", noise(24, 24, 3))
    os.mkfifo(folder / "x.png")
    assert "x.png: no regular file" in message(find, name, args(), False)


@pytest.mark.parametrize("name", ["A", "Demo", "DIV2K"])
def test_images_in_sub_folders_only_are_refused(tmp_path, args, name):
    folder = tmp_path / {"A": "A/HR", "Demo": "demo", "DIV2K": "DIV2K/DIV2K_train_HR"}[name]
    save(folder / "part1" / "0001.png", noise(24, 24, 3))
    (folder / "0").mkdir()
    text = message(find, name, args(), name != "Demo")
    assert text.startswith(f"{folder}: ") and "sub-folder part1" in text


def test_images_in_sub_folders_beside_others_are_not_read_and_that_is_logged(tmp_path, args, monkeypatch):
    make_dataset(tmp_path / "A")
    save(tmp_path / "A" / "HR" / "more" / "9.png", noise(24, 24, 3))
    lines = []
    monkeypatch.setattr(data.image.log, "info", lambda text, *values: lines.append(text % values))
    assert [pair.name for pair in find("A", args(), True).pairs] == ["0", "1", "2"]
    assert len(lines) == 1 and "sub-folders are not read" in lines[0] and "more" in lines[0]


@pytest.mark.parametrize("where, method", [("HR", "stat"), ("HR", "iterdir"), ("LR_bicubic", "stat"),
                                           ("LR_bicubic/X2", "stat"), ("LR_bicubic/X2", "iterdir")])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, args, where, method, monkeypatch):
    make_dataset(tmp_path / "A", lr=True)
    denied, real = tmp_path / "A" / where, getattr(type(tmp_path), method)

    def call(self, **options):  # not chmod, which root ignores
        if self == denied or (method == "stat" and denied in self.parents):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, **options)
    monkeypatch.setattr(type(tmp_path), method, call)
    text = message(find, "A", args(), True)
    assert text.startswith(str(denied)) and text.endswith(": cannot be read (Permission denied)")


def test_names_that_are_not_utf8(tmp_path, args):
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / "A" / "HR" / "0.png", noise(24, 30, 3)).rename(tmp_path / "A" / "HR" / name)
    for _ in range(2):  # made, and read from the cache
        images = dataset.Images("A", args(), train=False)
        images.prepare()
        assert np.array_equal(images.hr(0), noise(24, 30, 3))
    with evaluation.Writer(tmp_path / "out", save_gt=False) as writer:
        evaluation.score(evaluation.by_bicubic(2), images, writer)
    assert len(list((tmp_path / "out" / "results-A").iterdir())) == 1


@pytest.mark.parametrize("lr", [False, True])
@pytest.mark.parametrize("ext", ["sep", "img"])
def test_an_image_replaced_during_the_run(tmp_path, args, ext, lr):
    make_dataset(tmp_path / "A", number=1, lr=lr)
    crops = dataset.Crops(args("--data_train", "A", "--ext", ext))
    first = crops[0]
    save(tmp_path / "A" / "HR" / "0.png", noise(20, 22, 3))
    if ext == "sep":  # the run goes on with the data that it started with
        assert same(crops[0], first)
    else:
        text = message(crops.__getitem__, 0)
        assert "0.png: replaced during the run" in text and "\n" not in text
    if lr:
        save(tmp_path / "A" / "LR_bicubic" / "X2" / "0x2.png", noise(10, 11, 3))
        assert same(crops[0], first) if ext == "sep" else "0x2.png: replaced during" in message(crops.__getitem__, 0)


@pytest.mark.parametrize("terminal, seconds", [(True, 1), (False, 10)])
def test_bars_are_rarely_redrawn_where_stderr_is_no_terminal(terminal, seconds, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    interval = dataset.progress([], "reading").mininterval
    assert interval < seconds if terminal else interval > seconds


def test_an_image_too_small_to_score_is_found_at_the_start(tmp_path, args):
    make_dataset(tmp_path / "A", number=1, size=(14, 40))
    assert "SSIM needs 15" in message(data.make_benchmarks, args("--data_test", "A"))


def test_the_smallest_crop_can_be_turned():
    assert [tuple(dataset.to_tensor(image[::-1, ::-1]).shape) for image in (noise(1, 1, 3), noise(1, 2, 3))] == [
        (3, 1, 1), (3, 1, 2)]


@pytest.mark.parametrize("ext, opened", [("sep", 3), ("img", 0)])
def test_arrays_of_the_cache_stay_open_and_decoded_images_do_not_stay(tmp_path, args, ext, opened):
    make_dataset(tmp_path / "A", number=3)
    crops = dataset.Crops(args("--data_train", "A", "--ext", ext))
    first = [crops[number] for number in range(9)]
    assert len(crops.opened) == opened
    copy = pickle.loads(pickle.dumps(crops))  # what a worker gets that is spawned
    assert all(same(pair, copy[number]) for number, pair in enumerate(first))
    assert len(pickle.dumps(crops)) < 10_000 and all(same(pair, crops[number]) for number, pair in enumerate(first))


def test_an_error_in_a_worker_is_one_line(tmp_path, args):
    make_dataset(tmp_path / "A", number=1)
    flags = args("--data_train", "A", "--ext", "img", "--n_threads", "1")
    crops = dataset.Crops(flags)
    (tmp_path / "A" / "HR" / "0.png").write_bytes(b"nothing")
    assert message(list, data.make_batches(flags, crops, 0, 1)).startswith(str(tmp_path / "A" / "HR" / "0.png"))


def test_a_process_that_ends_without_closing_its_loader_does_not_wait_for_the_workers(tmp_path):
    make_dataset(tmp_path / "A", number=1)
    script = f"""
import sys
sys.path.insert(0, {str(CODE)!r})
import data, option
args = option.parse("--dir_data {tmp_path} --dir_cache {tmp_path} --data_train A --scale 2 --patch_size 16".split())
args.n_threads = 1
data.GRACE = 1
held = [iter(data.make_batches(args, data.Crops(args), 0, 9))]
held.append(held)  # a cycle, as a traceback makes them: nothing closes the loader before the process ends
next(held[0])
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_results_that_cannot_be_written_are_explained_before_the_upscaling(tmp_path, args):
    make_dataset(tmp_path / "A", number=1)
    images = dataset.Images("A", args(), train=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results-A").write_text("a file in its place")

    def score():
        with evaluation.Writer(tmp_path / "out", save_gt=False) as writer:
            evaluation.score(pytest.fail, images, writer)
    assert "results-A: cannot write" in message(score)


def test_what_a_killed_test_left_is_removed_by_the_next(tmp_path, args):
    make_dataset(tmp_path / "A", number=1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / "out" / "results-A" / f".0_x2_SR.png.{files.HOST}.{ended.pid}.part"
    left.parent.mkdir(parents=True)
    left.touch()
    with evaluation.Writer(tmp_path / "out", save_gt=False) as writer:
        evaluation.score(evaluation.by_bicubic(2), dataset.Images("A", args(), train=False), writer)
    assert [file.name for file in left.parent.iterdir()] == ["0_x2_SR.png"]


def test_demo_is_not_for_training(args):
    assert "--data_train NAME" in message(find, "Demo", args(), True)


@pytest.mark.parametrize("extra", ["HR", "LR_bicubic/X2"])
def test_unequal_numbers_of_images_are_an_error(tmp_path, args, extra):
    make_dataset(tmp_path / "A", lr=True)
    save(tmp_path / "A" / extra / "more.png", noise(24, 30, 3))
    assert str(tmp_path / "A" / "LR_bicubic" / "X2") in message(find, "A", args(), True)


def test_unequal_sizes_are_an_error(tmp_path, args):
    make_dataset(tmp_path / "A", lr=True)
    path = save(tmp_path / "A" / "LR_bicubic" / "X2" / "1x2.png", noise(12, 14, 3))
    text = message(dataset.Images("A", args(), train=True).prepare)
    assert str(path) in text
    assert "14 x 12" in text


def test_image_smaller_than_the_scale_is_an_error(tmp_path, args):
    path = save(tmp_path / "A" / "HR" / "dot.png", noise(3, 9, 3))
    assert str(path) in message(dataset.Images("A", args("--scale", "4"), train=False).prepare)


def test_image_too_small_to_be_scored_is_named(tmp_path, args):
    path = save(tmp_path / "A" / "HR" / "stamp.png", noise(12, 40, 3))
    assert str(path) in message(evaluation.score, evaluation.by_bicubic(2), dataset.Images("A", args(), train=False))


def test_patch_larger_than_an_image_is_an_error(tmp_path, args):
    make_dataset(tmp_path / "A")
    text = message(dataset.Crops, args("--data_train", "A", "--patch_size", "26"))
    assert "--patch_size 26" in text
    assert "30 x 24" in text


def test_broken_training_image_is_named(tmp_path, args):
    make_dataset(tmp_path / "A")
    (tmp_path / "A" / "HR" / "1.png").write_bytes(b"nothing")
    assert str(tmp_path / "A" / "HR" / "1.png") in message(dataset.Crops, args("--data_train", "A"))


# ---- crops

@pytest.fixture
def crops(tmp_path, args):
    """crops(flag...): of 5 images in two sets; HR and LR pixels hold the number of the image and their LR place."""
    def make(*flags):
        for n in range(5):
            y, x = np.mgrid[:20 + n, :30 - n]
            lr = np.stack([np.full_like(y, n), y, x], 2).astype(np.uint8)
            folder = tmp_path / ("A" if n < 3 else "B")
            save(folder / "LR_bicubic" / "X2" / f"{n}x2.png", lr)
            save(folder / "HR" / f"{n}.png", lr.repeat(2, 0).repeat(2, 1))
        return dataset.Crops(args("--data_train", "A+B", *flags))
    return make


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second))


def test_lr_and_hr_crop_show_the_same_place_in_the_same_orientation(crops):
    crops = crops()
    for number in range(60):
        lr, hr = crops[number]
        assert lr.shape == (3, 8, 8)
        assert hr.dtype == lr.dtype == torch.uint8
        assert torch.equal(lr.repeat_interleave(2, 1).repeat_interleave(2, 2), hr)


def orientation_of(lr):
    """Signs of the changes of the original's row and column, from right to left and from bottom to top of a crop."""
    return tuple((lr[1:, :, 0].int() - lr[1:, :, -1].int())[:, 0].sign().tolist()
                 + (lr[1:, 0].int() - lr[1:, -1].int())[:, 0].sign().tolist())


def test_augmented_crops_come_in_8_orientations(crops):
    crops = crops()
    assert len({orientation_of(crops[n][0]) for n in range(100)}) == 8


def test_crops_not_augmented_stay_upright(crops):
    crops = crops("--no_augment")
    assert {orientation_of(crops[n][0]) for n in range(50)} == {(0, -1, -1, 0)}


def test_orient_gives_8_distinct_arrays():
    image = np.arange(18).reshape(2, 3, 3)
    seen = {(orient.shape, orient.tobytes()) for orient in (np.ascontiguousarray(dataset.orient(image, *bits))
                                                            for bits in np.ndindex(2, 2, 2))}
    assert len(seen) == 8


def test_crops_lie_anywhere_in_an_image(crops):
    crops = crops("--no_augment")
    places = {tuple(lr[:, 0, 0].tolist()) for lr, _ in (crops[n] for n in range(1000))}
    rows, columns = ({place[axis] for place in places if place[0] == 0} for axis in (1, 2))
    assert rows == set(range(20 - 8 + 1))
    assert columns == set(range(30 - 8 + 1))


def test_every_pass_sees_every_image_once_in_another_order(crops):
    crops = crops()
    passes = [[int(crops[5 * turn + n][0][0, 0, 0]) for n in range(5)] for turn in range(6)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len(set(map(tuple, passes))) > 1


def test_crop_does_not_depend_on_what_was_read_before(crops):
    forwards, backwards = crops(), crops()
    expected = [forwards[n] for n in range(12)]
    assert all(same(backwards[n], expected[n]) for n in reversed(range(12)))


def test_seed_decides_the_crops(crops):
    first, again, other = crops(), crops(), crops("--seed", "2")
    assert all(same(first[n], again[n]) for n in range(10))
    assert not all(same(first[n], other[n]) for n in range(10))


def test_workers_and_the_start_of_the_run_change_no_batch(crops, args):
    crops = crops()
    alone = list(data.make_batches(args("--batch_size", "3"), crops, 0, 6))
    beside = list(data.make_batches(args("--batch_size", "3", "--n_threads", "2"), crops, 2, 6))
    assert alone[0][0].shape == (3, 3, 8, 8)
    assert len(beside) == 4
    assert all(same(a, b) for a, b in zip(alone[2:], beside))


def test_benchmarks_are_read_and_checked_at_the_start(tmp_path, args):
    make_dataset(tmp_path / "benchmark" / "A")
    make_dataset(tmp_path / "B", number=2)
    assert [len(images) for images in data.make_benchmarks(args("--data_test", "A+B"))] == [3, 2]
    (tmp_path / "B" / "HR" / "1.png").write_bytes(b"nothing")
    assert "1.png" in message(data.make_benchmarks, args("--data_test", "A+B"))
