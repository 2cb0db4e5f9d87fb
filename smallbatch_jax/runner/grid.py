"""Trains a grid into a workdir, one program after the other; skips runs that the workdir already holds."""

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.special import entr

from smallbatch_jax.config import catalog
from smallbatch_jax.config.experiment import OWN, Experiment
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.models.own import OwnModel
from smallbatch_jax.program import devices, fit, jax_flags, processes
from smallbatch_jax.program.devices import DATA
from smallbatch_jax.program.train import Program
from smallbatch_jax.runner import checks
from smallbatch_jax.runner.compiler import Compiler
from smallbatch_jax.runner.input import input_pipeline
from smallbatch_jax.runner.jobs import NOTHING_OWN, Job, ModelOf, Own, Session, Setup, lacks_memory
from smallbatch_jax.runner.planning import Forecast
from smallbatch_jax.runner.progress import NoProgress, Progress, Status
from smallbatch_jax.runner.rounds import search_rounds, with_budget
from smallbatch_jax.runner.scheduler import Scheduler
from smallbatch_jax.runner.signals import Interrupted, Stop, noted_signals
from smallbatch_jax.store.checkpoint import Checkpoints
from smallbatch_jax.store.parameters import Parameters
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.store.skipped import SkippedImages
from smallbatch_jax.store.timings import Timings
from smallbatch_jax.store.workdir import open_workdir, record_provenance, surroundings
from smallbatch_jax.tracking import trackers
from smallbatch_jax.tracking.trackers import TRACKERS, Trackers

__all__ = ["Interrupted", "facts", "require_trainable", "train_grid", "train_program"]


@jax_flags.held()
def train_grid(
    experiment: Experiment,
    workdir: Path,
    dataset: Dataset | Photographs,
    progress: Progress,
    model_of: ModelOf | None = None,
    fingerprint: Callable[[], dict[str, Any]] | None = None,
    own: Own = NOTHING_OWN,
) -> None:
    """Trains every run of the experiment that `workdir` does not hold yet, program by program.

    Args:
      experiment: what to train.
      workdir: created, or resumed if it holds this experiment. With several processes only the first uses it.
      dataset: the experiment's data, already loaded.
      progress: display that is updated after every segment.
      model_of: makes the model for a BN batch size; None takes the experiment's own.
      fingerprint: identifies that model (`models.identity`) and must be the same whenever the workdir is resumed; None for a
        model whose name identifies it.
      own: the caller's own optimizer, loss and metrics, which the experiment names "own:…".

    Raises:
      InputError: if the grid does not fit the data or the workdir holds another experiment; nothing is written then.
      Interrupted: on a signal of `signals`, after the segment in flight ended and all lanes were saved.
    """
    known = facts(experiment, dataset)
    processes.require_same(experiment.to_dict(), "config")
    processes.require_same(known, "dataset")
    setup = _checked_setup(experiment, dataset, model_of, own)
    experiment = setup.experiment = with_budget(setup, workdir)
    if processes.is_first():
        for warning in checks.data_warnings(experiment, dataset):
            print(f"warning: dataset: {warning}", file=sys.stderr, flush=True)
        known |= {"model": fingerprint()} if fingerprint else {}
        if own != NOTHING_OWN:
            known["own"] = fit.fingerprint(setup.model_of(None), setup.task, dataset, setup.optimizer(1))
    with ExitStack() as stack:
        folder = processes.on_first(lambda: stack.enter_context(open_workdir(workdir, experiment, known)))
        stop = stack.enter_context(noted_signals())
        status = _train(setup, folder, list(setup.programs), progress, stop)
        if processes.is_first():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if stop.signum:  # the signal came after the last segment
            raise Interrupted(stop.signum)
        if processes.is_first():
            record_provenance(folder, "finish", finished=status.finished, diverged=status.diverged)


