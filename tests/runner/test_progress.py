"""Progress of a grid on the terminal and in a log."""

import io
import math
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from rich.console import Console

from smallbatch_jax.config.experiment import Run
from smallbatch_jax.runner import progress
from smallbatch_jax.runner.planning import Forecast
from smallbatch_jax.runner.progress import LiveProgress, NoProgress, PlainProgress, ProgramStatus, Status


def training():
    """Returns a status: 13 of 65 runs, m = 8; two diverged, one finished, 1,000 images/s after a slow first segment."""
    status = Status(runs=65, images=65_000)
    status.begin(ProgramStatus(13, 13_000, lanes=14))
    status.end_run(True, math.nan)
    status.end_run(True, math.nan)
    status.spare(1500)
    status.end_run(False, 0.9)
    status.add_images(500, 2.0)
    status.add_images(1500, 1.5)
    status.running = 10
    status.later_seconds = 50.0
    return status


def test_the_status_line_shows_the_program_and_the_grid():
    assert training().line() == (
        "10 of 14 lanes at work, 1,000 images/s, 3/13 runs done (2 diverged), best run 90.0 %, 10 s left; "
        "grid: 3/65 runs done (2 diverged), best run 90.0 %, 1 min 00 s left"
    )


def test_a_new_program_resets_its_own_counts_and_keeps_those_of_the_grid():
    status = training()
    status.begin(ProgramStatus(13, 13_000, lanes=14))
    assert math.isnan(status.program_seconds)
    assert "0 images/s, 0/13 runs done (0 diverged), ? left; grid: 3/65 runs done" in status.line()
    status.end_run(False, 0.8)
    assert (status.program.best, status.best) == (0.8, 0.9)


def test_the_speed_is_smoothed_and_the_rate_is_not():
    status = training()
    status.add_images(2000, 1.0)
    assert status.images_per_second == pytest.approx(1200)
    assert status.program.rate == pytest.approx(4000 / 4.5)


def test_several_programs_at_once_have_one_line():
    status = Status(runs=9, images=1350, running=3, trained=150, images_per_second=15.0)
    assert status.line() == "3 running, 15 images/s; 0/9 runs done (0 diverged), 1 min 20 s left"


def test_a_log_has_a_line_for_each_program_and_then_only_now_and_then(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream, status = io.StringIO(), training()
    log = PlainProgress(stream)
    log.show(Status(65, 65_000), "compiling m = 8")
    for now in (1.0, 30.0, 60.5, 61.0, 62.0):
        log.show(status, "m = 8" if now < 62 else "m = 16")
    status.started = -3.0
    log.close(status)
    lines = stream.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["compiling m = 8", "m = 8", "m = 8", "m = 16"]
    assert lines[0] == "compiling m = 8"
    assert lines[-1] == "3/65 runs done (2 diverged), best run 90.0 %; 2,000 images trained in 1 min 05 s"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_a_bar_of_the_program_and_one_of_the_grid(width):
    live = LiveProgress(Console(file=io.StringIO()))
    live.show(Status(65, 65_000), "compiling m = 8, program 1 of 5")
    live.show(training(), "m = 8")
    live._bars.stop()
    screen = Console(file=io.StringIO(), width=width)
    screen.print(live._bars.get_renderable())
    program, grid = screen.file.getvalue().splitlines()
    assert re.match(r"m = 8 +━+╸? +10 s left +10 of 14 lanes at work", program)
    assert re.match(r"grid +[━╸]+ +1 min 00 s left +3/65 runs done", grid)
    assert ("3/13 runs done (2 diverged)" in program) == (width == 120)  # cut where there is no room


@dataclass
class FakeJob:
    """A program of 100 images and 2 epochs; `lost` are the rates that diverged."""

    batch_size: int
    base_lrs: tuple = (0.1, 0.2, 0.4)
    lost: set = field(default_factory=set)
    done: tuple = ()
    num_examples: int = 100
    experiment: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(epochs=2))

    @property
    def runs(self):
        return [Run(self.batch_size, self.batch_size, base_lr, 0) for base_lr in self.base_lrs]

    @property
    def results(self):
        return SimpleNamespace(diverged=lambda run: run.base_lr in self.lost)

    def pending(self):
        return [run for run in self.runs if run.base_lr not in (*self.done, *self.lost)]


def later(jobs, *trained):
    """Returns the expected seconds of later programs, given the images per second that the first ones trained."""
    found, status = Forecast(NoProgress(), jobs), Status(9, 1800)
    for place, images in enumerate(trained or (0,)):
        status.begin(ProgramStatus(3, 600))
        found.begin(jobs[place], jobs[place + 1 :])
        if images:
            status.add_images(images, 1.0)
        found.show(status, "m = 2")
    return status.later_seconds


def test_programs_to_come_are_expected_at_the_rates_measured_so_far():
    jobs = [FakeJob(2), FakeJob(8), FakeJob(32)]
    assert later(jobs, 100) == pytest.approx(2 * 600 / 100)
    assert math.isnan(later(jobs))


def test_rates_are_interpolated_between_batch_sizes():
    jobs = [FakeJob(8), FakeJob(32), FakeJob(16)]
    assert later(jobs, 100, 1600) == pytest.approx(600 / 400)


def test_a_rate_that_diverged_at_a_smaller_batch_is_expected_to_again():
    jobs = [FakeJob(8, lost={0.4}), FakeJob(32), FakeJob(4)]
    assert later(jobs, 100) == pytest.approx(400 / 100 + 600 / 100)


def test_runs_that_have_ended_take_no_time():
    jobs = [FakeJob(8), FakeJob(32, done=(0.1, 0.2))]
    assert later(jobs, 100) == pytest.approx(200 / 100)
