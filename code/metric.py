"""PSNR and SSIM of 8-bit images with the borders shaved, on the Y channel as in papers on super-resolution, or on RGB."""
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

RGB_TO_Y = np.array([65.481, 128.553, 24.966]) / 255  # ITU-R BT.601, as in MATLAB's rgb2ycbcr


def rgb_to_y(image: np.ndarray) -> np.ndarray:
    """Convert uint8 H x W x 3 RGB to float64 H x W luma in [16, 235], without rounding."""
    return image @ RGB_TO_Y + 16


def psnr(sr: np.ndarray, hr: np.ndarray, shave: int, space: str = "y") -> float:
    """Compute the PSNR in dB; infinite for equal images.

    sr, hr: uint8 H x W x 3, RGB. shave: pixels left out at each border. space: y, or rgb, of whose three channels the
    squared errors are averaged. Raises ValueError for other types or unequal shapes, and where no pixels are left.
    """
    sr, hr = _prepare(sr, hr, shave, space)
    with np.errstate(divide="ignore"):  # of equal images
        return float(peak_signal_noise_ratio(hr, sr, data_range=255))


def ssim(sr: np.ndarray, hr: np.ndarray, shave: int, space: str = "y") -> float:
    """Compute the SSIM with an 11 x 11 Gaussian window of sigma 1.5 within the image (Wang et al., TIP 2004).

    Arguments and errors are those of `psnr`; ValueError also where fewer than 11 x 11 pixels are left. In RGB it is the mean
    of the SSIM of the three channels.
    """
    sr, hr = _prepare(sr, hr, shave, space)
    if min(sr.shape[:2]) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, but {sr.shape[0]} x {sr.shape[1]} are left after shaving "
                         f"{shave} pixels off each border")
    return float(structural_similarity(sr, hr, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                       data_range=255, channel_axis=2 if space == "rgb" else None))


def _prepare(sr, hr, shave, space):
    if sr.shape != hr.shape or sr.ndim != 3 or sr.shape[2] != 3 or sr.dtype != np.uint8 or hr.dtype != np.uint8:
        raise ValueError(f"the metrics need two uint8 H x W x 3 images of equal size, not {sr.dtype} {sr.shape} and "
                         f"{hr.dtype} {hr.shape}")
    if min(sr.shape[:2]) <= 2 * shave:
        raise ValueError(f"no pixels are left of {sr.shape[0]} x {sr.shape[1]} after shaving {shave} off each border")
    inner = slice(shave, -shave or None)
    images = sr[inner, inner], hr[inner, inner]
    return [image.astype(float) if space == "rgb" else rgb_to_y(image) for image in images]
