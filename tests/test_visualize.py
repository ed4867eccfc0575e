"""The picture of visualize.py: its crop, affinities and errors, and mistakes on its command line."""
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import visualize
from checkpoint import save_model
from loss.affinity import affinity_l1
from model.edsr import EDSR
from model.rcan import RCAN


@pytest.fixture
def files(tmp_path):
    """Checkpoints of networks of different widths."""
    torch.manual_seed(0)
    save_model(EDSR(2, n_resblocks=3, n_feats=8), tmp_path / "S.pt")
    save_model(EDSR(3, n_resblocks=3, n_feats=8), tmp_path / "x3.pt")
    save_model(RCAN(2, n_resgroups=3, n_resblocks=1, n_feats=12, reduction=4), tmp_path / "T.pt")
    return tmp_path


@pytest.fixture
def flags(files, tiny_data):
    return f"--cpu --dir_data {tiny_data} --data_test tiny --teacher {files / 'T.pt'} --ckp_dir {files / 'out'} --crop 24 "


def args(**given):
    defaults = dict(scale=2, crop=16, point=None, chop=False, features=[1, 3], precision="single")
    return SimpleNamespace(**{**defaults, **given})


@pytest.mark.parametrize("extra, name", [
    ("--features [2]", "0"), ("--image 2 --point 63,0 --features [0,3] --precision bf16", "2"),
    ("--chop --crop 512 --features [1]", "0")])
def test_a_picture_of_two_students(run_main, files, flags, extra, name):
    pictures = []
    for _ in range(2 if extra == "--features [2]" else 1):
        students = f"$one$_{'x' * 40}={files / 'S.pt'}+two={files / 'T.pt'}"
        status, out, _ = run_main("visualize", f"{flags} --ckp_path {students} {extra}")
        assert status == 0 and f"visualize_{name}.png" in out[-1]
        pictures.append((files / "out" / f"visualize_{name}.png").read_bytes())
    assert pictures[0] == pictures[-1] and min(iio.imread(pictures[0]).shape[:2]) > 300
    assert len(list((files / "out").iterdir())) == 1


@pytest.mark.parametrize("extra, words", [
    ("", "--ckp_path LABEL=FILE"), ("--ckp_path teacher={S}", "label teacher is in use"),
    ("--ckp_path bicubic={S}", "another label"), ("--ckp_path a={S}+b={x3}", "different scales"),
    ("--ckp_path {x3}", "scale 2, not 3"), ("--ckp_path Nothing", "--ckp_path Nothing"),
    ("--ckp_path {S} --teacher [{S},{T}]", "give one teacher"), ("--ckp_path {S} --image 9", "contain 0, 1, 2, 3"),
    ("--ckp_path {S} --point 64,0", "64 x 56 pixels"), ("--ckp_path {S} --point 0,56", "64 x 56 pixels"),
    ("--ckp_path {S} --crop 15", "16 to 512 pixels"), ("--ckp_path {S} --crop 514", "16 to 512 pixels"),
    ("--ckp_path {S} --data_test Demo --dir_demo {demo}", "no HR images")])
def test_a_mistake_gets_one_line_and_no_picture(run_main, files, flags, tiny_data, extra, words):
    names = {name: files / f"{name}.pt" for name in ("S", "T", "x3")}
    status, _, err = run_main("visualize", flags + extra.format(**names, demo=tiny_data / "tiny" / "HR"))
    assert status == 2 and len(err) == 1 and words in err[0]
    assert not list(files.rglob("*.png")) and not list(files.rglob("*.part"))


@pytest.mark.parametrize("point", ["3", "1,2,3", "-1,2", "a,b", "1.5,2"])
def test_a_point_is_two_numbers(run_main, capsys, point):
    status, _, err = run_main("visualize", f"--point={point}")
    assert status == 2 and len(err) == 1 and "X,Y" in err[0]


def test_the_crop_lies_within_the_image():
    lr = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    hr = lr.repeat(2, 0).repeat(2, 1)
    for point, starts in (((0, 0), (0, 0)), ((59, 39), (12, 22)), ((20, 21), (6, 6)), (None, None)):
        crop = visualize.choose_crop(lr, hr, "image", args(point=point))
        assert [side.stop - side.start for side in crop.box] == [8, 8]
        assert starts is None or tuple(side.start for side in crop.box) == starts
        assert all(0 <= at < 8 for at in crop.corner_to_point())
        assert crop.cut(hr).shape == (16, 16, 3)
    assert visualize.choose_crop(lr, hr, "image", args(crop=200)).cut(hr).shape == hr.shape


