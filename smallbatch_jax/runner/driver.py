"""Trains a grid: the experiment's programs one after the other, into a workdir, until all runs are there."""

import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import linen as nn

from smallbatch_jax import data
from smallbatch_jax.config.experiment import OWN, Experiment, InputError, from_config, programs
from smallbatch_jax.config.fields import expanded_path
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.data.doubts import doubts
from smallbatch_jax.models import require_images, transposed
from smallbatch_jax.models.own import OwnModel
from smallbatch_jax.program import ambient, devices, processes
from smallbatch_jax.program import lanes as lane_programs
from smallbatch_jax.program.devices import lane_mesh
from smallbatch_jax.program.lanes import LaneProgram
from smallbatch_jax.program.train import TrainState
from smallbatch_jax.runner.forecast import Forecast
from smallbatch_jax.runner.input import InputPipeline
from smallbatch_jax.runner.jobs import GIB, Job, ModelOf, named_model
from smallbatch_jax.runner.planning import spread
from smallbatch_jax.runner.progress import NoProgress, Progress, Status, for_stream
from smallbatch_jax.runner.scheduler import Scheduler
from smallbatch_jax.runner.signals import Interrupted, Stop, noted_signals
from smallbatch_jax.runner.streaming import input_pipeline
from smallbatch_jax.store import results
from smallbatch_jax.store.checkpoint import Checkpoints
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.store.skipped import SkippedImages
from smallbatch_jax.store.timings import NoTimings, Timings, timing_rows
from smallbatch_jax.store.workdir import open_workdir, record_provenance, surroundings
from smallbatch_jax.tracking import trackers as mirrors
from smallbatch_jax.tracking.trackers import NoTrackers, Trackers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Interrupted", "sweep", "train_grid", "train_program"]


