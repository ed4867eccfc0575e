"""Datasets by their names on the command line: the pairs of HR and LR files of each."""
import importlib.util
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from data.image import SUFFIXES, is_folder, list_images, reading
from option import ROOT
from system.errors import UserError

# Colour photographs and grey textures of the scikit-image package. The test set has a portrait, an object, a retina scan
# and a texture; none of them is a scene of the training set (`motorcycle` left and right are one scene).
SAMPLE_TRAIN = ("chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
                "motorcycle_right.png", "brick.png", "grass.png")
SAMPLE_TEST = ("astronaut.png", "coffee.png", "retina.jpg", "gravel.png")

PARTS = "train", "test"  # folders of a dataset with both
ROLES = re.compile("(hr|gt|sharp|clean|norain|target|lr|lq|blur|blurry|noisy|rain|rainy|input)(x?[1-8])?", re.IGNORECASE)
KINDS = " ".join(sorted(suffix.removeprefix(".") for suffix in SUFFIXES))


@dataclass(frozen=True)
class Pair:
    """The files of an image: `hr` is None where there is no ground truth, `lr` where LR is to be made from HR."""

    name: str
    hr: Path | None
    lr: Path | None


@dataclass(frozen=True)
class Source:
    """A dataset at one scale, for training or testing."""

    name: str
    folder: Path  # of the dataset, for which there is one cache
    pairs: tuple[Pair, ...]
    nested: bool = False  # whether files in different subfolders may have equal names


def find(name: str, args: Namespace, train: bool) -> Source:
    """Find the dataset of that name, for training or testing at --scale.

    Raises UserError for files that are missing, cannot be read or do not match, and at scale 1 where HR would be the input.
    """
    with reading(args.dir_data):
        source = _find(name, args, train)
    if args.scale == 1 and not args.degrade and any(pair.lr is None for pair in source.pairs):
        raise UserError(f"--scale 1: {name} has no degraded images, and the input would be HR itself; name the folders of "
                        "inputs and targets with --pair_dirs INPUT/TARGET, or degrade HR with --degrade KIND")
    return source


def _find(name, args, train):
    if name == "Sample":
        return sample(train)
    if name == "Demo":
        if train:
            raise UserError("--data_train Demo: put images to train on into DIR_DATA/NAME/HR and give --data_train NAME")
        return _demo(Path(args.dir_demo))
    root = Path(args.dir_data)
    if args.pair_dirs:
        return _paired(name, root, args.pair_dirs, train)
    if name == "DIV2K":
        return _div2k(root / name, args, train)
    candidates = [root / "benchmark" / name, root / name]
    folder = next((folder for folder in candidates if is_folder(folder / "HR")), None)
    if folder is None:
        raise _missing(name, [folder / "HR" for folder in candidates], train)
    return Source(name, folder, tuple(_pairs(list_images(folder / "HR"), folder / "HR",
                                             folder / "LR_bicubic" / f"X{args.scale}", args.scale)))


def _missing(name, folders, train):
    looked = " and ".join(map(str, folders))
    flags = "--data_train Sample --data_test Sample" if train else "--data_test Sample"
    return UserError(f"no dataset {name}: looked for {looked}; fetch the published ones with scripts/download_data.sh and "
                     f"give their folder with --dir_data, name folders of pairs with --pair_dirs, or use the images of "
                     f"scikit-image: {flags}")


def sample(train: bool) -> Source:
    """Find the photos of scikit-image, for training or testing; raises UserError where its version lacks some."""
    package = importlib.util.find_spec("skimage")
    folder = Path(package.origin).parent / "data"
    files = [folder / file for file in (SAMPLE_TRAIN if train else SAMPLE_TEST)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: this version of scikit-image lacks {', '.join(missing)}; install the version of "
                        "requirements.txt")
    return Source("Sample", folder, tuple(Pair(file.stem, file, None) for file in files))


def _demo(folder):
    images = list_images(folder)
    if not images:
        raise UserError(f"{folder}: no images there ({KINDS}); give the folder of your images with --dir_demo")
    stems = [file.stem for file in images]
    names = [stem if stems.count(stem) == 1 else file.name.replace(".", "_") for stem, file in zip(stems, images)]
    _check_names(names, images)
    return Source("Demo", folder, tuple(Pair(name, None, file) for name, file in zip(names, images)))


