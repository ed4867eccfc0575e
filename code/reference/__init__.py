"""What benchmark.py compares: computations as papers and released code write them, beside what this project does instead.

A comparison is a function of a size (pixels a side) and a device that returns a `Pair`, and its line in COMPARISONS.
"""
from reference import formula, training
from reference.pair import Pair

__all__ = ["COMPARISONS", "Pair"]

COMPARISONS = {  # name: (comparison, sizes)
    "affinity": (formula.affinity, (32, 64, 128, 256)),
    "affinity_batch": (formula.affinity_batch, (48,)),
    "san_pooling": (formula.san_pooling, (48, 128, 256)),
    "san_forward": (formula.san_forward, (48, 128, 256)),
    "chop": (formula.chop_edsr, (128, 256, 512, 1024)),
    "dukd_step": (training.dukd_step, (192,)),
    "teacher_cache": (training.teacher_cache, (192,)),
    "data": (training.data, (192,)),
    "precision": (training.precision, (48,)),
}
