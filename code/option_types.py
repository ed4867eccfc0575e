"""Types of the flags: each function parses the value of a flag, and its error states which values are valid.

Sizes and counts have upper bounds, beyond which PyTorch raises an error or fills the memory. This file does not import
torch, so that --help is instant.
"""
import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from system.errors import UserError

RDN_NAMES = {"20,6,32": "A", "16,8,64": "B"}
SCALES = 2, 3, 4, 8
VIEWS = "zoom_in", "zoom_out"
LARGEST = 1e30  # float32 ends at 3e38, and PyTorch's optimisers raise an error where products overflow
MAX_COUNT = 10**9  # iterations, epochs, lines of the log
MAX_SIZE = 65536  # pixels, channels, blocks


# ---- numbers

def natural(string: str) -> int:
    """Parse a number of iterations or epochs, 0 or more."""
    return _whole(string, 0, MAX_COUNT)


def positive(string: str) -> int:
    """Parse a number of iterations or epochs, 1 or more."""
    return _whole(string, 1, MAX_COUNT)


def size(string: str) -> int:
    """Parse a number of pixels, channels, blocks or images, 1 or more."""
    return _whole(string, 1, MAX_SIZE)


def size_or_none(string: str) -> int:
    """Parse a number of pixels, 0 or more."""
    return _whole(string, 0, MAX_SIZE)


def kernel(string: str) -> int:
    """Parse the side of a convolution kernel in pixels."""
    return _whole(string, 1, 99)


def window(string: str) -> int:
    """Parse the side of a SwinIR window in pixels, whose index of relative positions takes 8 x side^4 bytes per block."""
    return _whole(string, 1, 64)


def repeats(string: str) -> int:
    """Parse a number of repetitions per iteration, 1 or more."""
    return _whole(string, 1, 1000)


def repeats_or_none(string: str) -> int:
    """Parse a number of repetitions per iteration, 0 or more."""
    return _whole(string, 0, 1000)


def processes(string: str) -> int:
    """Parse a number of processes, 1 or more."""
    return _whole(string, 1, 64)


def processes_or_none(string: str) -> int:
    """Parse a number of processes, 0 or more."""
    return _whole(string, 0, 64)


def order(string: str) -> int:
    """Parse the order of a Taylor series."""
    return _whole(string, 0, 100)


def seed(string: str) -> int:
    """Parse a seed for the generators of PyTorch and NumPy."""
    return _number(string, int, lambda value: 0 <= value < 2**63, "a whole number in 0..2^63-1")


def fraction(string: str) -> float:
    """Parse a number in [0, 1)."""
    return _number(string, float, lambda value: 0 <= value < 1, "in 0..1, 1 excluded")


def probability(string: str) -> float:
    """Parse a number in [0, 1]."""
    return _number(string, float, lambda value: 0 <= value <= 1, "in 0..1")


