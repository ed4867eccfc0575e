"""Signals that end a run in order."""
import signal
import time


class Interruption:
    """Within it SIGINT and SIGTERM only set `status` (130, 143), for the loop to save and end; a second one ends at once.

    A second signal within PAUSE seconds is ignored: torchrun passes on to its processes what the terminal sent them already.
    """

    PAUSE = 1  # second

    def __enter__(self):
        self.status, self.received = 0, 0.0
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
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
