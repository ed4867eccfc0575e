"""Errors for users: one line on stderr that says what is wrong, where, and what to do, and exit status 2; no traceback."""
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOST_CONNECTION_WAIT = 10  # seconds
LOST_CONNECTION = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL"


class UserError(Exception):
    """A mistake of the user's, or a limit of his machine: what is wrong, where, and what to do about it, in one line."""

    def __init__(self, message: str):
        text = str(message)
        if text.startswith("Caught "):  # from a DataLoader's worker, which sends its traceback
            text = text.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(text.splitlines()))


def is_distributed() -> bool:
    """Return whether this process was started as one of several, by torchrun or --n_GPUs."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_rank_zero() -> bool:
    """Return whether this process writes files and logs: the only one, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def reason_of(error: BaseException) -> str:
    """Return the operating system's reason of an OSError, or the first line of another exception's text."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError raised in the body into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({reason_of(error)}); make space there, or give another folder") from None


def run(main: Callable[[], int]) -> None:
    """Run `main()` of an entry script and exit with its status."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:  # before training has its own handler, or a second Ctrl-C
        sys.exit(130)
    except RuntimeError as error:
        if is_distributed() and any(words in str(error) for words in LOST_CONNECTION):
            time.sleep(LOST_CONNECTION_WAIT)  # the rank that ended reports why; torchrun then ends this one
            sys.exit(1)
        if not str(error).startswith("DataLoader worker"):  # raised by a signal handler of PyTorch's, anywhere
            raise
        sys.exit(fail("a process that loads training data was killed, most likely for lack of memory; continue with "
                      "--resume 1 and fewer --n_threads"))


def fail(error: Exception | str) -> int:
    """Print an error's line to stderr and return the exit status, 2."""
    print(f"error: {error}", file=sys.stderr)
    return 2
