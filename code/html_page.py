"""The page of compare.py --html: one file with the images, the scores and page.html, which shows them in any browser."""
import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from data import Images
    from evaluation import Score

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 768  # pixels a side of what is shown of an image, which bounds the size of the file
THUMBNAIL = 176, 128  # pixels, twice what the page shows, for displays of high density
COLUMNS = {"network": dict(words=True), "dataset": dict(label="test set", words=True),
           "psnr": dict(label="PSNR (dB)", better="higher"), "ssim": dict(label="SSIM", better="higher"),
           "parameters": dict(integer=True), "ms_per_image": dict(label="ms per image"),
           "ms_per_megapixel": dict(label="ms per megapixel")}


class Gallery:
    """Collects the first images of each test set for the page, as the `writer` of `evaluation.score`.

    hardest: function of HR, SR and a side in pixels that returns the rows and columns where SR has the largest error. The
    first method decides which part of a large image is shown. Images are encoded at once, between the measured times, which
    threads in the background would disturb.
    """

    def __init__(self, most: int, hardest: Callable):
        self.most, self.hardest, self.label = most, hardest, ""
        self.entries = {}  # (test set, image): entry of the page
        self.parts = {}  # (test set, image): rows and columns that are shown

    def prepare(self, images: "Images") -> None:
        """Do nothing: images are kept in memory."""

    def write(self, images: "Images", index: int, name: str, sr: np.ndarray, lr: np.ndarray, hr: np.ndarray) -> None:
        """Add the result of the method `self.label`, uint8 H x W x 3."""
        if index >= self.most:
            return
        key = images.name, name
        if key not in self.entries:
            self.parts[key] = part = self.hardest(hr, sr, SIDE)
            rows, columns = self.hardest(hr[part], sr[part], 48)
            height, width = hr[part].shape[:2]
            self.entries[key] = dict(
                name=name, dataset=f"{images.name} x{images.scale}", width=width, height=height,
                whole=[hr.shape[1], hr.shape[0]], results=[dict(label="HR", source=encode(hr[part]), scores={})],
                focus=[(columns.start + min(columns.stop, width)) / 2, (rows.start + min(rows.stop, height)) / 2],
                thumbnail=thumbnail(hr))
        self.entries[key]["results"].insert(-1, dict(label=self.label, source=encode(sr[self.parts[key]]), scores={}))

    def add_scores(self, score: "Score") -> None:
        """Add the scores of the images to the results of the method that was written last."""
        for name, psnr, ssim in score.per_image:
            if (score.dataset, name) in self.entries:
                others = {metric: f"{value:.4f}" for metric, value in score.perceptual_per_image[name].items()}
                self.entries[score.dataset, name]["results"][-2]["scores"] = dict(
                    PSNR=f"{psnr:.2f}", SSIM=f"{ssim:.4f}", **others)


def encode(image: np.ndarray) -> str:
    """Return uint8 H x W x 3 as the data URI of a lossless WebP file."""
    buffer = io.BytesIO()
    # the fastest compression, a tenth larger than the best one
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: np.ndarray) -> str:
    """Return a small copy of uint8 H x W x 3 as the data URI of a JPEG file."""
    small, buffer = Image.fromarray(np.ascontiguousarray(image)), io.BytesIO()
    small.thumbnail(THUMBNAIL)
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(title: str, about: str, protocol: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
         lower_is_better: dict[str, bool], gallery: Gallery) -> bytes:
    """Return the page.

    columns, rows: those of compare.csv. lower_is_better: of the metrics that are not in COLUMNS. The texts are shown as they
    are: the page never interprets them as HTML.
    """
    described = [dict(label=name) | COLUMNS.get(name, dict(better="lower" if lower_is_better.get(name) else "higher"))
                 for name in columns]
    data = json.dumps(dict(title=title, about=about, protocol=protocol, columns=described, rows=rows,
                           images=list(gallery.entries.values())), ensure_ascii=False)
    # in a script element `</script>` and `<!--` end or change it, wherever they are
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", data.replace("<", "\\u003c"))
    return text.encode(errors="replace")  # bytes of a file name that are no UTF-8
