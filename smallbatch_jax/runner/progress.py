"""Progress displays of a grid: live bars on a terminal, occasional plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO, runtime_checkable

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.config.text import duration
from smallbatch_jax.store.results import ProgramResults

SMOOTHING = 0.2  # weight of the last segment in the images/s that are shown


def title(batch_size: int, bn_batch_size: int) -> str:
    """Returns a program's name for the user, such as "m = 8, BN batch 4"."""
    return f"m = {batch_size}" + (f", BN batch {bn_batch_size}" if bn_batch_size != batch_size else "")


@dataclass
class RunCounts:
    """Progress of the runs of one program, or of the whole grid."""

    runs: int = 0
    images: int = 0  # training images needed, not counting runs that ended early
    finished: int = 0
    diverged: int = 0
    trained: int = 0  # images trained by this process
    best: float = math.nan  # final metric of the best run that ended (§3.1)
    metric: Metric = ACCURACY

    @property
    def done(self) -> int:
        return self.finished + self.diverged

    def add_run(self, diverged: bool, value: float = math.nan, metric: Metric = ACCURACY) -> None:
        """Counts a run that ended, with its final metric."""
        self.diverged += diverged
        self.finished += not diverged
        self.note(value, metric)

    def note(self, value: float, metric: Metric) -> None:
        """Keeps a run's final metric if it is the best so far."""
        if metric.gain(value, self.best) > 0 or math.isnan(self.best):
            self.best, self.metric = value, metric

    def add_program(self, goals: Mapping[Run, int], stored: ProgramResults, num_examples: int) -> None:
        """Adds the runs of a program, each with the epochs it trains to; some may be complete already."""
        for run, epochs in goals.items():
            self.runs += 1
            if stored.complete(run, epochs):
                self.add_run(stored.diverged(run), stored.final(run), stored.metric)
            else:
                self.images += epochs * num_examples

    def counts(self) -> str:
        """Returns the runs done and diverged, and the best metric so far, as text."""
        best = "" if math.isnan(self.best) else f", best run {self.metric.show(self.best)}"
        return f"{self.done}/{self.runs} runs done ({self.diverged} diverged){best}"


@dataclass
class ProgramStatus(RunCounts):
    """Progress of the program in training."""

    lanes: int = 0
    seconds: float = 0.0  # total time of its segments
    segments: int = 0

    @property
    def rate(self) -> float:
        """Images/s since it began, NaN before its first segment."""
        return self.trained / self.seconds if self.trained else math.nan


@dataclass
class Status(RunCounts):
    """Progress of a grid, and of the program in training."""

    started: float = field(default_factory=time.monotonic)
    running: int = 0  # lanes with a run
    images_per_second: float = 0.0  # smoothed
    program: ProgramStatus | None = None  # None before the first, or if several train at once
    later_seconds: float = 0.0  # expected time of later programs

    def begin(self, program: ProgramStatus) -> None:
        """Shows this program from now on."""
        self.program, self.images_per_second, self.running = program, 0.0, 0

    def end_run(self, diverged: bool, value: float, metric: Metric = ACCURACY) -> None:
        """Counts a run of the present program that ended."""
        for counts in self._all():
            counts.add_run(diverged, value, metric)

    def spare(self, images: int) -> None:
        """Subtracts images that need not be trained after all."""
        for counts in self._all():
            counts.images -= images

    def add_images(self, images: int, seconds: float) -> None:
        """Counts the images of a segment."""
        for counts in self._all():
            counts.trained += images
        rate = images / max(seconds, 1e-9)
        known = self.images_per_second
        if self.program:
            self.program.seconds += seconds
            self.program.segments += 1
            known *= self.program.segments > 2  # the first also includes one-time work
        self.images_per_second = (1 - SMOOTHING) * known + SMOOTHING * rate if known else rate

    def _all(self) -> list[RunCounts]:
        return [self, self.program] if self.program else [self]

    @property
    def program_seconds(self) -> float:
        """Time left for the present program; NaN before its second segment."""
        counts = self.program or self
        known = self.images_per_second and (self.program is None or self.program.segments > 1)
        return (counts.images - counts.trained) / self.images_per_second if known else math.nan

    @property
    def seconds(self) -> float:
        """Time left for the grid; NaN before the second segment of a program."""
        return self.program_seconds + self.later_seconds

    def line(self) -> str:
        """Returns one line: the program's lanes, speed and time left, then the grid's runs and time left."""
        grid = f"{self.counts()}, {duration(self.seconds)} left"
        if self.program is None:
            return f"{self.running} running, {self.images_per_second:,.0f} images/s; {grid}"
        return f"{self.program_line()}, {duration(self.program_seconds)} left; grid: {grid}"

    def program_line(self) -> str:
        """Returns the present program's busy lanes, images/s and runs done; empty without a program."""
        if self.program is None:
            return ""
        lanes = f"{self.running} of {self.program.lanes} lanes at work" if self.running else "ending"
        return f"{lanes}, {self.images_per_second:,.0f} images/s, {self.program.counts()}"


@runtime_checkable
class Progress(Protocol):
    """Display of a grid's progress."""

    def show(self, status: Status, doing: str) -> None:
        """Called after every segment."""

    def close(self, status: Status) -> None:
        """Called once, when no more segments will come."""


class NoProgress(Progress):
    """Progress display that shows nothing."""


class PlainProgress:
    """Lines of a log: one when each program has begun to train, at most one in `every_seconds`, and one at the end."""

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 60.0):
        self._stream, self._every = stream or sys.stderr, every_seconds
        self._last, self._doing = -math.inf, ""

    def show(self, status: Status, doing: str) -> None:
        early = status.program is not None and status.program.segments == 1  # its time left is unknown so far
        if (doing != self._doing and not early) or time.monotonic() - self._last >= self._every:
            self._last, self._doing = time.monotonic(), doing
            print(f"{doing}: {status.line()}" if status.trained else doing, file=self._stream, flush=True)

    def close(self, status: Status) -> None:
        print(_ending(status), file=self._stream, flush=True)


class LiveProgress:
    """Two bars that stay in place on a terminal: the program that trains, and the whole grid."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=6)),
            BarColumn(bar_width=16, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True, ratio=1)),  # truncated on narrow terminals
        )
        self._bars = Bars(*columns, console=console or Console(stderr=True), transient=True, expand=True)
        self._program = self._bars.add_task("", total=None, left="", line="", visible=False)
        self._grid = self._bars.add_task("grid", total=None, left="", line="")
        self._bars.start()

    def show(self, status: Status, doing: str) -> None:
        line = f"{doing}: {status.counts()}"
        if status.program is not None:
            self._bars.update(self._program, description=doing, visible=True)
            self._update(self._program, status.program, f"{duration(status.program_seconds)} left", status.program_line())
            line = status.counts()
        self._update(self._grid, status, f"{duration(status.seconds)} left" if status.trained else "", line)

    def _update(self, bar: Any, counts: RunCounts, left: str, line: str) -> None:
        self._bars.update(bar, total=max(counts.images, 1), completed=counts.trained, left=left, line=line)

    def close(self, status: Status) -> None:
        self._bars.stop()
        print(_ending(status), file=sys.stderr, flush=True)


def for_stream() -> Progress:
    """Returns live bars if stderr is a terminal, otherwise plain lines."""
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


def _ending(status: Status) -> str:
    return f"{status.counts()}; {status.trained:,} images trained in {duration(time.monotonic() - status.started)}"
