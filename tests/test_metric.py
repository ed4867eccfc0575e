"""PSNR and SSIM against golden values and direct implementations of their formulas."""
import argparse
import csv
import json
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import evaluation
import option
from checkpoint import save_model
from conftest import GOLDEN
from data import degrade
from metric import psnr, ssim
from model import load_model
from model.edsr import EDSR

EXPECTED = json.loads((GOLDEN / "losses_and_metrics.json").read_text())["metrics"]


@pytest.fixture
def images():
    a = np.random.RandomState(400).randint(0, 256, (40, 36, 3))
    b = np.clip(a + np.random.RandomState(401).randint(-20, 21, a.shape), 0, 255)
    return a.astype(np.uint8), b.astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_metrics_equal_those_of_published_code(images, scale):
    assert psnr(*images, scale) == pytest.approx(EXPECTED[f"x{scale}"]["psnr_y"], abs=1e-3)
    assert ssim(*images, scale) == pytest.approx(EXPECTED[f"x{scale}"]["ssim_y"], abs=1e-5)


def luma(image):
    return 16 + (65.481 * image[..., 0] + 128.553 * image[..., 1] + 24.966 * image[..., 2]) / 255


def test_psnr_is_computed_on_luma_within_the_borders(images):
    a, b = (luma(image)[3:-3, 3:-3] for image in images)
    assert psnr(*images, 3) == pytest.approx(20 * np.log10(255 / np.sqrt(((a - b) ** 2).mean())), abs=1e-9)


