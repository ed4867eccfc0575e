"""Reference implementations, as in papers and released code, with which benchmark.py compares this project's.

To add a comparison, write a function of a size (pixels per side) and a device that returns a `Comparison`, and list it in
COMPARISONS.
"""
from reference import formula, restoration, training
from reference.comparison import Comparison

__all__ = ["COMPARISONS", "Comparison"]

COMPARISONS = {  # name: (function that makes the Comparison, default sizes)
    "affinity": (formula.affinity, (32, 64, 128, 256)),
    "affinity_batch": (formula.affinity_batch, (48,)),
    "san_pooling": (formula.san_pooling, (48, 128, 256)),
    "san_forward": (formula.san_forward, (48, 128, 256)),
    "whole_image": (formula.whole_image, (512,)),
    "chop": (formula.chop_edsr, (128, 256, 512, 1024)),
    "dukd_step": (training.dukd_step, (192,)),
    "teacher_cache": (training.teacher_cache, (192,)),
    "data": (training.data, (192,)),
    "precision": (training.precision, (48,)),
    "nafnet_step": (restoration.nafnet_step, (128,)),
    "restormer_step": (restoration.restormer_step, (96,)),
}
