"""A user's mistake is answered with one line on stderr and exit status 2, never with a traceback."""
import os
import sys
import time
from contextlib import contextmanager

LAST_WORD = 10  # seconds
LOST = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL"  # another process, by what was said


def is_one_of_several():
    """Whether this process was started as one of several, by torchrun or --n_GPUs."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main():
    """Whether this process is the one that writes and speaks, of several that torchrun started or alone."""
    return os.environ.get("RANK", "0") == "0"


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line."""

    def __init__(self, message):
        text = str(message)
        if text.startswith("Caught "):  # from a DataLoader's worker, in its traceback
            text = text.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(text.splitlines()))


@contextmanager
def writing(path):
    """Makes an OSError in it a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error}); free the place or give another folder") from None


def run(main):
    """Runs `main()` of an entry script and exits with its status."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:  # before training has its own handler, or a second Ctrl-C
        sys.exit(130)
    except RuntimeError as error:
        if is_one_of_several() and any(words in str(error) for words in LOST):
            time.sleep(LAST_WORD)  # the process that ended says why; torchrun, which then ends this one, reports the first
            sys.exit(1)
        if not str(error).startswith("DataLoader worker"):  # raised by a signal handler of PyTorch's, anywhere
            raise
        sys.exit(fail("a process that loads training data was killed, most likely for want of memory; go on with --resume 1 "
                      "and fewer --n_threads"))


def fail(error):
    print(f"error: {error}", file=sys.stderr)
    return 2