def test_the_default_point_is_an_edge_where_the_error_is_large():
    hr = np.full((96, 96, 3), 90, np.uint8)
    hr[50:80, 61:] = 200
    hr[60:75:2, 50:61] = 200  # lines of one pixel, which LR does not contain
    lr = hr[::2, 1::2]
    y, x = visualize.choose_crop(lr, hr, "image", args(crop=32)).point
    assert 25 <= y < 40 and 24 <= x < 32


@pytest.mark.parametrize("kind", [EDSR, RCAN])
def test_a_crop_of_a_small_image_has_the_values_of_the_whole(kind):
    torch.manual_seed(0)
    net = kind(2, n_resblocks=1, n_feats=8, **(dict(n_resgroups=3, reduction=2) if kind is RCAN else {})).eval()
    lr = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    crop = visualize.choose_crop(lr, lr.repeat(2, 0).repeat(2, 1), "image", args(point=(60, 40)))
    sr, features = visualize.run(net, lr, crop, args(), "net")
    with torch.no_grad():
        whole, feature_maps = net(torch.from_numpy(lr).permute(2, 0, 1)[None].float(), features=True)
    expected = whole.clamp(0, 255).round()[0].permute(1, 2, 0).byte().numpy()
    assert np.abs(crop.cut(expected).astype(int) - sr).max() <= 1
    for index, feature_map in features.items():
        torch.testing.assert_close(feature_map, feature_maps[index][(..., *crop.box)], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("maps, value, words", [([], 0.0, "no feature map 1"), (4 * [(4, 4)], 0.0, "no feature map 1"),
                                                (4 * [(20, 30)], float("nan"), "NaN")])
def test_maps_that_cannot_be_compared_are_one_line(maps, value, words):
    class Other(torch.nn.Conv2d):
        scale, window, receptive_field, rgb_range = 2, 1, 1, 255

        def forward(self, x, features):
            return x.new_zeros(1, 3, 40, 60), [x.new_full((1, 5, *size), value) for size in maps]

    lr = np.zeros((20, 30, 3), np.uint8)
    crop = visualize.choose_crop(lr, lr.repeat(2, 0).repeat(2, 1), "image", args(point=(20, 20), crop=64))
    with pytest.raises(visualize.UserError, match=words):
        visualize.run(Other(3, 3, 1), lr, crop, args(), "net")


def drawn_images(figure):
    return [np.asarray(image.get_array()) for axis in figure.findobj(lambda artist: hasattr(artist, "get_images"))
            for image in axis.get_images() if len(axis.get_xticks()) == 0]


def test_the_drawn_affinities_are_cosine_similarities():
    torch.manual_seed(0)
    features = {"S": {2: torch.randn(1, 3, 8, 8)}, "teacher": {2: torch.randn(1, 5, 8, 8)}}
    crop = visualize.Crop((slice(4, 12), slice(0, 8)), (5, 3), 2)  # row 1 of the crop, column 3
    figure = Figure()
    visualize.draw_affinities(figure, crop, features)
    matrices = {}
    for label, feature_map in features.items():
        rows = feature_map[2][0].flatten(1).T.double().numpy()
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        matrices[label] = rows @ rows.T
    expected = [matrices["teacher"], matrices["S"], np.abs(matrices["S"] - matrices["teacher"])]
    images = drawn_images(figure)
    for k, matrix in enumerate(expected):
        np.testing.assert_allclose(images[k], matrix[8 * 1 + 3].reshape(8, 8), atol=1e-5)
        np.testing.assert_allclose(images[3 + k], matrix, atol=1e-5)
    labels = [axis.get_xlabel() for axis in figure.findobj(lambda artist: hasattr(artist, "get_xlabel"))]
    assert f"SA {affinity_l1(features['S'][2], features['teacher'][2]):.3f}" in labels
    assert f"SA {expected[2].mean():.3f}" in labels


@pytest.mark.parametrize("space, psnr", [("y", "29.45 dB"), ("rgb", "28.13 dB")])
def test_the_drawn_errors_are_those_on_y(space, psnr):
    hr = np.full((24, 24, 3), 100, np.uint8)
    sr = np.full((16, 16, 3), 110, np.uint8)
    crop = visualize.Crop((slice(0, 8), slice(2, 10)), (3, 3), 2)
    figure = Figure()
    visualize.draw_errors(figure, hr, crop, {"bicubic": sr, "teacher": hr[:16, :16]}, space)
    error, exact = drawn_images(figure)[-2:]
    np.testing.assert_allclose(error, 10 * 219 / 255, rtol=1e-3)
    assert not exact.any()
    labels = [axis.get_xlabel() for axis in figure.findobj(lambda artist: hasattr(artist, "get_xlabel"))]
    assert psnr in labels and "inf dB" in labels
