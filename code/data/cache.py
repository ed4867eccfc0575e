"""A cache of decoded images on disk, memory-mapped, so that a crop reads only its own pixels.

The kinds of arrays are HR, LR_X2, LR_made_X2 (uint8) and SR_X2_... (int16, teacher outputs). KIND.index maps the name of
each source file, or its path below the folder of the dataset, to the place of its array in a file KIND.<random>.pack. These
rules make it safe to kill any process at any time, and to start several at once:

- The index is replaced atomically, every few seconds while arrays are added. A killed build loses the arrays since then.
- A process appends only to a pack that it has created. No byte that an index has listed is ever overwritten or truncated,
  since another process may have it mapped. A pack that no index lists any more is deleted.
- One process at a time adds to a kind; another one that needs a missing array waits, then reads it from the cache.
"""
import hashlib
import json
import logging
import mmap
import os
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from math import prod
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np

from system.errors import UserError, reason_of
from system.files import atomic_write, lock, remove_stale_parts

log = logging.getLogger("sr")
PUBLISH_EVERY = 5  # seconds
ALIGNMENT = 64  # bytes
MAX_PACKS = 4  # of a kind: a process has a file descriptor open for each


class Entry(NamedTuple):
    """The place of an array in its pack, and the digest and status of the source file that it was made from."""

    pack: str
    offset: int
    shape: tuple
    digest: str
    status: tuple


class Cache:
    """The arrays made from the files of a dataset: cached in `folder`, or made each time where it is None.

    root: the folder of a dataset whose files may have equal names in different subfolders.
    """

    def __init__(self, folder: Path | None, root: Path | None = None):
        self.folder, self.root = folder, root
        self.stores = {}
        self.status = {}  # of each source when it was first used: data must not change during a run

    def get(self, source: Path, kind: str, make: Callable[[Path], np.ndarray]) -> np.ndarray:
        """Return `make(source)`, memory-mapped and read-only if it was cached; raises UserError."""
        if self.folder is None:
            return make(source)
        status = self.status.get(source)
        if status is None:
            status = self.status[source] = status_of(source)
        return self._store(kind).get(source, status, make)

    def building(self, kind: str) -> AbstractContextManager:
        """Return a context in which all missing arrays of a kind are added under one lock."""
        return nullcontext() if self.folder is None else self._store(kind).building()

    def _store(self, kind):
        store = self.stores.get(kind)
        if store is None:
            store = self.stores[kind] = Store(self.folder, kind, self.root)
        return store


