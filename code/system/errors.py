"""Errors for users: one line on stderr with what is wrong, where, and what to do, and exit status 2; no traceback."""
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOST_CONNECTION_WAIT = 10  # seconds
LOST_CONNECTION = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL"
OUT_OF_MEMORY = "out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory", "ALLOC_FAILED"
# exceptions of PyTorch and of its queues where a process that loads training data was killed
LOST_WORKER = RuntimeError, OSError, EOFError, pickle.UnpicklingError, multiprocessing.ProcessError


class UserError(Exception):
    """A mistake of the user or a limit of the machine; the message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: str):
        text = str(message)
        if text.startswith("Caught "):  # raised in a DataLoader worker, whose traceback PyTorch adds
            text = text.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(text.splitlines()))


def is_distributed() -> bool:
    """Return whether this process was started as one of several, by torchrun or --n_GPUs."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_environment() -> None:
    """Raise UserError unless the variables that torchrun sets for each process fit together, or none is set."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"
    numbers = {name: os.environ[name] for name in names if name in os.environ}
    wrong = [f"{name}={value}" for name, value in numbers.items() if not re.fullmatch("[0-9]{1,9}", value)]
    if not wrong and is_distributed():
        wrong = [f"no {name}" for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
            wrong.append(f"RANK={numbers['RANK']} of WORLD_SIZE={numbers['WORLD_SIZE']}")
    elif not wrong and {"RANK", "WORLD_SIZE"} & numbers.keys():
        wrong = [f"no {name}" for name in ("RANK", "WORLD_SIZE") if name not in numbers]
    if wrong:
        raise UserError(f"environment variables of a distributed run: {', '.join(wrong)}; start it with torchrun or "
                        "--n_GPUs, or unset RANK and WORLD_SIZE")


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
    except KeyboardInterrupt:  # before the signal handler of training is installed, or a second Ctrl-C
        sys.exit(130)
    except (MemoryError, *LOST_WORKER) as error:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise again, for each worker that ends
        if is_out_of_memory(error):
            sys.exit(fail(out_of_memory_advice()))
        if is_lost_worker(error):
            kill_workers()
            more = " and more shared memory (docker run --shm-size)" if "shared memory" in str(error) else ""
            sys.exit(fail("a process that loads training data was killed, most likely for lack of memory; continue with "
                          f"--resume 1 and fewer --n_threads{more}"))
        if is_distributed() and any(words in str(error) for words in LOST_CONNECTION):
            time.sleep(LOST_CONNECTION_WAIT)  # the rank that ended reports why; torchrun then ends this one
            sys.exit(1)
        raise


def is_lost_worker(error: BaseException) -> bool:
    """Return whether an error comes from the sudden end of a DataLoader worker, and not from an exception in one."""
    if str(error).startswith("DataLoader worker"):  # raised anywhere, by PyTorch's handler of SIGCHLD
        return True
    frames = [frame.filename.replace(os.sep, "/") for frame in traceback.extract_tb(error.__traceback__)]
    modules = {file.rpartition("torch/utils/data/")[2] for file in frames if "torch/utils/data/" in file}
    return ("dataloader.py" in modules and "_utils/fetch.py" not in modules  # without workers, fetch.py reads the data
            and "in DataLoader worker process" not in str(error))


def kill_workers() -> None:
    """Kill the other workers of the DataLoader, which may wait for a lock that the killed one held."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a lack of memory, of the CPU or a GPU."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def out_of_memory_advice() -> str:
    """Return the message for a lack of memory, with the flags of the script that runs."""
    for_testing = "--chop, or a smaller --chop_mem"
    if Path(sys.argv[0]).stem == "train":
        return ("out of memory: give a larger --split_batch, or a smaller --batch_size or --patch_size; if it was while "
                f"testing, {for_testing}")
    return f"out of memory: give {for_testing}"


def fail(error: Exception | str) -> int:
    """Print an error to stderr and return the exit status, 2."""
    print(f"error: {error}", file=sys.stderr)
    return 2