def decay_factor(string: str) -> float:
    """Parse a number in (0, 1]."""
    return _number(string, float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def positive_number(string: str) -> float:
    """Parse a finite number above 0."""
    return _number(string, float, lambda value: 0 < value <= LARGEST, "a finite number above 0")


def not_negative(string: str) -> float:
    """Parse a finite number, 0 or more."""
    return _number(string, float, lambda value: 0 <= value <= LARGEST, "a finite number, 0 or more")


def ratio(string: str) -> float:
    """Parse a ratio of two numbers of channels."""
    return _number(string, float, lambda value: 0.01 <= value <= 100, "a number in 0.01..100")


def pixel_range(string: str) -> float:
    """Parse the largest value of a pixel."""
    return _number(string, float, lambda value: 1e-3 <= value <= 65535, "a number in 0.001..65535")


def _whole(string, least, most):
    return _number(string, int, lambda value: least <= value <= most, f"a whole number in {least}..{most}")


def _number(string, kind, is_valid, description):
    try:
        if not string.isascii() or "_" in string:  # Python reads 1_000 and the digits of other scripts
            raise ValueError
        value = kind(string)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{string[:40]!r} is not {description}")
    return value


# ---- lists

def parse_list(string: str) -> list[str]:
    """Parse '[A,B]', 'A,B' or 'A+B' as ['A', 'B']; the path of an existing file is not divided."""
    if os.path.exists(string):
        return [string]
    names = [name.strip() for name in re.split(r"[,+]", string.strip().removeprefix("[").removesuffix("]"))]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{string!r} is not a list such as [A,B] or A+B")
    return names


def parse_once(string: str) -> list[str]:
    """Parse a list without duplicates."""
    names = parse_list(string)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise argparse.ArgumentTypeError(f"{string!r}: duplicate {twice}")
    return names


def parse_names(string: str) -> list[str]:
    """Parse 'DS+TS' as ['DS', 'TS'], and an empty string as an empty list."""
    return parse_list(string) if string else []


def parse_metrics(string: str) -> list[str]:
    """Parse 'lpips+niqe', names of metrics of pyiqa without duplicates, and an empty string as an empty list."""
    names = parse_once(string) if string else []
    if {"psnr", "ssim"} & set(names):
        raise argparse.ArgumentTypeError(f"{string!r}: psnr and ssim are always computed; name other metrics")
    return names


def parse_numbers(string: str) -> list[int]:
    """Parse '[6,6,6]', '6,6,6' or '6+6+6' as [6, 6, 6]."""
    return [size(word) for word in parse_list(string)]


def parse_scales(string: str) -> list[int]:
    """Parse '2+3+4' as [2, 3, 4]."""
    scales = parse_numbers(string)
    if not set(scales) <= set(SCALES) or len(set(scales)) < len(scales):
        raise argparse.ArgumentTypeError(f"{string!r}: the scales are {', '.join(map(str, SCALES))}, each at most once")
    return scales


def parse_steps(string: str) -> list[int]:
    """Parse '1000-2000' as [1000, 2000]."""
    return [positive(word) for word in string.split("-")]


def parse_features(string: str) -> list[int]:
    """Parse '[1,2,3]', numbers of feature maps, as [1, 2, 3]."""
    words = [word.strip() for word in string.strip().removeprefix("[").removesuffix("]").split(",")]
    if not all(re.fullmatch("[0-9]+", word) for word in words):
        raise argparse.ArgumentTypeError(f"{string!r} is not a list such as [1,2,3]")
    if not set(words) <= set("0123") or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{string!r}: there are four feature maps, 0 to 3, each at most once")
    return [int(word) for word in words]


def parse_point(string: str) -> tuple[int, int]:
    """Parse 'X,Y', the position of a pixel, as (X, Y)."""
    match = re.fullmatch("([0-9]{1,9}),([0-9]{1,9})", string.strip("() ").replace(" ", ""))
    if not match:
        raise argparse.ArgumentTypeError(f"{string[:40]!r} is not a position X,Y such as 120,64")
    return int(match[1]), int(match[2])


class OutputSize(NamedTuple):
    """Width and height of an image in pixels."""

    width: int
    height: int

    def __str__(self):
        return f"{self.width}x{self.height}"


PAPER_SIZE = OutputSize(1280, 720)  # for which papers count FLOPs


def parse_output_size(string: str) -> OutputSize:
    """Parse '1280x720', width x height in pixels."""
    words = string.replace(" ", "").split("x")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"{string[:40]!r} is not a size WIDTHxHEIGHT such as {PAPER_SIZE}")
    return OutputSize(*map(size, words))


def parse_pair_dirs(string: str) -> str:
    """Check 'input/target+blur/sharp', pairs of names of folders, and return it."""
    for pair in string.split("+") if string else ():
        names = pair.split("/")
        if len(set(names)) < len(names) or len(names) != 2 or not all(
                name.strip(". ") and name == PurePath(name).name for name in names):
            raise argparse.ArgumentTypeError(f"{string[:80]!r} is not a pair of names of folders such as input/target")
    return string


class Seconds(float):
    """Time of --budget."""

    def __str__(self):
        return f"{float(self):.9g}s" if self >= 1 else f"{1000 * self:.9g}ms"


