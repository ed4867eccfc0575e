"""Signals that end a run in order."""
import signal
import time


class Interruption:
    """Within it SIGINT, SIGTERM and SIGHUP only set `status` (130, 143, 129), for the loop to save and end.

    A second signal ends the process at once, unless it arrives within PAUSE seconds: torchrun passes on to its processes
    what the terminal sent them already. A SIGHUP that is ignored (nohup) stays ignored.
    """

    PAUSE = 1  # second
    NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __enter__(self):
        self.status, self.received = 0, 0.0
        self.before = {number: signal.signal(number, self.handle) for number in self.NUMBERS
                       if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def handle(self, number, frame):
        """Note the first signal and pass on a later one to the handler that was there before."""
        now = time.monotonic()
        if not self.status:
            self.status, self.received = 128 + number, now
        elif now - self.received > self.PAUSE:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
