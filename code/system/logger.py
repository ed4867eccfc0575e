"""Logging: one logger, which writes to the terminal, above any progress bar, and to the log file of a run."""
import logging
import os
import sys
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from system.errors import is_rank_zero, reason_of

log = logging.getLogger("sr")


def start_logging() -> None:
    """Write the log to the terminal, above any progress bar, and buffer it for the file of `log_to`."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next opened file would get its number, and the output of libraries
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), _Stream):
            setattr(sys, name, _Stream(getattr(sys, name)))
    log.setLevel(logging.INFO if is_rank_zero() else logging.CRITICAL)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        with suppress(OSError):  # closing writes what is buffered, for which a full disk has no room
            handler.close()
    log.addHandler(_Terminal())
    log.addHandler(MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def redraw_interval(seconds: float = 0.1) -> float:
    """Return the seconds between two drawings of a progress bar: `seconds` on a terminal, else 30, for files and logs."""
    return seconds if sys.stderr.isatty() else 30


def log_to(path: Path) -> None:
    """Append the log to a file as well, including the lines that `start_logging` has buffered."""
    file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for handler in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
        handler.setTarget(file)
        handler.flush()
        log.removeHandler(handler)
    log.addHandler(file)


class _Stream:
    """stdout or stderr without errors of writing: a closed pipe or a lost terminal does not end a run.

    After a failed write, and if the process was started with the stream closed (`>&-`), output goes to os.devnull.
    """

    def __init__(self, stream):
        self.stream = stream
        if stream is None:
            self._discard()
        elif hasattr(stream, "reconfigure"):  # an ASCII terminal cannot display every file name
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            self._discard()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._discard()

    def _discard(self):
        failed, self.stream = self.stream, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        with suppress(AttributeError, OSError, ValueError):
            os.dup2(self.stream.fileno(), failed.fileno())  # for what is still buffered, and for libraries

    def __getattr__(self, name):
        return getattr(self.stream, name)


class _LogFile(logging.FileHandler):
    """log.txt; a failure to write to it, on a full disk, is reported once and does not end the run."""

    failed = False

    def handleError(self, record):
        if not self.failed:
            self.failed = True
            tqdm.write(f"{self.baseFilename}: cannot write ({reason_of(sys.exc_info()[1])}); the run continues without it",
                       file=sys.stderr)


class _Terminal(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def log_failure(error: Exception) -> None:
    """Write the error that ends a run to its log file; `errors.run` prints it to the terminal."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "error: %s", (error,), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)
