"""PSNR and SSIM against golden values and direct implementations of their formulas."""
import json

import numpy as np
import pytest

from conftest import GOLDEN
from metric import psnr, ssim

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
