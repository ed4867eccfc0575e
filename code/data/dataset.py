"""Pairs of LR and HR images as uint8 arrays: random crops for training, full images for tests."""
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data import degrade
from data.cache import Cache, cache_folder
from data.degradation import Degradation
from data.image import read_image, read_photo, reading
from data.source import default_cache, find
from option import shave_of
from option_types import Stage, crop_stages
from system.errors import UserError
from system.logger import redraw_interval

MIN_SIDE = 11  # pixels that SSIM needs after the borders are shaved


class Images:
    """The images of one dataset at one scale, decoded on first use (and cached on disk with --ext sep)."""

    def __init__(self, name: str, args: Namespace, train: bool):
        source = find(name, args, train)
        self.name, self.pairs, self.scale, self.train = name, source.pairs, args.scale, train
        self.shave = shave_of(args)  # pixels that PSNR and SSIM leave out at each border
        self.lr_kind = f"LR_X{args.scale}" if self.pairs[0].lr else f"LR_made_X{args.scale}"
        self.degradation = None  # of tests; for training each crop is degraded anew (distiller.py)
        if args.degrade and not train:
            self.degradation, self.lr_kind = Degradation(args.degrade, args.scale), f"{self.lr_kind}_{args.degrade}"
        self.sizes = {}  # index: height and width of the HR image; filled by `prepare`
        folder = None
        if args.ext == "sep" and name != "Demo":
            dir_cache = args.dir_cache or (default_cache() if name == "Sample" else "")  # not in the folder of scikit-image
            with reading(source.folder):
                folder = cache_folder(source.folder, dir_cache, default_cache())
        self.cache = Cache(folder, source.folder if source.nested else None)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def has_hr(self) -> bool:
        """Whether there is ground truth for any of the images."""
        return any(pair.hr for pair in self.pairs)

    def hr(self, index: int) -> np.ndarray | None:
        """Return HR as uint8 sH x sW x 3, cropped to the size of LR; None for an image without HR."""
        pair = self.pairs[index]
        if pair.hr is None:
            return None
        hr = degrade.crop_to_multiple(self.cache.get(pair.hr, "HR", read_photo), self.scale)
        self._check_unchanged(index, pair.hr, hr, 1)
        return hr

    def lr(self, index: int) -> np.ndarray:
        """Return LR as uint8 H x W x 3: from its file if there is one, else HR after bicubic downscaling, at scale 1 HR.

        For tests with --degrade it is degraded, in the same way in every run.
        """
        pair = self.pairs[index]
        if pair.hr is None:
            return read_image(pair.lr)[0]
        from_hr = pair.lr is None or (self.degradation is not None and self.degradation.from_hr)
        if from_hr and self.degradation is None and self.scale == 1:
            return self.hr(index)
        file = pair.hr if from_hr else pair.lr
        lr = self.cache.get(file, self.lr_kind, lambda file: self._make_lr(file, from_hr, pair.name))
        self._check_unchanged(index, file, lr, self.scale)
        return lr

    def _make_lr(self, file, from_hr, name):
        """Make LR from the file of HR, or else of LR."""
        if self.degradation is None or not self.degradation.from_hr:
            image = self._downscale(file) if from_hr else read_photo(file)
        else:
            image = degrade.crop_to_multiple(self.cache.get(file, "HR", read_photo), self.scale)
        return image if self.degradation is None else self.degradation.test_image(image, name)

    def _downscale(self, file: Path) -> np.ndarray:
        try:
            return degrade.downscale(self.cache.get(file, "HR", read_photo), self.scale)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None

    def _check_unchanged(self, index, file, image, scale):
        size = self.sizes.get(index)
        if size and size != (image.shape[0] * scale, image.shape[1] * scale):
            raise UserError(f"{file}: replaced during the run by an image of another size ({image.shape[1]} x "
                            f"{image.shape[0]} pixels, not {size[1] // scale} x {size[0] // scale}); start again")

    def teacher_output(self, index: int, kind: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the output of a teacher for LR, int16 sH x sW x 3, cached as `kind`; make() computes it if it is not."""
        pair = self.pairs[index]
        return self.cache.get(pair.lr or pair.hr, kind, lambda _: make())

    def alpha(self, index: int) -> np.ndarray | None:
        """Return the alpha channel, uint8 H x W, of an LR image without HR that has transparent parts; else None."""
        pair = self.pairs[index]
        return read_image(pair.lr)[1] if pair.hr is None else None

    def prepare(self) -> list[tuple[int, int]]:
        """Decode the images that are not cached yet, check their sizes, and return those of HR; raises UserError."""
        self.sizes = {}
        sizes = {}
        with self.cache.building("HR"):
            for index in progress(range(len(self)), f"reading {self.name}"):
                hr, file = self.hr(index), self.pairs[index].hr
                if hr is None:
                    continue
                least = 0 if self.train else MIN_SIDE + 2 * self.shave
                if min(hr.shape[:2]) < least:
                    raise UserError(f"{file}: {hr.shape[1]} x {hr.shape[0]} pixels are too few to score after "
                                    f"{self.shave} are shaved off each border: SSIM needs {least} a side; remove the image")
                sizes[index] = hr.shape[:2]
        with self.cache.building(self.lr_kind):
            for index in progress(range(len(self)), f"reading {self.name} LR"):
                lr, (height, width) = self.lr(index), sizes.get(index, (0, 0))
                if index in sizes and (height, width) != (lr.shape[0] * self.scale, lr.shape[1] * self.scale):
                    raise UserError(f"{self.pairs[index].lr}: {lr.shape[1]} x {lr.shape[0]} pixels do not match the "
                                    f"{width} x {height} of {self.pairs[index].hr} at scale {self.scale}")
        self.sizes = sizes
        return list(sizes.values())


class Crops(Dataset):
    """Random crops of training sets, numbered from the first iteration of the run to the last.

    Crop n depends on the seed and n alone, not on workers, epochs or interruptions: images are drawn without replacement, in
    a new order for each pass over the dataset, and place and orientation are drawn from (seed, n). Its size is that of the
    stage (--progressive) that n is in.
    """

    def __init__(self, args: Namespace):
        self.sets = [Images(name, args, train=True) for name in args.data_train]
        self.seed, self.scale, self.augment = args.seed, args.scale, not args.no_augment
        self.stages = crop_stages(args)
        largest = max(stage.patch for stage in self.stages)
        self.order = None, None  # number of a pass over the dataset, and the order of its images
        self.opened = {}  # image number: memory-mapped arrays
        self.teacher_kinds = []  # of each teacher, the kind of its cached outputs (data/teacher_cache.py)
        for images in self.sets:
            for size, pair in zip(images.prepare(), images.pairs):
                if min(size) < largest:
                    flag = "--progressive: a crop of" if args.progressive else "--patch_size"
                    raise UserError(f"{flag} {largest} (HR pixels) is larger than {pair.hr} ({size[1]} x {size[0]}): give a "
                                    "smaller one, or remove the image")
        self.images = [(images, index) for images in self.sets for index in range(len(images))]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "opened": {}}  # a memory map cannot be pickled for a spawned worker

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        """Return uint8 tensors LR 3 x p x p and HR 3 x sp x sp, and int16 3k x sp x sp of k cached teachers."""
        lr, hr, *outputs = self._arrays(self._image(number))
        rng = np.random.default_rng([self.seed, 1, number])
        patch = next(stage.patch for stage in reversed(self.stages) if stage.first <= number) // self.scale  # LR pixels
        top, left = (int(rng.integers(size - patch + 1)) for size in lr.shape[:2])
        orientation = rng.integers(2, size=3) if self.augment else (0, 0, 0)

        def crop(image, k):
            return orient(image[top * k:(top + patch) * k, left * k:(left + patch) * k], *orientation)

        parts = [crop(lr, 1), crop(hr, self.scale)]
        if outputs:
            parts.append(np.concatenate([crop(output, self.scale) for output in outputs], 2))
        return tuple(to_tensor(part) for part in parts)

    def _arrays(self, image):
        """Return LR, HR and the teacher outputs of an image; they remain open, which saves a sixth of the time of a crop."""
        arrays = self.opened.get(image)
        if arrays is None:
            images, index = self.images[image]
            outputs = (images.teacher_output(index, kind, _raise_removed) for kind in self.teacher_kinds)
            arrays = [images.lr(index), images.hr(index), *outputs]
            if images.cache.folder is not None:  # without a cache they are in memory, and all of them would fill it
                self.opened[image] = arrays
        return arrays

    def _image(self, number):
        """Return the number of the image from which a crop is taken."""
        pass_number, position = divmod(number, len(self.images))
        if self.order[0] != pass_number:
            order = np.random.default_rng([self.seed, 0, pass_number]).permutation(len(self.images))
            self.order = pass_number, order
        return self.order[1][position]


def _raise_removed():
    raise UserError("--cache_teacher: cached teacher outputs were removed during the run; --resume 1 computes them again")


def progress(items: Iterable, description: str) -> tqdm:
    """Return `items` with a progress bar, which is rarely redrawn where stderr is no terminal."""
    return tqdm(items, description, unit="image", leave=False, delay=1, mininterval=redraw_interval())


def orient(image: np.ndarray, flip_horizontal: bool, flip_vertical: bool, transpose: bool) -> np.ndarray:
    """Flip H x W x C, then transpose it, and return a view."""
    if flip_horizontal:
        image = image[:, ::-1]
    if flip_vertical:
        image = image[::-1]
    return image.swapaxes(0, 1) if transpose else image


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Copy an array H x W x C to a tensor C x H x W."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))  # ascontiguousarray may keep negative strides


class Batches:
    """A batch sampler: yields the numbers of the crops of each of the batches start..stop-1 of the run.

    stages: with the sizes of the batches. In several processes each has one of `parts` equal parts of every batch, number
    `part`.
    """

    def __init__(self, start: int, stop: int, stages: Sequence[Stage], part: int = 0, parts: int = 1):
        self.start, self.stop, self.stages = start, stop, stages
        self.part, self.parts = part, parts

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[range]:
        for stage, end in zip(self.stages, [*(stage.start for stage in self.stages[1:]), self.stop]):
            size = stage.batch // self.parts
            for iteration in range(max(self.start, stage.start), min(self.stop, end)):
                first = stage.first + (iteration - stage.start) * stage.batch + self.part * size
                yield range(first, first + size)