def parse_seconds(string: str) -> Seconds:
    """Parse '20ms' or '0.5s' as seconds."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(ms|s)", string)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{string[:40]!r} is not a time in ms or s, such as 20ms or 0.5s")
    return Seconds(float(match[1]) / (1000 if match[2] == "ms" else 1))


def parse_rdn_config(string: str) -> str:
    """Parse 'A', 'B' or 'D,C,G', which becomes A or B if it is one of them, as in checkpoint files."""
    config = string.strip("[()] ").replace(" ", "")
    if config not in RDN_NAMES.values() and not re.fullmatch("[1-9][0-9]{0,4}(,[1-9][0-9]{0,4}){2}", config):
        raise argparse.ArgumentTypeError(f"{string!r} is neither A, B nor three numbers D,C,G such as 16,8,64")
    return RDN_NAMES.get(config, config)


class Iterations(list):
    """Steps of --decay in iterations instead of epochs."""

    def __repr__(self):
        return "-".join(map(str, self)) + "it"


def parse_decay(string: str) -> str | list[int]:
    """Parse '150-300' as [150, 300], '100000-200000it' as the same in `Iterations`, and 'cosine' as it is."""
    if string == "cosine":
        return string
    words = string.removesuffix("it").split("-")
    steps = [int(word) for word in words if re.fullmatch("[0-9]{1,18}", word)]
    if len(steps) < len(words) or min(steps) < 1 or steps != sorted(set(steps)):
        raise argparse.ArgumentTypeError(f"{string!r} is neither cosine nor rising epochs such as 150-300, or iterations "
                                         "such as 100000-200000it")
    return Iterations(steps) if string.endswith("it") else steps


def parse_betas(string: str) -> tuple[float, float]:
    """Parse '0.9,0.999', the coefficients of ADAM's running averages."""
    try:
        first, second = (fraction(word.strip()) for word in string.strip("() ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{string!r} is not a pair such as 0.9,0.999") from None
    return first, second


# ---- the loss string

def parse_loss(string: str, what: str = "loss", item: str = "TERM") -> list[tuple[float, str]]:
    """Parse '0.5*DS+1e-3*GAN' as [(0.5, 'DS'), (0.001, 'GAN')]; raises ValueError.

    what, item: names of the string and its entries in the error message.
    """
    terms = []
    for part in re.split(r"(?<![0-9.][eE])\+", string.replace(" ", "")):
        match = re.fullmatch(r"(?:([0-9.]+(?:[eE][+-]?[0-9]+)?)\*)?([A-Za-z_]\w*)", part)
        if not match:
            raise ValueError(f"{what} {string!r}: {part!r} is not of the form WEIGHT*{item}")
        try:
            weight = float(match[1] or 1)
        except ValueError:
            weight = math.inf
        if weight > LARGEST:
            raise ValueError(f"{what} {string!r}: {match[1]!r} is not a number, or not a finite one")
        if match[2] in [name for _, name in terms]:
            raise ValueError(f"{what} {string!r}: duplicate {item.lower()} {match[2]}")
        terms.append((weight, match[2]))
    return terms


def parse_stages(string: str) -> list[tuple[float, list[tuple[float, str]]]]:
    """Parse 'DS+TS@0-80%,DS_MSE@80-100%' as [(80, [(1, 'DS'), (1, 'TS')]), (100, [(1, 'DS_MSE')])]; raises ValueError.

    Each stage is its end, in percent of the iterations, and its terms. A string without @ is a single stage.
    """
    if "@" not in string:
        return [(100, parse_loss(string))]
    stages, reached = [], 0
    for part in string.replace(" ", "").split(","):
        match = re.fullmatch(r"(.*)@([0-9]+(?:\.[0-9]+)?)-([0-9]+(?:\.[0-9]+)?)%", part)
        if not match:
            raise ValueError(f"loss {string!r}: {part!r} is not of the form TERMS@FROM-TO%")
        start, end = float(match[2]), float(match[3])
        if start != reached or not start < end <= 100:
            raise ValueError(f"loss {string!r}: {part!r} must begin at {reached:g}% and end later, at 100% at most")
        stages.append((end, parse_loss(match[1])))
        reached = end
    if reached != 100:
        raise ValueError(f"loss {string!r}: the last stage must end at 100%, not at {reached:g}%")
    return stages


def stage_ends(stages: Sequence[tuple[float, object]], iterations: int) -> list[int]:
    """Return the iteration before which each stage of `parse_stages` ends, in a run of that many iterations."""
    return [round(end * iterations / 100) for end, _ in stages]


class Stage(NamedTuple):
    """Iterations of a run with crops and batches of one size."""

    start: int  # the first iteration
    first: int  # number of its first crop
    patch: int  # side of the crops, in HR pixels
    batch: int  # crops in a batch


def parse_progressive(string: str) -> str:
    """Check '128/64@0,160/40@92000' or '...@30%', sizes of crops and batches with the iterations from which they apply."""
    for index, part in enumerate(string.replace(" ", "").split(",") if string else ()):
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})@([0-9]{1,9}|[0-9]{1,2}(?:\.[0-9]{1,6})?%)", part)
        if not match or (float(match[3].strip("%")) == 0) != (index == 0):
            raise argparse.ArgumentTypeError(f"{part[:40]!r} is not of the form PATCH/BATCH@ITERATION or "
                                             "PATCH/BATCH@PERCENT%, the first of them @0, such as 128/64@0,160/40@92000")
        size(match[1]), size(match[2])
    return string


def crop_stages(args: argparse.Namespace) -> list[Stage]:
    """Return the stages of --progressive, or the single one of --patch_size and --batch_size; raises ValueError.

    Stages that begin after the end of the run are left out.
    """
    if not args.progressive:
        return [Stage(0, 0, args.patch_size, args.batch_size)]
    iterations, stages = args.epochs * args.test_every, []
    for part in args.progressive.replace(" ", "").split(","):
        patch, batch, begin = re.split("[/@]", part)
        start = round(float(begin[:-1]) * iterations / 100) if begin.endswith("%") else int(begin)
        last = stages[-1] if stages else Stage(-1, 0, 0, 0)
        if start <= last.start:
            raise ValueError(f"--progressive {args.progressive}: in a run of {iterations} iterations (--epochs x "
                             f"--test_every) {part} begins at iteration {start}, which must be after {last.start}")
        stages.append(Stage(start, last.first + (start - last.start) * last.batch, int(patch), int(batch)))
    return [stage for stage in stages if stage.start < iterations]


