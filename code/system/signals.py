"""Signal handlers with which a run ends in order: it saves its state first."""
import signal
import time
from types import FrameType


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
