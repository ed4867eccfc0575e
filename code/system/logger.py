"""The log: one logger, whose lines go to the terminal past any progress bar, and to the log file of a run."""
import logging
import os
import sys
from contextlib import suppress
from logging.handlers import MemoryHandler

from tqdm import tqdm

from system.errors import is_rank_zero, reason_of

log = logging.getLogger("sr")


def start_logging():
    """Sends the log to the terminal, past any progress bar, and keeps it for the file of `log_to`."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file to be opened would get its number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), _Stream):
            setattr(sys, name, _Stream(getattr(sys, name)))
    log.setLevel(logging.INFO if is_rank_zero() else logging.CRITICAL)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        with suppress(OSError):  # what a full disk has kept out of the file
            handler.close()
    log.addHandler(_Terminal())
    log.addHandler(MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def log_to(path):
    """Appends the log to a file as well, from what was said before the file was there."""
    file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for handler in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
        handler.setTarget(file)
        handler.flush()
        log.removeHandler(handler)
    log.addHandler(file)


class _Stream:
    """stdout or stderr, of which a failed write is no error: a closed pipe or a lost terminal does not end a run.

    After a failed write the stream goes to os.devnull. So it does if the process was started without it (`>&-`).
    """

    def __init__(self, stream):
        self.stream = stream
        if stream is None:
            self._discard()
        elif hasattr(stream, "reconfigure"):  # an ASCII terminal shows the names of files as it can
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
            os.dup2(self.stream.fileno(), failed.fileno())  # for what it still holds, and for libraries

    def __getattr__(self, name):
        return getattr(self.stream, name)


class _LogFile(logging.FileHandler):
    """log.txt; what cannot be written to it, on a full disk, is said once and ends nothing."""
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


def log_failure(error):
    """Writes the error that ends a run to its log file; the terminal gets it from `errors.run`."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "error: %s", (error,), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)
