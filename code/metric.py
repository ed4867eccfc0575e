"""PSNR and SSIM as the field publishes them: on the Y channel of the 8-bit image, borders shaved."""
import numpy as np
from skimage.metrics import structural_similarity

Y_WEIGHTS = np.array([65.481, 128.553, 24.966]) / 255  # ITU-R BT.601, as MATLAB's rgb2ycbcr


def luma(image):
    """uint8 H x W x 3 RGB -> float64 H x W in [16, 235], not rounded."""
    return image @ Y_WEIGHTS + 16


def psnr(sr, hr, shave):
    """dB between two uint8 H x W x 3 images on Y, `shave` pixels off each border; inf for equal ones."""
    sr, hr = _prepare(sr, hr, shave)
    error = np.mean((sr - hr) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(sr, hr, shave):
    """0..1 between two uint8 H x W x 3 images on Y (Wang et al., TIP 2004: 11 x 11 Gaussian, sigma 1.5, valid region)."""
    sr, hr = _prepare(sr, hr, shave)
    if min(sr.shape) < 11:
        raise ValueError(f"SSIM needs 11 pixels a side, there are {sr.shape} after shaving {shave}")
    return float(structural_similarity(sr, hr, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                       data_range=255))


def _prepare(sr, hr, shave):
    if sr.shape != hr.shape or sr.ndim != 3 or sr.shape[2] != 3 or sr.dtype != np.uint8 or hr.dtype != np.uint8:
        raise ValueError(f"needs two uint8 H x W x 3 images of one size, not {sr.dtype} {sr.shape} and "
                         f"{hr.dtype} {hr.shape}")
    if min(sr.shape[:2]) <= 2 * shave:
        raise ValueError(f"nothing is left of {sr.shape[:2]} pixels after shaving {shave} off each border")
    inner = slice(shave, -shave or None)
    return luma(sr[inner, inner]), luma(hr[inner, inner])
