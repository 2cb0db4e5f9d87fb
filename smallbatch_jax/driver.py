"""Trains a grid: the experiment's programs one after the other, into a workdir, until all runs are there."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path

import jax
from jax.sharding import Mesh

from smallbatch_jax import lanes
from smallbatch_jax.checkpoint import Checkpoints
from smallbatch_jax.data import Dataset
from smallbatch_jax.experiment import Experiment, programs
from smallbatch_jax.feeder import Feeder, Interrupted, Job, ModelOf, Stop
from smallbatch_jax.lanes import DeviceData, LaneProgram
from smallbatch_jax.models import create_model
from smallbatch_jax.progress import Progress, Status
from smallbatch_jax.results import ProgramResults, Timings
from smallbatch_jax.workdir import open_workdir, record_provenance, surroundings

__all__ = ["Interrupted", "train_grid", "use_all_cores"]


def use_all_cores() -> None:
    """One JAX device per CPU core this process may use; to be called before JAX does anything.

    XLA:CPU gains little from running one small operation on many cores, much from running many lanes at once.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return  # the user's choice
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def train_grid(
    experiment: Experiment, workdir: Path, dataset: Dataset, progress: Progress, model_of: ModelOf | None = None
) -> None:
    """Trains every run of the experiment that `workdir` does not hold yet, program by program.

    Args:
      experiment: what to train.
      workdir: made if it is not there; resumed if it holds this experiment.
      dataset: the experiment's data, already loaded.
      progress: told after every segment.
      model_of: the model for a BN batch size; None makes the experiment's own.

    Raises:
      InputError: if the grid does not fit the data or the workdir is not this experiment's; nothing is written then.
      Interrupted: on SIGINT or SIGTERM, after the segment at work ended and all lanes were saved.
    """
    experiment.require_examples(len(dataset.train_labels))
    facts = {"num_classes": dataset.num_classes, "examples": [len(dataset.train_labels), len(dataset.test_labels)]}
    with open_workdir(workdir, experiment, facts) as folder, _signals() as stop:
        timings = Timings(folder)
        mesh = lanes.lane_mesh()
        device = {"kind": mesh.devices.flat[0].device_kind, "platform": jax.default_backend(), "count": mesh.size}
        record_provenance(folder, "start", **surroundings(), device=device, precision=experiment.precision)
        data = lanes.to_device(dataset, mesh)
        model_of = model_of or _named_model(experiment, dataset)
        initial = lanes.initialiser(model_of(None), data)
        status = Status(len(experiment.runs()), _images(experiment, dataset), time.monotonic())
        try:
            with ExitStack() as stack:
                jobs = [
                    Job(experiment, dataset, model_of, m, b, runs, stack.enter_context(ProgramResults(folder, m, b)))
                    for (m, b), runs in programs(experiment.runs()).items()
                ]
                for job in jobs:
                    job.count_complete(status)
                progress.show(status, "compiling")
                for job, program in _compiled_ahead([job for job in jobs if job.pending()], data, mesh, timings):
                    checkpoints = Checkpoints(folder / "checkpoints" / job.name)
                    Feeder(job, program, initial, checkpoints, status, progress, timings, stop).train()
                    checkpoints.delete()
        finally:
            progress.close(status)
        record_provenance(folder, "finish", finished=status.finished, diverged=status.diverged)


def _images(experiment: Experiment, dataset: Dataset) -> int:
    """Training images of the whole grid, every run trained to its end."""
    return len(experiment.runs()) * experiment.epochs * len(dataset.train_labels)


def _named_model(experiment: Experiment, dataset: Dataset) -> ModelOf:
    dtype = lanes.COMPUTE_DTYPE[experiment.precision]
    return lambda bn_batch_size: create_model(
        experiment.model.name, dataset.num_classes, experiment.model.norm, bn_batch_size, dtype=dtype
    )


def _compiled_ahead(jobs: list[Job], data: DeviceData, mesh: Mesh, timings: Timings) -> Iterator[tuple[Job, LaneProgram]]:
    """Each job with its program; while the caller trains one, the next compiles."""

    def compile_job(job: Job) -> LaneProgram:
        began = time.monotonic()
        program = job.compile(data, mesh)
        timings.add("compile", time.monotonic() - began, job.batch_size, job.bn_batch_size, program.lanes)
        return program

    with ThreadPoolExecutor(1) as executor:
        ahead = deque(executor.submit(compile_job, job) for job in jobs[:1])
        for job, following in zip_longest(jobs, jobs[1:]):
            program = ahead.popleft().result()
            if following is not None:
                ahead.append(executor.submit(compile_job, following))
            yield job, program


@contextmanager
def _signals() -> Iterator[Stop]:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one kills at once."""
    stop = Stop()

    def note(signum: int, frame: object) -> None:
        if stop.signum:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        stop.signum = signum

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone may handle signals
        before = {}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
