"""Handles signals that ask the process to end, so that it can save first; a second SIGINT or SIGTERM ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM)
# Batch systems send the first three before a time limit; a closing terminal sends SIGHUP.
WARNING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
SAME_SIGNAL_SECONDS = 0.1  # two signals closer than this are treated as one


def handled() -> list[signal.Signals]:
    """Returns the signals to handle; SIGHUP only if `nohup` did not make the process ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signum for signum in ENDING + WARNING if not (ignored and signum == signal.SIGHUP)]


class Interrupted(KeyboardInterrupt):
    """Raised when a signal ended the work early; everything is saved, and the same command resumes."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """A request to save and stop: the number of the signal that ends the process, 0 before any."""

    signum: int = 0

    def note(self, signum: int) -> None:
        """Notes a signal; a warning does not replace one that has been noted."""
        if signum in ENDING or not self.signum:
            self.signum = signum


@contextmanager
def noted_signals() -> Iterator[Stop]:
    """Records signals in the `Stop` it yields; a second SIGINT or SIGTERM ends the process at once.

    Python runs no handlers while the main thread waits for a segment, so a thread reads the numbers of signals as they arrive.
    """
    stop = Stop()

    def note(signum: int, frame: object) -> None:
        stop.note(signum)
        if signum == signal.SIGHUP:
            _leave_closed_terminal()

    try:
        before = {s: signal.signal(s, note) for s in handled()}
    except ValueError:  # only the main thread may handle signals
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_end_at_second, args=(reader, stop), daemon=True)
    watcher.start()
    woken = signal.set_wakeup_fd(writer)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(woken)
        for s, handler in before.items():
            signal.signal(s, handler)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)


def _leave_closed_terminal() -> None:
    """Sends output to /dev/null if the terminal is gone, since printing would raise."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _end_at_second(reader: int, stop: Stop) -> None:
    first = 0.0
    while number := os.read(reader, 1)[0]:
        if number in ENDING + WARNING:
            stop.note(number)
        if number in ENDING:
            first = first or time.monotonic()
            # A batch system may send one signal twice: directly, and through a process that watches this one.
            if time.monotonic() - first > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)