@ambient.held()
def train_grid(
    experiment: Experiment,
    workdir: Path,
    dataset: Dataset | Photographs,
    progress: Progress,
    model_of: ModelOf | None = None,
    fingerprint: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Trains every run of the experiment that `workdir` does not hold yet, program by program.

    Args:
      experiment: what to train.
      workdir: made if it is not there; resumed if it holds this experiment. With several processes the first alone uses it.
      dataset: the experiment's data, already loaded.
      progress: told after every segment.
      model_of: the model for a BN batch size; None makes the experiment's own.
      fingerprint: of that model (`models.identity`), which must be the same whenever the workdir is resumed; None for one
        whose name says what it is.

    Raises:
      InputError: if the grid does not fit the data or the workdir is not this experiment's; nothing is written then.
      Interrupted: on a signal of `signals`, after the segment at work ended and all lanes were saved.
    """
    study = _Study(experiment, dataset, model_of)
    if processes.is_first():
        for doubt in _doubts(experiment, dataset):
            print(f"warning: dataset: {doubt}", file=sys.stderr, flush=True)
    if processes.several():
        processes.require_same(experiment.to_dict(), "config")
        processes.require_same(dataset.digest(), "dataset")
    with ExitStack() as stack:
        known = facts(dataset) | ({"model": fingerprint()} if fingerprint and processes.is_first() else {})
        folder = processes.on_first(lambda: stack.enter_context(open_workdir(workdir, experiment, known)))
        stop = stack.enter_context(noted_signals())
        status = study.train(folder, list(programs(experiment.runs())), progress, stop)
        if processes.is_first():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if stop.signum:  # it came too late to cut anything short
            raise Interrupted(stop.signum)
        if processes.is_first():
            record_provenance(folder, "finish", finished=status.finished, diverged=status.diverged)


def _require_pictures(image_shape: Sequence[int]) -> None:
    """Refuses augmentation of anything but pictures [H, W, C]."""
    if len(image_shape) != 3:
        raise InputError(
            f"dataset.augment: crops and flips images [H, W, C], the dataset has {_brackets(image_shape)}; use False."
        )
    moved = transposed(image_shape)
    if moved:
        raise InputError(
            f"dataset.augment: crops and flips images [H, W, C], the dataset has {_brackets(image_shape)}, which looks like "
            f"channels in front; use images.transpose{moved}."
        )


def _doubts(experiment: Experiment, dataset: Dataset | Photographs) -> list[str]:
    """Returns warnings about data that the user brought and that may not be what was meant."""
    name, shape = experiment.dataset.name, dataset.image_shape
    if not isinstance(dataset, Dataset) or not (name == "folder" or name.startswith(OWN)):
        return []
    found = doubts(dataset)
    pixels = dataset.train_images.dtype == np.uint8
    moved = transposed(shape)
    if moved:
        normalised = ", and normalised so" if pixels else ""
        found.append(
            f"images of shape {_brackets(shape)} are taken as [H, W, C]{normalised}; to put the channels last, use "
            f"images.transpose{moved}."
        )
    elif len(shape) == 3 and shape[0] < shape[1] == shape[2]:
        found.append(
            f"images of shape {_brackets(shape)} are taken as [H, W, C]; if they are [C, H, W], use "
            "images.transpose(0, 2, 3, 1)."
        )
    elif len(shape) == 2 and pixels:
        found.append(
            f"uint8 images of shape {_brackets(shape)} are normalised by column; of grey pictures give images[..., None]."
        )
    return found


def _brackets(image_shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, image_shape))}]"


def facts(dataset: Dataset | Photographs) -> dict[str, Any]:
    """What a workdir keeps of its data."""
    return {"num_classes": dataset.num_classes, "examples": [dataset.num_train, dataset.num_test]}


@ambient.held()
def require_trainable(experiment: Experiment, dataset: Dataset | Photographs) -> None:
    """Refuses an experiment that does not fit the data, as `train_grid` would; runs nothing."""
    _Study(experiment, dataset, None)


@ambient.held()
def train_program(
    experiment: Experiment,
    workdir: Path,
    shape: tuple[int, int],
    dataset: Dataset | Photographs,
    progress: Progress,
    stop: Stop,
) -> None:
    """Trains one program of a grid: the runs of `shape`, (batch size, BN batch size), that `workdir` does not hold yet.

    The workdir is another process's, which has opened it and hands out its programs; each has files of its own. Signals are
    the caller's too, who may set `stop` from another thread.

    Raises:
      InputError: if another process trains this program, or it cannot be trained here.
      Interrupted: once `stop` is set, after the segment at work ended and all lanes were saved.
    """
    _Study(experiment, dataset, None).train(workdir, [shape], progress, stop)
    if stop.signum:
        raise Interrupted(stop.signum)


class _Study:
    """An experiment with its data and model, checked."""

    def __init__(self, experiment: Experiment, dataset: Dataset | Photographs, model_of: ModelOf | None):
        mirrors.require(experiment)
        experiment.require_examples(dataset.num_train)
        streamed = isinstance(dataset, Photographs)
        if experiment.dataset.color_jitter and not (streamed and experiment.dataset.augment):
            raise InputError(
                "dataset.color_jitter: is a part of the augmentation of streamed images; use it with dataset.image_size and "
                "dataset.augment."
            )
        if streamed and experiment.model.bn_statistics == "precise":
            raise InputError(
                "model.bn_statistics: 'precise' takes training images again at every evaluation, which are not there where "
                "dataset.image_size streams them. Use 'running'."
            )
        self.experiment, self.dataset = experiment, dataset
        self.model_of = model_of or named_model(experiment, dataset.num_classes, experiment.model.bn_decay)
        precise = experiment.model.bn_statistics == "precise"
        self.precise_model_of = named_model(experiment, dataset.num_classes, 0.0) if precise else None
        if model_of is None:
            require_images(experiment.model.name, dataset.image_shape)
        if experiment.dataset.augment:
            _require_pictures(dataset.image_shape)
        self._require_models()

    def _require_models(self) -> None:
        """Refuses a model that cannot be trained in one of the programs; runs nothing."""
        image_shape, num_classes = self.dataset.image_shape, self.dataset.num_classes
        for place, (m, b) in enumerate(sorted(programs(self.experiment.runs()))):
            model = self.model_of(None if b == m else b)  # refuses a model that takes no BN batch size
            if isinstance(model, OwnModel):
                model.require_batch(image_shape, m)
            if place == 0:  # with the smallest b, which alone may be too small for a named model
                lane_programs.require_model(model, image_shape, num_classes, m)

    def train(self, folder: Path, shapes: list[tuple[int, int]], progress: Progress, stop: Stop) -> Status:
        """Trains the programs of these (batch size, BN batch size), one after the other."""
        mesh = lane_mesh()
        device = {"kind": mesh.devices.flat[0].device_kind, "platform": jax.default_backend(), "count": mesh.size}
        timings = Timings(folder)
        if processes.is_first():
            made = {**surroundings(), "device": device, "precision": self.experiment.precision, "flags": ambient.recorded()}
            record_provenance(folder, "start", **made, processes=jax.process_count())
        else:
            timings, progress = NoTimings(), NoProgress()
        there = processes.least(devices.memory_bytes(mesh))
        initial = lane_programs.initialiser(self.model_of(None), self.dataset.image_shape)
        with ExitStack() as stack:
            skipped = SkippedImages(folder if processes.is_first() else None)
            supply = input_pipeline(self.dataset, self.experiment, skipped.add)
            stack.callback(supply.close)
            found = _results(folder, shapes, stack)
            shown = _mirrors(self.experiment, folder, found, stack)
            jobs = [self._job(shape, results, there) for shape, results in zip(shapes, found, strict=True)]
            status = _status(jobs)
            stack.callback(progress.close, status)
            pending = [job for job in jobs if job.pending()]
            forecast = Forecast(progress, jobs, timing_rows(folder))
            if pending:
                progress.show(status, f"compiling {pending[0].title}, program 1 of {len(pending)}")
            compiler = _Compiler(supply, timings)
            for place, (job, program) in enumerate(compiler.in_turn(pending, initial, stop), 1):
                forecast.begin(job, pending[place:])
                checkpoints = Checkpoints(folder / "checkpoints" / job.name, self.experiment)
                # When the last lanes had better move, and whether memory ran out, processes would find each for itself.
                smaller = None if processes.several() else partial(compiler.submit_smaller, job)
                while True:
                    feeder = Scheduler(
                        job, program, supply, initial, checkpoints, status, forecast, timings, stop, shown, smaller
                    )
                    try:
                        feeder.train()
                        break
                    except jax.errors.JaxRuntimeError as error:
                        if smaller is None:
                            raise
                        program = smaller(_lanes_after(error, job, feeder.program)).result()
                if processes.is_first():
                    checkpoints.delete()
        return status

    def _job(self, shape: tuple[int, int], results: ProgramResults, memory_bytes: int) -> Job:
        runs = programs(self.experiment.runs())[shape]
        job = Job(self.experiment, self.dataset, self.model_of, *shape, runs, results, self.precise_model_of)
        return spread(dataclasses.replace(job, memory_bytes=memory_bytes))


def _results(folder: Path, shapes: list[tuple[int, int]], stack: ExitStack) -> list[ProgramResults]:
    """The rows of each program, open in the first process until `stack` unwinds, and followed by the others."""
    opened: list[ProgramResults] = []

    def known() -> list[ProgramResults]:
        opened.extend(stack.enter_context(ProgramResults(folder, *shape)) for shape in shapes)
        return [results.followed() for results in opened] if processes.several() else []

    followed = processes.on_first(known)
    return opened or followed


def _mirrors(experiment: Experiment, folder: Path, stored: list[ProgramResults], stack: ExitStack) -> Trackers:
    """What shows the rows elsewhere, open in the first process until `stack` unwinds; in the others nothing does."""
    opened: list[Trackers] = []
    processes.on_first(lambda: opened.append(stack.enter_context(Trackers(experiment, folder, stored))))
    return opened[0] if opened else NoTrackers()


def _status(jobs: list[Job]) -> Status:
    """Of all their runs, of which an earlier process may have completed some."""
    runs = sum(len(job.runs) for job in jobs)
    images = sum(len(job.pending()) * job.experiment.epochs * job.num_examples for job in jobs)
    status = Status(runs, images)
    for job in jobs:
        job.count_complete(status)
    return status


def _lanes_after(error: Exception, job: Job, program: LaneProgram) -> int:
    """Half the lanes of a program that ran out of memory; any other failure, and that of the last lane, is raised."""
    rows = program.rows
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    if program.lanes == rows:
        needed = program.peak_bytes / GIB
        raise InputError(
            f"m = {job.batch_size}: out of memory with one lane per device, which needs {needed:.1f} GiB"
        ) from error
    return program.lanes // 2 // rows * rows or rows


class _Compiler:
    """Compiles programs in threads of its own, beside the training of another."""

    def __init__(self, supply: InputPipeline, timings: Timings):
        self._supply, self._timings = supply, timings
        self._executor = ThreadPoolExecutor(2)

    def submit(self, job: Job) -> Future[LaneProgram]:
        return self._executor.submit(self._compile, job)

    def submit_smaller(self, job: Job, lanes: int) -> Future[LaneProgram]:
        return self.submit(dataclasses.replace(job, most_lanes=lanes))

    def _compile(self, job: Job) -> LaneProgram:
        began = time.monotonic()
        program = job.compile(self._supply)
        seconds, shape = time.monotonic() - began, (job.batch_size, job.bn_batch_size)
        self._timings.add("compile", seconds, *shape, program.lanes, peak_bytes=program.peak_bytes)
        return program

    def in_turn(self, jobs: list[Job], initial: Callable[[int], TrainState], stop: Stop) -> Iterator[tuple[Job, LaneProgram]]:
        """Each job with its program; while the caller trains one, the next compiles.

        Raises:
          Interrupted: if asked to stop while there is nothing but compiling to do.
        """
        try:
            ahead = deque(self.submit(job) for job in jobs[:1])
            # What draws the initial parameters is compiled beside the first program; all programs share it.
            for compiling in [self._executor.submit(initial, job.runs[0].seed) for job in jobs[:1]]:
                _await(compiling, stop)
            for job, following in zip_longest(jobs, jobs[1:]):
                program = _await(ahead.popleft(), stop)
                if following is not None:
                    ahead.append(self.submit(following))
                yield job, program
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _await(future: Future[Any], stop: Stop) -> Any:
    """What it gives, unless asked to stop before."""
    while not wait([future], timeout=0.1).done:
        if stop.signum:
            raise Interrupted(stop.signum)
    return future.result()


def sweep(
    model: str | nn.Module,
    dataset: str | Dataset | Photographs,
    batch_sizes: Sequence[int],
    base_lrs: Sequence[float] | Mapping[int, float],
    epochs: int,
    seeds: Sequence[int] = (0,),
    workdir: str | os.PathLike[str] | None = None,
    *,
    bn_batch_sizes: Sequence[int] | None = None,
    norm: str = "none",
    bn_decay: float = 0.99,
    bn_statistics: str = "running",
    weight_decay: float = 0.0,
    boundaries: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
    warmup_fraction: float = 0.0,
    augment: bool = False,
    precision: str = "float32",
    data_dir: str | None = None,
    image_size: int | None = None,
    lanes: int | None = None,
    name: str = "sweep",
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> "pd.DataFrame":
    """The grid batch_sizes × base_lrs × seeds on your own model and data, with the lanes, store and resume of the commands.

    Args:
      model: a name of `create_model`, with `norm`; or an own linen module: `init(key, images)`, and `apply(variables, images)`
        to logits float[n, num_classes], called with `train=…` or a mode of another usual name (`models.own.MODES`) if it takes
        one; with or without "batch_stats" and dropout.
      dataset: a name of `data.load`, with `data_dir` and `image_size`; or a `data.Dataset` of your own arrays, of any
        shape [n, …].
      batch_sizes: m, each at most the number of training examples.
      base_lrs: η̃ = η/m, the step length per example: those that each batch size is crossed with, or its own for each.
      epochs: E, of every run, whatever m.
      seeds: of initialisation and order: the replicates of a cell.
      workdir: where the results are kept and resumed, with the same model and data alone; None keeps nothing.
      bn_batch_sizes: crossed with batch_sizes; None takes m. An own module must have a field `bn_batch_size`.
      norm, bn_decay, bn_statistics: as in a config's `model`; an own module brings its own.
      weight_decay, boundaries, factor, warmup_fraction, augment, precision, lanes, name: as in a config.
      tensorboard: whether WORKDIR/tensorboard shows the runs, also while they train.
      progress: told after every segment; None shows lines or a bar on stderr.

    Returns:
      The rows of `results.load(workdir)`.

    Raises:
      InputError: naming what cannot be used.
    """
    workdir = None if workdir is None else expanded_path("workdir", workdir)
    if tensorboard and workdir is None:
        raise InputError("tensorboard: shows what a workdir keeps, and there is none; give one, or leave tensorboard out.")
    own = None if isinstance(model, str) else OwnModel(model)
    if own is not None and (norm, bn_decay, bn_statistics) != ("none", 0.99, "running"):
        raise InputError(
            "norm, bn_decay, bn_statistics: are of the named models; an own module brings its own, leave them out."
        )
    images = data.load(dataset, data_dir, image_size) if isinstance(dataset, str) else dataset
    if not isinstance(images, (Dataset, Photographs)):
        raise InputError(f"dataset: got a {type(images).__name__}; accepts a name, or a data.Dataset of your own arrays.")
    config = {
        "name": name,
        "dataset": {
            "name": dataset if isinstance(dataset, str) else f"{OWN}{images.digest()}",
            "augment": augment,
            "image_size": images.image_size if isinstance(images, Photographs) else None,
        },
        "model": {"name": own.name if own else model, "norm": norm, "bn_decay": bn_decay, "bn_statistics": bn_statistics},
        "epochs": epochs,
        "weight_decay": weight_decay,
        "schedule": {"boundaries": boundaries, "factor": factor, "warmup_fraction": warmup_fraction},
        "grid": {"batch_sizes": batch_sizes, "bn_batch_sizes": bn_batch_sizes, "seeds": seeds}
        | ({"base_lr_by_batch_size": base_lrs} if isinstance(base_lrs, Mapping) else {"base_lrs": base_lrs}),
        "precision": precision,
        "lanes": lanes,
        "tensorboard": tensorboard,
    }
    experiment = from_config(config)
    devices.use_all_cores()
    ambient.require_devices()
    with ExitStack() as stack:
        stack.enter_context(ambient.held())
        if own is not None:
            own = own.settled(images.image_shape)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if workdir is None else workdir)
        model_of = None if own is None else own.with_bn_batch_size
        fingerprint = None
        if own is not None and workdir is not None:
            fingerprint = partial(own.fingerprint, images.image_shape)
            own.warn_of_unstable_fields(folder)
        train_grid(experiment, folder, images, progress or for_stream(), model_of, fingerprint)
        return processes.on_first(lambda: results.load(folder))
