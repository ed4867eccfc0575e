"""Signal handlers with which a run ends in order: it saves its state first."""
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from system.errors import run


class Interruption:
    """A context in which SIGINT, SIGTERM and SIGHUP set `status` to 130, 143 or 129, after which the loop saves and ends.

    A second signal ends the process at once, unless it arrives within PAUSE seconds: torchrun forwards to its processes
    the signals that the terminal has already sent them. A SIGHUP that is ignored (nohup) stays ignored.
    """

    PAUSE = 1  # second
    NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __enter__(self):
        self.status, self.received = 0, 0.0
        self.before = {number: signal.signal(number, self.handle) for number in self.NUMBERS
                       if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Set `status` at the first signal, and forward a later one to the handler from before the context."""
        now = time.monotonic()
        if not self.status:
            self.status, self.received = 128 + number, now
        elif now - self.received > self.PAUSE:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], int]) -> None:
    """Run `main()` of an entry script by `errors.run`, and exit with its status.

    The first Ctrl-C raises KeyboardInterrupt, and only until `main` has ended: at any later moment, such as the
    interpreter's shutdown, it would print a traceback.
    """
    armed, status = True, 130

    def interrupt(number, frame):
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            run(main)
        except SystemExit as ending:
            status = ending.code
        armed = False
    except KeyboardInterrupt:  # after `run` had ended
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)