def parse_views(string: str) -> list[tuple[float, str]]:
    """Parse 'zoom_in+0.5*zoom_out' as [(1, 'zoom_in'), (0.5, 'zoom_out')], without views of weight 0."""
    try:
        views = parse_loss(string, "views", "VIEW") if string else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None
    unknown = next((name for _, name in views if name not in VIEWS), None)
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no view {unknown}; there are {', '.join(VIEWS)}")
    return [(weight, name) for weight, name in views if weight]


def parse_view_names(string: str) -> list[str]:
    """Parse 'original+zoom_in' as ['original', 'zoom_in'], and 'all' as ['all']."""
    names = parse_once(string)
    unknown = next((name for name in names if name not in ("original", *VIEWS)), None)
    if unknown and names != ["all"]:
        raise argparse.ArgumentTypeError(f"there is no view {unknown}; there are original, {', '.join(VIEWS)}, or all")
    return names


# ---- degradations

DEGRADATIONS = {  # name: least and largest parameter, the range without one; None for those without a parameter
    "noise": (0, 255, None), "jpeg": (1, 100, None), "blur": (1, 99, (5, 15)), "rain": None, "realesrgan": None}


def parse_degradation(string: str) -> str:
    """Check a description of degradations, such as 'blur+noise0-55', or an empty one, and return it."""
    try:
        if string:
            degradation_steps(string)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return string


def degradation_steps(description: str) -> list[tuple[str, float, float]]:
    """Return the name and the range of the parameter of each degradation, 0 to 0 without one; raises ValueError."""
    steps = []
    for word in description.split("+"):
        match = re.fullmatch(r"([a-z]+)([0-9.]{1,9})?(?:-([0-9.]{1,9}))?", word)
        if not match or match[1] not in DEGRADATIONS:
            raise ValueError(f"{word[:40]!r} is not a degradation such as noise25, noise0-55, jpeg10-40, blur, rain or "
                             "realesrgan")
        name, low, high = match.groups()
        limits = DEGRADATIONS[name]
        if limits is None:
            if low or high:
                raise ValueError(f"{word!r}: {name} takes no number")
            steps.append((name, 0, 0))
            continue
        least, most, default = limits
        kind = int if name == "jpeg" else float
        try:
            low, high = default if default and not (low or high) else (kind(low), kind(high or low))
        except (TypeError, ValueError):
            low = high = -1
        if not least <= low <= high <= most or not high:
            raise ValueError(f"{word!r}: {name} takes a {'whole ' * (kind is int)}number in {least}..{most}, or a range "
                             f"such as {name}10-40")
        steps.append((name, low, high))
    if len(steps) > 1 and "realesrgan" in [name for name, _, _ in steps]:
        raise ValueError("realesrgan includes all degradations and cannot be part of a sum")
    if len(steps) > 8:  # the name of a cache file contains them
        raise ValueError(f"{len(steps)} degradations; give 8 at most")
    return steps


# ---- paths

def expanded(name: str, value: str | list[str]) -> str | list[str]:
    """Replace ~ by the home folder in a path, or in each of several; raises ValueError for a user without one."""
    if isinstance(value, list):
        return [expanded(name, path) for path in value]
    path = os.path.expanduser(value or "")
    if path.startswith("~"):
        raise ValueError(f"--{name} {value}: there is no home folder {path.split(os.sep)[0]}")
    return path if value else value


def home_path(string: str) -> Path:
    """Parse a path, with ~ as the home folder."""
    try:
        return Path(expanded("", string))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None


def parse_labelled(string: str) -> dict[str, str]:
    """Parse --ckp_path of several checkpoints, 'LABEL=A+B', as {label: path}; raises UserError.

    A file without a label is labelled with the shortest end of its path that is unique.
    """
    if not string:
        return {}
    try:
        entries = parse_list(string)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--ckp_path {error}") from None
    entries = [("", "", entry) if os.path.exists(entry) else entry.rpartition("=") for entry in entries]
    entries = [(label, os.path.expanduser(path)) for label, _, path in entries]
    paths = [Path(path).parts for label, path in entries if not label]
    nets = {}
    for label, path in entries:
        parts = Path(path).parts
        tails = (n for n in range(1, len(parts)) if [other[-n:] for other in paths].count(parts[-n:]) == 1)
        label = label or os.path.join(*parts[-next(tails, len(parts)):]) if parts else label
        if label in nets or not parts:
            raise UserError(f"--ckp_path {string}: " + (f"two files have the label {label}; give each its own, LABEL=FILE"
                                                        if label in nets else f"{label}= has no file"))
        nets[label] = path
    return nets
