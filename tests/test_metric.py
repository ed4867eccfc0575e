"""PSNR and SSIM against golden values and plain formulas."""
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
def test_scores_agree_with_published_code(images, scale):
    assert psnr(*images, scale) == pytest.approx(EXPECTED[f"x{scale}"]["psnr_y"], abs=1e-3)
    assert ssim(*images, scale) == pytest.approx(EXPECTED[f"x{scale}"]["ssim_y"], abs=1e-5)


def luma(image):
    return 16 + (65.481 * image[..., 0] + 128.553 * image[..., 1] + 24.966 * image[..., 2]) / 255


def test_psnr_is_that_of_luma_within_the_borders(images):
    a, b = (luma(image)[3:-3, 3:-3] for image in images)
    assert psnr(*images, 3) == pytest.approx(20 * np.log10(255 / np.sqrt(((a - b) ** 2).mean())), abs=1e-9)


@pytest.mark.parametrize("shave", [0, 2])
def test_ssim_is_the_mean_over_gaussian_windows(images, shave):
    a, b = (luma(image[:17 + 2 * shave, :15 + 2 * shave]) for image in images)
    a, b = (image[shave:shave + 17, shave:shave + 15] for image in (a, b))
    bell = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
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


def test_equal_images_score_best(images):
    assert psnr(images[0], images[0], 2) == float("inf")
    assert ssim(images[0], images[0], 2) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("score", [psnr, ssim])
def test_what_is_shaved_does_not_count(images, score):
    a, b = images
    spoilt = b.copy()
    spoilt[:4], spoilt[-4:], spoilt[:, :4], spoilt[:, -4:] = 0, 0, 255, 255
    assert score(a, spoilt, 4) == score(a, b, 4)
    assert score(a, spoilt, 3) < score(a, b, 3)


@pytest.mark.parametrize("score", [psnr, ssim])
@pytest.mark.parametrize("change", [lambda x: x[1:], lambda x: x.astype(float), lambda x: x[..., 0], lambda x: x[..., :2]],
                         ids=["shape", "type", "grey", "channels"])
def test_images_that_cannot_be_compared_are_refused(images, score, change):
    a, b = images
    with pytest.raises(ValueError, match="needs two uint8"):
        score(a, change(b), 2)


def test_images_too_small_for_their_borders_are_refused(images):
    a, b = (image[:8] for image in images)
    with pytest.raises(ValueError, match="nothing is left"):
        psnr(a, b, 4)
    with pytest.raises(ValueError, match="11 pixels a side"):
        ssim(a, b, 2)
