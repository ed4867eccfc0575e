"""Decoded images on disk: each source file once, as an .npy that is memory-mapped, so that a crop reads its own bytes.

The name of an entry holds the size and time of its source: a changed source has no entry, and the outdated one is removed.
"""
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
from system.errors import UserError


class Cache:
    """Entries under `folder`, or read anew each time where folder is None."""

    def __init__(self, folder):
        self.folder = folder

    def get(self, source, kind, decode):
        """decode(source) -> array, kept as `kind`/name; returns it, memory-mapped where there is a cache."""
        if self.folder is None:
            return decode(source)
        entry = self.entry(source, kind)
        try:
            return np.load(entry, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # not there yet, or not whole: made by a run that a full disk ended
            pass
        array = decode(source)
        part = entry.with_name(f".{entry.name}.{os.getpid()}.part")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            for outdated in entry.parent.glob(f"{_literal(source.name)}.*-*.npy"):
                outdated.unlink(missing_ok=True)
            with part.open("wb") as file:
                np.save(file, array)
            os.replace(part, entry)
        except OSError as error:
            raise UserError(f"{entry}: cannot write the cache ({error.strerror or error}); give another --dir_cache, or "
                            "--ext img to do without") from None
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return np.load(entry, mmap_mode="r")

    def entry(self, source, kind):
        try:
            status = source.stat()
        except OSError as error:  # a link that leads nowhere
            raise UserError(f"{source}: cannot be read ({error.strerror}); repair or remove it") from None
        return self.folder / kind / f"{source.name}.{status.st_size}-{status.st_mtime_ns}.npy"


def cache_folder(dataset, dir_cache, fallback):
    """Where the cache of the dataset folder is: in it, or under dir_cache where one is given, or else under `fallback`
    where the dataset is read-only."""
    dataset = dataset.resolve()
    if not dir_cache:
        beside = dataset / "bin"
        if _writable(beside if beside.exists() else dataset):
            return beside
    name = f"{dataset.name}-{hashlib.sha256(str(dataset).encode()).hexdigest()[:8]}"
    return Path(dir_cache or fallback).resolve() / name


def _writable(folder):
    """os.access says yes to root whatever the permissions: a folder without a write bit was meant to stay as it is."""
    return bool(folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)) and os.access(folder, os.W_OK)


def _literal(name):
    """The name with glob's special characters disarmed."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