def _div2k(folder, args, train):
    if not is_folder(folder / "DIV2K_train_HR"):
        raise _missing("DIV2K", [folder / "DIV2K_train_HR"], train)
    ranges = args.data_range.split("/")
    if len(ranges) > 2 or not all(re.fullmatch("[0-9]{1,9}-[0-9]{1,9}", one) for one in ranges):
        raise UserError(f"--data_range {args.data_range}: not of the form 1-800/801-810")
    chosen = ranges[0] if train else ranges[-1]
    first, last = (int(number) for number in chosen.split("-"))
    images = [file for file in list_images(folder / "DIV2K_train_HR")
              if file.stem.isdigit() and first <= int(file.stem) <= last]
    if not images:
        raise UserError(f"{folder / 'DIV2K_train_HR'}: no images {chosen} there; choose others with --data_range")
    return Source("DIV2K", folder, tuple(_pairs(images, folder / "DIV2K_train_HR",
                                                folder / "DIV2K_train_LR_bicubic" / f"X{args.scale}", args.scale,
                                                is_subset=True)))


def _paired(name, root, pair_dirs, train):
    """Find the pairs of --pair_dirs in the folder of a dataset, or in each of its subfolders (sequences of a video)."""
    part = "train" if train else "test"
    folders = [folder for parent in (root / "benchmark" / name, root / name) for folder in (parent / part, parent)]
    for folder in (*folders, root / part / name):
        subfolders = sorted(inner for inner in folder.iterdir() if inner.name not in PARTS) if is_folder(folder) else []
        for inputs, targets in (names.split("/") for names in pair_dirs.split("+")):
            for parents in ([folder], subfolders):
                found = [parent for parent in parents if is_folder(parent / inputs)]
                pairs = [pair for parent in found for pair in _match(
                    parent / inputs, parent / targets, "" if parent == folder else f"{parent.name}_", train)]
                if pairs:
                    _check_names([pair.name for pair in pairs], [pair.lr for pair in pairs])
                    return Source(name, folder, tuple(pairs), nested=True)
    raise UserError(f"no dataset {name} with the folders of --pair_dirs {pair_dirs}: looked in "
                    f"{', '.join(map(str, folders))} and {root / part / name}, and their subfolders")


def _match(inputs, targets, prefix, train):
    """Pair the images of two folders by their names; without the folder of targets there is no ground truth.

    prefix: put before the names of the pairs.
    """
    files = list_images(inputs)
    if not files:
        raise UserError(f"{inputs}: no images there ({KINDS})")
    if not is_folder(targets):
        if train:
            raise UserError(f"{targets}: no such folder; training needs the ground truth of {inputs}")
        return [Pair(prefix + file.stem, None, file) for file in files]
    others = list_images(targets)
    name_of = _stem if {file.stem for file in files} & {file.stem for file in others} else _name_without_role
    names, other_names = [name_of(file) for file in files], [name_of(file) for file in others]
    _check_names(names, files)
    _check_names(other_names, others)
    partners, known = dict(zip(other_names, others)), set(names)
    for name, file in (*zip(names, files), *zip(other_names, others)):
        if name not in partners or name not in known:
            raise UserError(f"{file}: no image of that name in {targets if file.parent == inputs else inputs}; complete the "
                            "pair, or remove it")
    return [Pair(prefix + name, partners[name], file) for name, file in zip(names, files)]


def _stem(file):
    return file.stem


def _name_without_role(file):
    """Return the part of a file name that input and target share: 001 of rain-001, norain-001, 001_LR4, 001_HR, 001x4."""
    words = re.split("[_-]", re.sub("x[1-8]$", "", file.stem))
    return "_".join(word for word in words if not ROLES.fullmatch(word))


def _pairs(images, hr_folder, lr_folder, scale, is_subset=False):
    """Pair each HR image with the LR image NAMExS of lr_folder, or with None where there is no such folder.

    is_subset: whether lr_folder may hold more images.
    """
    if not images:
        raise UserError(f"{hr_folder}: no images there ({KINDS})")
    _check_names([image.stem for image in images], images)
    if not is_folder(lr_folder):
        return [Pair(image.stem, image, None) for image in images]
    lr_images = {file.stem: file for file in list_images(lr_folder)}
    pairs = [Pair(image.stem, image, lr_images.get(f"{image.stem}x{scale}", lr_images.get(image.stem))) for image in images]
    without = next((pair for pair in pairs if pair.lr is None), None)
    if without:
        raise UserError(f"{lr_folder}: no {without.name}x{scale} for {without.hr}; complete the folder, or remove it, so "
                        "that HR is downscaled")
    if len(lr_images) > len(images) and not is_subset:
        raise UserError(f"{lr_folder} holds {len(lr_images)} images, {hr_folder} {len(images)}: they must be the same")
    return pairs


def _check_names(names, files):
    """Raise UserError if two files have the same name: their results would overwrite each other."""
    first = {}
    for name, file in zip(names, files):
        if first.setdefault(name, file) != file:
            raise UserError(f"{first[name]} and {file.name} have the same name; rename or remove one of them")


def default_cache() -> Path:
    """Return the folder for the caches of datasets that are read-only."""
    return ROOT / "experiment" / "cache"