@jax_flags.held()
def train_program(
    experiment: Experiment,
    workdir: Path,
    shape: tuple[int, int],
    dataset: Dataset | Photographs,
    progress: Progress,
    stop: Stop,
) -> None:
    """Trains one program of a grid: the runs of `shape`, (batch size, BN batch size), that `workdir` does not hold yet.

    Another process has opened the workdir and hands out its programs, each of which has its own files. The caller also handles
    signals, and may set `stop` from another thread.

    Raises:
      InputError: if another process trains this program, or it cannot be trained here.
      Interrupted: once `stop` is set, after the segment in flight ended and all lanes were saved.
    """
    _train(_checked_setup(experiment, dataset, None), workdir, [shape], progress, stop)
    if stop.signum:
        raise Interrupted(stop.signum)


@jax_flags.held()
def require_trainable(experiment: Experiment, dataset: Dataset | Photographs) -> None:
    """Raises InputError if the experiment does not fit the data, as `train_grid` would; runs nothing."""
    _checked_setup(experiment, dataset, None)


def facts(experiment: Experiment, dataset: Dataset | Photographs) -> dict[str, Any]:
    """Returns the data properties that a workdir stores.

    Its "guess" has the metrics of a constant guess on the test set, where known: the mean of the training targets for a
    regression, the frequencies of the test set's own classes or tokens otherwise.
    """
    found: dict[str, Any] = {"num_classes": dataset.num_classes, "examples": [dataset.num_train, dataset.num_test]}
    if not experiment.dataset.name.startswith(OWN):  # whose name has the digest
        found["digest"] = dataset.digest()
    if experiment.task == "regression" and isinstance(dataset, Dataset):
        mean = dataset.train_labels.mean(0, dtype=np.float64)
        found["guess"] = {"loss": float(np.square(dataset.test_labels - mean).mean())}
    elif experiment.task in catalog.TASKS and dataset.num_classes:
        found["guess"] = _class_guess(dataset, dataset.num_classes)
    return found


def _class_guess(dataset: Dataset | Photographs, num_classes: int) -> dict[str, float]:
    """Returns the loss and accuracies of guessing by the frequencies of the test classes, or of all tokens but the first."""
    shares, labels = np.full(num_classes, 1 / num_classes), dataset.test_labels
    if labels is not None:  # else ImageNet's, where all classes have as many
        labels = labels[:, 1:] if labels.ndim == 2 else labels
        shares = np.sort(np.bincount(labels.ravel(), minlength=num_classes))[::-1] / labels.size
    accuracies = {name: shares[: entry.guesses].sum() for name, entry in catalog.METRICS.items() if entry.guesses}
    return {"loss": float(entr(shares).sum()), **{name: min(1.0, float(value)) for name, value in accuracies.items()}}


def _checked_setup(
    experiment: Experiment, dataset: Dataset | Photographs, model_of: ModelOf | None, own: Own = NOTHING_OWN
) -> Setup:
    """Returns the setup of a grid after checking that it can be trained; runs nothing."""
    trackers.require(experiment)
    checks.require_fitting(experiment, dataset)
    setup = Setup(experiment, dataset, model_of, own)
    for place, (m, b) in enumerate(sorted(setup.programs)):
        model = setup.model_of(None if b == m else b)  # raises if the model takes no BN batch size
        if isinstance(model, OwnModel):
            for size in experiment.schedule.batch_sizes(m):
                model.require_batch(dataset.example, size)
        if place == 0:  # the smallest b, the only one that may be too small for a named model
            state = fit.require_model(model, setup.task, dataset, m)
            program = Program(m, 1, task=setup.task, diagnostics=experiment.diagnostics)
            fit.require_diagnostics(model, program, dataset, state)
            fit.require_optimizer(setup.optimizer(m), state.params, experiment.optimizer.title)
            checks.require_disk(experiment, state)
    return setup