@pytest.mark.parametrize("shave", [0, 2])
def test_ssim_is_the_mean_over_gaussian_windows(images, shave):
    a, b = (luma(image[:17 + 2 * shave, :15 + 2 * shave]) for image in images)
    a, b = (image[shave:shave + 17, shave:shave + 15] for image in (a, b))
    gaussian = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    window = np.outer(gaussian, gaussian) / gaussian.sum() ** 2
    values = []
    for y in range(17 - 10):
        for x in range(15 - 10):
            p, q = a[y:y + 11, x:x + 11], b[y:y + 11, x:x + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            covariance = (window * (p - mean_p) * (q - mean_q)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mean_p * mean_q + c1) * (2 * covariance + c2)
                          / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    found = ssim(*(image[:17 + 2 * shave, :15 + 2 * shave] for image in images), shave)
    assert found == pytest.approx(np.mean(values), abs=1e-9)


def test_metrics_of_equal_images(images):
    assert psnr(images[0], images[0], 2) == float("inf")
    assert ssim(images[0], images[0], 2) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_shaved_borders_do_not_count(images, metric):
    a, b = images
    spoilt = b.copy()
    spoilt[:4], spoilt[-4:], spoilt[:, :4], spoilt[:, -4:] = 0, 0, 255, 255
    assert metric(a, spoilt, 4) == metric(a, b, 4)
    assert metric(a, spoilt, 3) < metric(a, b, 3)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("change", [lambda x: x[1:], lambda x: x.astype(float), lambda x: x[..., 0], lambda x: x[..., :2]],
                         ids=["shape", "type", "grey", "channels"])
def test_images_that_cannot_be_compared_are_refused(images, metric, change):
    a, b = images
    with pytest.raises(ValueError, match="two uint8 H x W x 3 images of equal size"):
        metric(a, change(b), 2)


def test_images_too_small_for_their_borders_are_refused(images):
    a, b = (image[:8] for image in images)
    with pytest.raises(ValueError, match="no pixels are left of 8 x 36"):
        psnr(a, b, 4)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, but 4 x 32 are left"):
        ssim(a, b, 2)


# ---- --metric_space and --shave

def test_the_psnr_on_rgb_averages_the_squared_errors_of_all_channels(images):
    a, b = (image[3:-3, 3:-3].astype(float) for image in images)
    assert psnr(*images, 3, "rgb") == pytest.approx(20 * np.log10(255 / np.sqrt(((a - b) ** 2).mean())), abs=1e-9)
    assert psnr(*images, 3, "rgb") < psnr(*images, 3, "y")  # the luma of noise is smaller than the noise
    assert psnr(images[0], images[0], 3, "rgb") == np.inf


def test_the_ssim_on_rgb_is_the_mean_over_the_channels(images):
    grey = [np.repeat(image[..., :1], 3, 2) for image in images]
    channels = [ssim(*(np.repeat(image[..., k:k + 1], 3, 2) for image in images), 2, "rgb") for k in range(3)]
    assert ssim(*images, 2, "rgb") == pytest.approx(np.mean(channels), abs=1e-12)
    assert ssim(*grey, 2, "rgb") != pytest.approx(ssim(*grey, 2, "y"), abs=1e-5)  # of which luma is 0.86 times as large
    with pytest.raises(ValueError, match="at least 11 x 11 pixels"):
        ssim(images[0][:14], images[1][:14], 2, "rgb")


@pytest.mark.parametrize("flags, shaved", [("--scale 3", 3), ("--scale 3 --shave 0", 0), ("--shave 7", 7)])
def test_the_scale_is_shaved_unless_the_flag_is_given(flags, shaved):
    assert option.shave_of(option.parse(flags.split())) == shaved


def test_nothing_is_shaved_at_scale_1():
    assert option.shave_of(argparse.Namespace(shave=None, scale=1)) == 0


@pytest.fixture
def scored(tiny_data, tmp_path, run_main):
    """scored(script, flags) -> rows of the CSV file with the scores of a small network on `tiny`."""
    torch.manual_seed(0)
    save_model(EDSR(2, n_resblocks=1, n_feats=4), tmp_path / "net.pt")

    def score(script, flags):
        folder = tmp_path / script
        shutil.rmtree(folder, ignore_errors=True)
        status, _, err = run_main(script, f"--cpu --n_threads 0 --dir_data {tiny_data} --data_train tiny --data_test tiny "
                                  f"--dir_cache {tmp_path / 'cache'} --ckp_dir {folder} {flags} " + {
            "test": f"--ckp_path {tmp_path / 'net.pt'}", "compare": f"--ckp_path net={tmp_path / 'net.pt'}",
            "train": f"--pre_train {tmp_path / 'net.pt'} --model EDSR --n_resblocks 1 --n_feats 4 --scale 2 --loss 1*DS "
                     "--epochs 1 --test_every 1 --batch_size 1 --patch_size 16 --lr 1e-9"}[script])
        assert status == 0, err
        table = folder / {"test": "results-tiny/images.csv", "compare": "compare.csv", "train": "images.csv"}[script]
        return list(csv.DictReader(table.open()))
    return score


@pytest.mark.parametrize("script", ["test", "compare", "train"])
def test_every_script_scores_on_the_space_and_within_the_borders_of_the_flags(scored, tiny_data, tmp_path, script):
    rows = scored(script, "--metric_space rgb --shave 9")
    net = load_model(tmp_path / "net.pt")
    upscale = evaluation.by_network(net, torch.device("cpu"), option.parse([]))
    hrs = [iio.imread(tiny_data / "tiny" / "HR" / f"{k}.png") for k in range(4)]
    expected = [psnr(upscale(degrade.downscale(hr, 2)), hr, 9, "rgb") for hr in hrs]
    if script == "compare":
        assert float(rows[1]["psnr"]) == pytest.approx(np.mean(expected), abs=6e-4)
    else:
        assert [float(row["psnr"]) for row in rows[:4]] == pytest.approx(expected, abs=0.02 if script == "train" else 1e-5)


def test_images_that_are_too_small_for_the_shaved_borders_are_named_before_scoring(run_main, tiny_data, tmp_path):
    save_model(EDSR(2, n_resblocks=1, n_feats=4), tmp_path / "net.pt")
    flags = f"--cpu --dir_data {tiny_data} --data_test tiny --ckp_path {tmp_path / 'net.pt'} --ckp_dir {tmp_path / 'out'} "
    assert run_main("test", flags + "--shave 22")[0] == 0  # 56 - 2 * 22 = 12
    status, _, err = run_main("test", flags + "--shave 23")
    assert status == 2 and len(err) == 1 and "0.png" in err[0] and "SSIM needs 57 a side" in err[0]


def test_a_run_is_not_resumed_with_another_metric(run_main, tiny_data, tmp_path):
    flags = (f"--cpu --n_threads 0 --dir_data {tiny_data} --data_train tiny --data_test tiny --model EDSR --n_resblocks 1 "
             "--n_feats 4 --scale 2 --loss 1*DS --test_every 1 --batch_size 1 --patch_size 16 "
             f"--ckp_dir {tmp_path / 'run'} ")
    assert run_main("train", flags + "--epochs 1")[0] == 0
    assert run_main("train", flags + "--epochs 2 --shave 2 --resume 1")[0] == 0  # as before
    status, _, err = run_main("train", flags + "--epochs 3 --metric_space rgb --resume 1")
    assert status == 2 and "metrics: on y, 2 pixels shaved, not on rgb, 2" in err[-1]