class Store:
    """The arrays of one kind; root: see `Cache`."""

    def __init__(self, folder: Path, kind: str, root: Path | None = None):
        self.folder, self.kind, self.index, self.root = folder, kind, folder / f"{kind}.index", root
        self.dtype = np.dtype(np.int16 if kind.startswith("SR_") else np.uint8)
        self.maps = {}
        self.depth, self.lock, self.file, self.end = 0, None, None, 0
        self.changed, self.published = False, 0.0
        self.entries = self._load()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "maps": {}}  # a memory map cannot be pickled for a spawned worker

    def get(self, source: Path, status: tuple, make: Callable[[Path], np.ndarray]) -> np.ndarray:
        """Return the array of a source, and make it where it is missing.

        status: that of the source when this process first used it.
        """
        array = self._find(source, status)
        if array is None:
            with self.building():
                self._begin()
                array = self._find(source, status)
                if array is None:
                    array = self._add(source, status, make)
        return array

    @contextmanager
    def building(self) -> Iterator[None]:
        """Hold the lock from the first missing array to the end of the body."""
        self.depth += 1
        complete = False
        try:
            yield
            complete = True
        finally:
            self.depth -= 1
            if self.lock and not self.depth:
                self._finish(complete)

    # ---- reading

    def _load(self):
        """Return the entries that fit their packs; none if the index is missing or damaged."""
        try:
            checksum, _, content = self.index.read_bytes().partition(b"\n")
            if int(checksum, 16) != zlib.crc32(content):
                return {}
            sizes = {path.name: path.stat().st_size for path in self._packs()}
            entries = {}
            for name, (pack, offset, shape, digest, status) in json.loads(content).items():
                entry = Entry(pack, index(offset), tuple(map(index, shape)), digest, tuple(status))
                if offset >= 0 and min(shape) > 0 and offset + self._size(entry) <= sizes.get(pack, 0):
                    entries[name] = entry
            return entries
        except Exception:  # a damaged index can cause any exception; the arrays are made again
            return {}

    def _key(self, source):
        return source.relative_to(self.root).as_posix() if self.root else source.name

    def _find(self, source, status):
        entry = self.entries.get(self._key(source))
        return self._view(entry) if entry and entry.status == status else None

    def _view(self, entry):
        """Return the array in its memory-mapped pack, None if the pack was removed."""
        end = entry.offset + self._size(entry)
        buffer = self.maps.get(entry.pack)
        if buffer is None or len(buffer) < end:
            try:
                with open(self.folder / entry.pack, "rb") as file:
                    buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                return None
            if len(buffer) < end:
                return None
            self.maps[entry.pack] = buffer
        return np.ndarray(entry.shape, self.dtype, buffer, entry.offset)

    def _size(self, entry):
        return prod(entry.shape) * self.dtype.itemsize

    def _packs(self):
        return self.folder.glob(f"{self.kind}.*.pack")

    # ---- adding, with the lock

    def _begin(self):
        """Take the lock and read the entries that other processes have added, unless this process has the lock already."""
        if self.lock:
            return
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f".{self.kind}.lock"
            try:
                self.lock = lock(path, "")
            except UserError:
                log.info("waiting for another process that writes %s", self.index)
                self.lock = lock(path, "", wait=True)
        self.entries, self.published = self._load(), time.monotonic()
        remove_stale_parts(self.folder)
        self._remove_unlisted()

    def _add(self, source, status, make):
        digest = digest_of(source)
        entry = self.entries.get(self._key(source))
        array = self._view(entry) if entry and entry.digest == digest else None
        if array is None:
            array = np.ascontiguousarray(make(source), self.dtype)
            entry = self._append(array, digest, status)
        if status_of(source) != status:  # array and digest may be of different contents
            raise UserError(f"{source}: changed while it was used; start again")
        self.entries[self._key(source)] = entry._replace(status=status)
        self.changed = True
        if time.monotonic() - self.published >= PUBLISH_EVERY:
            self._publish()
        return array

    def _append(self, array, digest, status):
        """Write an array to the pack of this process and return its entry."""
        with self._writing():
            if self.file is None:
                self.file = (self.folder / f"{self.kind}.{secrets.token_hex(4)}.pack").open("xb", buffering=0)
                self.end = 0
            offset = -(-self.end // ALIGNMENT) * ALIGNMENT
            try:
                self.file.seek(offset)
                rest = memoryview(array).cast("B")
                while rest:
                    rest = rest[self.file.write(rest):]
            except OSError:
                with suppress(OSError):
                    self.file.truncate(self.end)  # on a full disk this makes room for the index
                raise
        self.end = offset + array.nbytes
        return Entry(Path(self.file.name).name, offset, array.shape, digest, status)

    def _publish(self):
        with self._writing():
            if self.file:
                os.fsync(self.file.fileno())
        content = json.dumps(self.entries, separators=(",", ":")).encode()
        atomic_write(self.index, b"%08x\n" % zlib.crc32(content) + content)
        self.changed, self.published = False, time.monotonic()

    def _finish(self, complete):
        try:
            if self.changed and complete:
                self._publish()
                self._remove_unlisted()
                self._compact()
            elif self.changed:
                with suppress(UserError):  # the error that ended the build is the one to report
                    self._publish()
        finally:
            if self.file:
                self.file.close()
            self.lock.close()
            self.lock = self.file = None

    def _compact(self):
        """Copy all arrays to a new pack if there are many packs, or if more than half of them is unused."""
        sizes = [path.stat().st_size for path in self._packs()]
        used = sum(-(-self._size(entry) // ALIGNMENT) * ALIGNMENT for entry in self.entries.values())
        if len(sizes) <= MAX_PACKS and sum(sizes) <= 2 * used:
            return
        before = self.entries
        if self.file:
            self.file.close()
            self.file = None
        try:
            arrays = ((name, entry, self._view(entry)) for name, entry in before.items())
            self.entries = {name: self._append(array, entry.digest, entry.status)
                            for name, entry, array in arrays if array is not None}
            self._publish()
        except UserError:  # no space for a second copy: the old packs remain in use
            self.entries = before
        self._remove_unlisted()

    def _remove_unlisted(self):
        listed = {entry.pack for entry in self.entries.values()}
        for path in self._packs():
            if path.name not in listed:
                self.maps.pop(path.name, None)
                with suppress(OSError):  # Windows cannot delete a mapped file
                    path.unlink()

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.index}: cannot write the cache ({reason_of(error)}); make space there, give another "
                            "--dir_cache, or train without a cache (--ext img)") from None


def status_of(source: Path) -> tuple:
    """Return the size, times and inode of a file, which differ where it may have changed; raises UserError.

    Size and modification time are not enough: `cp -p`, rsync and archives set the time of a replaced file to an old one. No
    program can set the change time (ctime), and a file that is renamed into place has another inode. Since both also differ
    in a mere copy of a dataset, a digest of the content decides where they do.
    """
    try:
        status = source.stat()
    except OSError as error:  # such as a dangling symbolic link
        raise UserError(f"{source}: cannot be read ({reason_of(error)}); repair or remove it") from None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def digest_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits; raises UserError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); repair or remove it") from None
    return digest.hexdigest()


def cache_folder(dataset: Path, dir_cache: str, fallback: Path) -> Path:
    """Return the folder of a dataset's cache.

    It is in the folder of the dataset, or under `dir_cache` if that is not empty, or else under `fallback` where the
    dataset is read-only.
    """
    dataset = dataset.resolve()
    if not dir_cache:
        inside = dataset / "bin"
        if _writable(inside if inside.exists() else dataset):
            return inside
    name = f"{dataset.name}-{hashlib.sha256(os.fsencode(dataset)).hexdigest()[:8]}"
    return Path(dir_cache or fallback).resolve() / name


def _writable(folder):
    """Return whether a folder has a write permission; os.access alone is true for root whatever the permissions are."""
    return bool(folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)) and os.access(folder, os.W_OK)
