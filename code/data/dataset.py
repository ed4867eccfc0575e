"""Pairs of LR and HR images as uint8 arrays: random crops to train on, whole images to test on."""
import numpy as np
import torch
from system.errors import UserError
from torch.utils.data import Dataset
from tqdm import tqdm

from data import degrade
from data.cache import Cache, cache_folder
from data.image import read_image, read_photo
from data.source import default_cache, find

OPEN = 10_000  # images whose files are kept open in memory: Linux maps 65,530 files in a process
SMALLEST = 11  # pixels a side that SSIM needs of an image, when `scale` are shaved off each border


class Images:
    """The images of one dataset at one scale, decoded on first use (and kept on disk with --ext sep)."""

    def __init__(self, name, args, train):
        source = find(name, args, train)
        self.name, self.pairs, self.scale, self.train = name, source.pairs, args.scale, train
        keep = args.ext == "sep" and name != "Demo"
        dir_cache = args.dir_cache or (default_cache() if name == "Sample" else "")  # a package's folder is no place for it
        self.cache = Cache(cache_folder(source.folder, dir_cache, default_cache()) if keep else None)

    def __len__(self):
        return len(self.pairs)

    def hr(self, index):
        """uint8 sH x sW x 3, cut to the size of LR; None for an image without a truth."""
        pair = self.pairs[index]
        if pair.hr is None:
            return None
        return degrade.crop_to_multiple(self.cache.get(pair.hr, "HR", read_photo), self.scale)

    def lr(self, index):
        """uint8 H x W x 3: the file where there is one, else made from HR by bicubic downscaling."""
        pair = self.pairs[index]
        if pair.hr is None:
            return read_image(pair.lr)[0]
        if pair.lr is None:
            return self.cache.get(pair.hr, f"LR_made_X{self.scale}", self._make_lr)
        return self.cache.get(pair.lr, f"LR_X{self.scale}", read_photo)

    def _make_lr(self, file):
        try:
            return degrade.downscale(read_photo(file), self.scale)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None

    def answer(self, index, kind, make):
        """int16 sH x sW x 3, a teacher's answer to LR kept as `kind`; `make()` where it is not there."""
        pair = self.pairs[index]
        return self.cache.get(pair.lr or pair.hr, kind, lambda _: make())

    def alpha(self, index):
        """uint8 H x W of an LR image without a truth, where it has transparent parts; else None."""
        pair = self.pairs[index]
        return read_image(pair.lr)[1] if pair.hr is None else None

    def prepare(self):
        """Decodes what is not in the cache yet, with a bar, and checks the sizes; returns the HR sizes."""
        sizes = []
        for index, pair in enumerate(tqdm(self.pairs, f"reading {self.name}", unit="image", leave=False, delay=1)):
            hr, lr = self.hr(index), self.lr(index)
            if hr is None:
                continue
            if hr.shape != (lr.shape[0] * self.scale, lr.shape[1] * self.scale, 3):
                raise UserError(f"{pair.lr}: {lr.shape[1]} x {lr.shape[0]} pixels do not match the {hr.shape[1]} x "
                                f"{hr.shape[0]} of {pair.hr} at scale {self.scale}")
            least = 0 if self.train else SMALLEST + 2 * self.scale
            if min(hr.shape[:2]) < least:
                raise UserError(f"{pair.hr}: {hr.shape[1]} x {hr.shape[0]} pixels are too few to score at scale "
                                f"{self.scale}: SSIM needs {least} a side; take the image out")
            sizes.append(hr.shape[:2])
        return sizes


class Crops(Dataset):
    """Random crops of training sets, numbered through the whole run.

    Crop n is the same whatever the workers, the epochs or the interruptions: pass n // len(images) goes over all images in
    an order of its own, and place and orientation are drawn from (seed, n).
    """

    def __init__(self, args):
        self.sets = [Images(name, args, train=True) for name in args.data_train]
        self.seed, self.scale, self.augment = args.seed, args.scale, not args.no_augment
        self.patch = args.patch_size // args.scale  # LR pixels
        self.order = None, None
        self.opened = {}
        self.answers = []  # of each teacher that was asked once: as what the cache keeps its answers (data/teacher_cache.py)
        for images in self.sets:
            for size, pair in zip(images.prepare(), images.pairs):
                if min(size) < args.patch_size:
                    raise UserError(f"--patch_size {args.patch_size} (HR pixels) is larger than {pair.hr} ({size[1]} x "
                                    f"{size[0]}): give a smaller one, or take the image out")
        self.where = [(images, index) for images in self.sets for index in range(len(images))]

    def __getitem__(self, number):
        """-> LR 3 x p x p and HR 3 x sp x sp, uint8 tensors, and where k teachers were asked once 3k x sp x sp of int16."""
        lr, hr, *answers = self._arrays(self._image(number))
        rng = np.random.default_rng([self.seed, 1, number])
        top, left = (int(rng.integers(size - self.patch + 1)) for size in lr.shape[:2])
        orientation = rng.integers(2, size=3) if self.augment else (0, 0, 0)

        def crop(image, k):
            return orient(image[top * k:(top + self.patch) * k, left * k:(left + self.patch) * k], *orientation)

        parts = [crop(lr, 1), crop(hr, self.scale)]
        if answers:
            parts.append(np.concatenate([crop(answer, self.scale) for answer in answers], 2))
        return tuple(to_tensor(part) for part in parts)

    def _arrays(self, place):
        """LR, HR and the teachers' answers of an image; to open the cache's files would take longer than to read a crop."""
        arrays = self.opened.get(place)
        if arrays is None:
            images, index = self.where[place]
            arrays = [images.lr(index), images.hr(index), *(images.answer(index, kind, _removed) for kind in self.answers)]
            if images.cache.folder is None:
                return arrays  # decoded images would fill the memory
            if len(self.opened) >= OPEN:
                self.opened.clear()
            arrays = self.opened[place] = [np.asarray(array) for array in arrays]  # np.memmap's slices are slow
        return arrays

    def _image(self, number):
        turn, place = divmod(number, len(self.where))
        if self.order[0] != turn:
            self.order = turn, np.random.default_rng([self.seed, 0, turn]).permutation(len(self.where))
        return self.order[1][place]


def _removed():
    raise UserError("--cache_teacher: an answer was removed from the cache: go on with --resume 1, which has it made again")


def orient(image, flip_horizontal, flip_vertical, transpose):
    """A view of H x W x C, flipped and then transposed."""
    if flip_horizontal:
        image = image[:, ::-1]
    if flip_vertical:
        image = image[::-1]
    return image.swapaxes(0, 1) if transpose else image


def to_tensor(image):
    """H x W x C array -> C x H x W tensor of its own memory."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))  # ascontiguousarray may keep negative strides


class Batches:
    """Sampler: the numbers of the crops of batches start..stop-1 of the run, of each batch one of `parts` equal parts."""

    def __init__(self, start, stop, batch_size, part=0, parts=1):
        self.start, self.stop = start, stop
        self.parts, self.part, self.size = parts, part, batch_size // parts

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        places = range(self.start * self.parts + self.part, self.stop * self.parts, self.parts)  # in parts of batches
        return iter(range(place * self.size, (place + 1) * self.size) for place in places)
