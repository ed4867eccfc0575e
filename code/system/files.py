"""Atomic writing of files, safe reading of PyTorch files, and locks of folders that one process at a time writes to."""
import io
import os
import pickle
import re
import socket
import stat
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from system.errors import UserError, is_out_of_memory, reason_of, writing

HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]  # a folder may be shared between machines
PART = re.compile(rf"\..*\.{re.escape(HOST)}\.([0-9]+)\.part")


def part_of(path: Path) -> Path:
    """Return the name of the temporary file beside `path` that this process writes before it renames it to `path`."""
    name = os.fsencode(path.name)
    if len(name) > 150:  # file names have at most 255 bytes
        name = name[:140] + b"%010d" % zlib.crc32(name)
    return path.with_name(f".{os.fsdecode(name)}.{HOST}.{os.getpid()}.part")


@contextmanager
def atomic_path(path: Path | str, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the body succeeds; else remove it.

    After a crash either the old file or the complete new one is there. `sync` waits until the data are on the disk, so that
    this holds for a power failure too. Raises UserError, with the path and the reason, where the disk is full or read-only.
    """
    path = Path(path)
    part = part_of(path)
    try:
        with writing(path):
            yield part
            if sync:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


def atomic_write(path: Path | str, data: bytes | memoryview) -> None:
    """Write bytes to `path` by way of a temporary file; raises UserError."""
    with atomic_path(path) as part:
        part.write_bytes(data)


def atomic_save(content: object, path: Path | str) -> None:
    """Serialise `content` with torch.save to `path` by way of a temporary file; raises UserError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getbuffer())


def file_size(path: Path | str) -> int:
    """Return the size of a regular file in bytes; raises UserError if it is no regular file or cannot be opened."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # opening a named pipe would wait forever
            raise UserError(f"{path}: it is {'a folder' if stat.S_ISDIR(about.st_mode) else 'a device or pipe'}, not a file")
        with open(path, "rb"):
            return about.st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read ({reason_of(error)})") from None


def load_torch_file(path: Path | str) -> object:
    """Return what torch.save wrote to `path`, with its tensors on the CPU, without ever unpickling code.

    Raises UserError where the file is missing, cannot be read, is damaged, or holds anything but tensors, numbers, strings
    and containers of those. PyTorch does not compare the checksums of its zip archives, which is done here; files from
    before PyTorch 1.6 have none.
    """
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # as PyTorch decides
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > size:
                    raise UserError(f"{path}: compressed, which torch.save does not do; fetch it again")
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path}: damaged ({damaged} does not match its checksum); fetch or copy it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error that follows is reported
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot read ({reason_of(error)})") from None
    except pickle.UnpicklingError:  # its text advises weights_only=False, which would run the file's code
        raise UserError(f"{path}: no PyTorch file, or one that holds code beside weights") from None
    except Exception as error:  # a damaged file can cause any exception, few with a useful message
        if is_out_of_memory(error):
            raise UserError(f"{path}: there is not enough memory to read its {size:,} bytes, or it is damaged") from None
        raise UserError(f"{path}: damaged, or no PyTorch file ({size:,} bytes); fetch or copy it again") from None


def remove_stale_parts(folder: Path) -> None:
    """Remove the temporary files that processes of this machine left in the folder when they were killed (SIGKILL)."""
    with suppress(OSError):
        for file in os.scandir(folder):
            match = PART.fullmatch(file.name)
            if match and not _is_running(int(match[1])):
                with suppress(OSError):
                    os.unlink(file.path)


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # a process of another user, or a number too large for a process
        return True
    return True


def lock(path: Path, message: str, wait: bool = False) -> io.IOBase:
    """Open a file with an exclusive lock, which ends when the file is closed, at the latest with the process.

    Raises UserError with `message` if another process holds the lock, unless `wait` is set. On a file system without locks
    the file is not locked.
    """
    file = path.open("w")
    try:
        import fcntl  # noqa: PLC0415 - not available on Windows
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise UserError(message) from None
    except (ImportError, OSError):
        pass
    _locks.add(file)
    return file


def _close_locks():
    """Close the locks that a DataLoader worker inherits, which would otherwise outlive a main process that is killed."""
    for file in _locks:
        file.close()


_locks = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)