def _train(setup: Setup, folder: Path, shapes: list[tuple[int, int]], progress: Progress, stop: Stop) -> Status:
    """Trains the programs of these shapes, (batch size, BN batch size), one after the other."""
    with ExitStack() as stack:
        first, mesh = processes.is_first(), setup.mesh
        memory = processes.least(devices.memory_bytes(mesh))
        if first:
            device = {"kind": mesh.devices.flat[0].device_kind, "platform": setup.platform, "count": mesh.size}
            made = {"device": device, "data_devices": mesh.shape[DATA], "precision": setup.experiment.precision}
            made |= {"flags": jax_flags.recorded(), "processes": jax.process_count()}
            record_provenance(folder, "start", **surroundings(), **made)
        skipped = SkippedImages(folder if first else None)
        pipeline = input_pipeline(setup.dataset, setup.experiment, skipped.add)
        stack.callback(pipeline.close)
        stored = _open_results(folder, shapes, setup, stack)
        tracked = setup.experiment if first else dataclasses.replace(setup.experiment, **dict.fromkeys(TRACKERS))
        shown = stack.enter_context(Trackers(tracked, folder, stored))
        jobs = [Job(setup, *shape, rows, memory) for shape, rows in zip(shapes, stored, strict=True)]
        status, searching = Status(), setup.experiment.search.active
        for job in [] if searching else jobs:
            status.add_program(job.goals, job.results, job.num_examples)
        progress = progress if first else NoProgress()
        stack.callback(progress.close, status)
        forecast = Forecast(progress, jobs)
        timings = Timings(folder if first else None)
        kept = Parameters(folder if first else None, setup.experiment.keep_parameters, setup.experiment.metric)
        session = Session(pipeline, setup.initialiser(), status, forecast.show, timings, stop, shown, kept)
        pending = [job for job in jobs if job.pending()]
        if pending:
            progress.show(status, f"compiling {pending[0].title}, program 1 of {len(pending)}")
        compiler = Compiler(session, [phase for job in pending for phase in job.phases])
        stack.callback(compiler.close)
        for job, rounds in itertools.groupby(search_rounds(jobs, status) if searching else pending):
            forecast.begin(job, [] if searching else pending[pending.index(job) + 1 :])
            checkpoints = Checkpoints(folder / "checkpoints" / job.name, setup.experiment)
            _train_job(job, rounds, checkpoints, session, compiler)
            if first:
                checkpoints.delete()
    return status


def _train_job(job: Job, rounds: Iterable[object], checkpoints: Checkpoints, session: Session, compiler: Compiler) -> None:
    """Trains a job to the goals of each round, phase by phase.

    If memory runs out, the phase gets a smaller layout and the job resumes from the last checkpoint.
    """
    alone = not processes.several()  # several hosts would not agree on when to change the program

    def begun(phase: Job) -> Scheduler:
        return Scheduler(phase, compiler.program(phase), checkpoints, session, compiler if alone else None)

    scheduler = begun(job.phases[0])
    scheduler.restore()
    for _ in rounds:
        while job.pending():
            for phase in filter(Job.pending, job.phases):
                try:
                    scheduler = scheduler if scheduler.lanes.job is phase else begun(phase)
                except Interrupted:  # while the program of a larger batch compiles
                    if alone:
                        scheduler.save()
                    raise
                try:
                    scheduler.train()
                except jax.errors.JaxRuntimeError as error:
                    if not alone or not lacks_memory(error):
                        raise
                    phase.layout = phase.smaller(scheduler.lanes.program.peak_bytes)
                    compiler.forget(phase)
                    scheduler = begun(phase)
                    scheduler.restore()


def _open_results(folder: Path, shapes: list[tuple[int, int]], setup: Setup, stack: ExitStack) -> list[ProgramResults]:
    """Opens the results of each program in the first process until `stack` unwinds; the other processes hold copies."""
    opened: list[ProgramResults] = []

    def open_all() -> list[ProgramResults]:
        opened.extend(stack.enter_context(ProgramResults(folder, *shape, experiment=setup.experiment)) for shape in shapes)
        return [results.followed() for results in opened] if processes.several() else []

    followed = processes.on_first(open_all)
    return opened or followed
