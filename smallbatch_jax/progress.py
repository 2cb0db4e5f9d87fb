"""What the terminal shows while a grid trains: a live line, or now and then a plain one where nobody watches."""

import sys
import time
from dataclasses import dataclass, field
from typing import Protocol, TextIO


@dataclass
class Status:
    """How far a grid has come."""

    runs: int  # in the whole grid
    images: int  # training images that the grid will need, less those of runs that ended early
    started: float  # time.monotonic()
    finished: int = 0
    diverged: int = 0
    running: int = 0
    trained: int = 0  # images trained by this process
    best: float = field(default=float("nan"))  # highest last-epoch test accuracy of this process, a fraction
    images_per_second: float = 0.0  # smoothed

    @property
    def done(self) -> int:
        return self.finished + self.diverged

    def add_run(self, diverged: bool, test_accuracy: float = float("nan")) -> None:
        """Counts a run that ended."""
        self.diverged += diverged
        self.finished += not diverged
        if test_accuracy > self.best or self.best != self.best:
            self.best = test_accuracy

    def add_images(self, images: int, seconds: float) -> None:
        """Counts a segment's images."""
        self.trained += images
        rate = images / max(seconds, 1e-9)
        self.images_per_second = 0.8 * self.images_per_second + 0.2 * rate if self.images_per_second else rate

    def line(self) -> str:
        """One line: runs done, running and diverged, images/s, time left."""
        left = (self.images - self.trained) / self.images_per_second if self.images_per_second else float("nan")
        best = f", best {100 * self.best:.1f} %" if self.best == self.best else ""
        return (
            f"{self.done}/{self.runs} runs done ({self.diverged} diverged), {self.running} running{best}, "
            f"{self.images_per_second:,.0f} images/s, {duration(left)} left"
        )


class Progress(Protocol):
    def show(self, status: Status, doing: str) -> None:
        """Called after every segment."""

    def close(self, status: Status) -> None:
        """Called once, when all is done."""


class NoProgress:
    """Says nothing."""

    def show(self, status: Status, doing: str) -> None: ...

    def close(self, status: Status) -> None: ...


class PlainProgress:
    """A line at a time, at most one in `every_seconds`, and one at the end."""

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 10.0):
        self._stream, self._every = stream or sys.stderr, every_seconds
        self._last = -every_seconds

    def show(self, status: Status, doing: str) -> None:
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            print(f"{doing}: {status.line()}", file=self._stream, flush=True)

    def close(self, status: Status) -> None:
        print(_ending(status), file=self._stream, flush=True)


class LiveProgress:
    """A bar that stays in place, for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=None, line="")
        self._bar.start()

    def show(self, status: Status, doing: str) -> None:
        self._bar.update(self._task, description=doing, total=status.images, completed=status.trained, line=status.line())

    def close(self, status: Status) -> None:
        self._bar.stop()
        print(_ending(status), file=sys.stderr, flush=True)


def for_stream(stream: TextIO | None = None) -> Progress:
    """The live bar on a terminal, plain lines elsewhere."""
    watched = stream if stream is not None else sys.stderr
    return LiveProgress() if watched.isatty() else PlainProgress(watched)


def _ending(status: Status) -> str:
    return (
        f"{status.done}/{status.runs} runs done ({status.diverged} diverged), {status.trained:,} images trained in "
        f"{duration(time.monotonic() - status.started)}"
    )


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min; ? if not known."""
    if seconds != seconds:
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
