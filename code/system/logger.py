"""The log: one logger, whose lines go to the terminal past any progress bar, and to the log file of a run."""
import logging
import sys
from logging.handlers import MemoryHandler

from tqdm import tqdm

from system.errors import is_rank_zero

log = logging.getLogger("sr")


def start_logging():
    """Sends the log to the terminal, past any progress bar, and keeps it for the file of `log_to`."""
    log.setLevel(logging.INFO if is_rank_zero() else logging.CRITICAL)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.addHandler(_Terminal())
    log.addHandler(MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def log_to(path):
    """Appends the log to a file as well, from what was said before the file was there."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for handler in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
        handler.setTarget(file)
        handler.flush()
        log.removeHandler(handler)
    log.addHandler(file)


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
