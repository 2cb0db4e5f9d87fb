"""What a grid will cost, before it is run: each program compiled as the driver compiles it, and timed for a few seconds.

The probe trains the program's own runs. So it also sees which base learning rates diverge at once, and leaves out the time
that their runs will not need; one that diverges later makes the plan too long.
"""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smallbatch_jax.config.experiment import Experiment, Run, programs
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.models.conv import forced
from smallbatch_jax.program.lanes import LaneMapping, LaneProgram, initialiser
from smallbatch_jax.program.train import Batch, Model, Program, Setting, TrainState, init_state, make_train_step
from smallbatch_jax.runner import placement as scaling
from smallbatch_jax.runner.input import InputPipeline, LaneSteps, SegmentInput
from smallbatch_jax.runner.jobs import Job, ModelOf, named_model
from smallbatch_jax.runner.streaming import input_pipeline
from smallbatch_jax.store.results import ProgramResults

WARM_UP_IMAGES = 512  # per lane, of the first segment, which is not timed
EVALUATED_PARTS = 4  # of a streamed test set


class Trial:
    """The first runs of a job, trained in memory alone, to see how fast."""

    def __init__(self, job: Job, program: LaneProgram, supply: InputPipeline, initial: Callable[[int], TrainState]):
        """Fills the lanes of the program, compiled for the job; `initial` is seed → the state before the first update."""
        self.job, self.program, self._supply = job, program, supply
        self.runs: list[Run | None] = [None] * program.lanes
        # In turn over the devices, so that the low rates, which survive, keep them all at work, as in a sweep.
        per_row = program.lanes // program.rows
        in_turn = sorted(range(program.lanes), key=lambda lane: (lane % per_row, lane))
        for lane, run in zip(in_turn, _one_run_per_rate(job.runs), strict=False):
            self.runs[lane] = run
        fresh = {lane: initial(run.seed) for lane, run in enumerate(self.runs) if run}
        self._state = program.start(program.empty(), fresh)
        self.alive = np.array([run is not None for run in self.runs])
        self._done = np.zeros(program.lanes, int)  # updates taken
        self._seconds_per_step = 0.0

    def train(self, seconds: float) -> tuple[int, float]:
        """Images trained and seconds spent, in segments of about so long in all; less if all runs end before."""
        trained, spent = 0, 0.0
        while spent < seconds:
            taken, elapsed = self._segment(self._pace(seconds - spent))
            if not taken and not elapsed:
                break
            trained, spent = trained + taken * self.job.batch_size, spent + elapsed
        return trained, spent

    def warm_up(self) -> tuple[int, float]:
        """The first segment: images trained and seconds."""
        taken, seconds = self._segment(max(1, WARM_UP_IMAGES // self.job.batch_size))
        return taken * self.job.batch_size, seconds

    def evaluate(self) -> float:
        """Seconds in which all living lanes are evaluated, the second time that they are.

        Of a streamed test set a part is, which stands for all.
        """
        seconds, parts = 0.0, 1
        for _ in range(2):
            load = self._load(np.zeros(self.program.lanes, int))
            segment = load.segment._replace(evaluate=np.ones(self.program.lanes, bool))
            if load.pool is not None:
                parts = max(1, load.test_batches)
            began = time.monotonic()
            few = itertools.islice(load.test, EVALUATED_PARTS)
            self._state, report = self.program.run(self._state, self.job.settings(self.runs), segment, load.pool, few)
            jax.block_until_ready(report)
            seconds = time.monotonic() - began
        return seconds * max(1.0, parts / EVALUATED_PARTS)

    def diverged(self) -> frozenset[float]:
        """Base learning rates whose run has diverged."""
        return frozenset(run.base_lr for run, lives in zip(self.runs, self.alive, strict=True) if run and not lives)

    def _pace(self, seconds: float) -> int:
        steps = round(seconds / max(self._seconds_per_step, 1e-9))
        return max(1, min(self.program.segment_steps, steps))

    def _segment(self, pace: int) -> tuple[int, float]:
        """Updates taken by all lanes together, and seconds."""
        left = self.job.total_steps - self._done
        pace = min(pace, self.program.segment_steps) if self.program.any_length else self.program.segment_steps
        wanted = [
            LaneSteps(run.seed, int(self._done[lane]), int(left[lane])) if run and self.alive[lane] and left[lane] > 0 else None
            for lane, run in enumerate(self.runs)
        ]
        steps = np.array(self._supply.steps(self.program, self.job.batch_size, wanted, pace))
        if not steps.any():
            return 0, 0.0
        began = time.monotonic()  # a streamed segment's images are a part of its time
        load = self._load(steps)
        self._state, report = self.program.run(self._state, self.job.settings(self.runs), load.segment, load.pool)
        found = jax.tree.map(np.asarray, report)
        seconds = time.monotonic() - began
        taken = int((found.step - self._done)[self.alive].sum())
        self._done, self.alive = np.where(self.alive, found.step, self._done), self.alive & found.alive
        self._seconds_per_step = seconds / pace
        return taken, seconds

    def _load(self, steps: np.ndarray) -> SegmentInput:
        """The next steps of each run, without an evaluation."""
        spans = [
            LaneSteps(run.seed, int(self._done[lane]), int(steps[lane])) if run and steps[lane] else None
            for lane, run in enumerate(self.runs)
        ]
        return self._supply.prepare(self.program, self.job.batch_size, spans)


@dataclass(frozen=True)
class Probe:
    """What a program did in a few seconds."""

    lanes: int
    images_per_second: float  # trained, over all lanes; NaN if nothing was
    evaluation_seconds: float  # of the whole test set, per run
    compile_seconds: float
    peak_bytes: int  # of all devices, by the compiled program; the dataset not counted
    diverged: frozenset[float]  # base learning rates whose run diverged within the probe


def measure(
    experiment: Experiment,
    dataset: Dataset | Photographs,
    model_of: ModelOf | None = None,
    mapping: LaneMapping | None = None,
) -> Iterator[Trial]:
    """Compiles every program of an experiment, one after the other; writes nothing that lasts.

    Args:
      experiment: whose programs are compiled.
      dataset: its data, or any of the same shape.
      model_of: the model for a BN batch size; None makes the experiment's own.
      mapping: how lanes share a device; None: as is best on this backend.
    """
    model_of = model_of or named_model(experiment, dataset.num_classes, experiment.model.bn_decay)
    precise = named_model(experiment, dataset.num_classes, 0.0) if experiment.model.bn_statistics == "precise" else None
    initial = initialiser(model_of(None), dataset.image_shape)
    with tempfile.TemporaryDirectory() as folder, closing(input_pipeline(dataset, experiment)) as supply:
        for (m, b), runs in programs(experiment.runs()).items():
            with ProgramResults(Path(folder), m, b) as results:
                job = spread(Job(experiment, dataset, model_of, m, b, runs, results, precise, mapping=mapping))
                yield Trial(job, job.compile(supply), supply, initial)


def spread(job: Job) -> Job:
    """The job with the number of devices that share each of its batches: what is asked for, or `scaling.data_devices`.

    In one process on CPU a run shall not depend by a bit on how many cores there are: blocks of a batch are not cut.
    """
    devices, several, backend = jax.device_count(), jax.process_count() > 1, jax.default_backend()
    chosen = scaling.asked_devices(job.experiment, devices)
    if chosen is None and len(job.runs) < devices:
        shape, machine = (job.batch_size, job.bn_batch_size), scaling.machine(backend, several)
        blocks = _exact_parts(job) if backend == "cpu" and not several else None
        chosen = scaling.data_devices(job.experiment, shape, len(job.runs), devices, machine, network(job), blocks)
    return dataclasses.replace(job, data_devices=chosen or 1)


def _exact_parts(job: Job) -> int:
    """Into how many equal parts a batch can be cut on CPU without changing a bit of what is computed in float32."""
    return job.batch_size // job.blocks.size if job.blocks and job.experiment.precision == "float32" else 1


def network(job: Job) -> scaling.Network:
    """What a training step of the job's model takes."""
    model, image_shape = job.model_of(None), job.dataset.image_shape
    state = jax.eval_shape(lambda: init_state(model, jnp.zeros((1, *image_shape)), jnp.int32(0)))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    layers = len(jax.tree.leaves(state.batch_stats)) // 2  # a mean and a variance of each
    return scaling.Network(flops_per_image(model, job.batch_size, image_shape), 4 * parameters, layers)


def probe(trial: Trial, seconds: float) -> Probe:
    """Trains for about so many seconds, after a first segment that is not timed, then evaluates once."""
    first_images, first_seconds = trial.warm_up()
    images, spent = trial.train(seconds)
    if not images:  # all ended in the first segment
        images, spent = first_images, first_seconds
    program, evaluation = trial.program, trial.evaluate() / max(1, trial.alive.sum())
    rate = images / spent if images else math.nan
    return Probe(program.lanes, rate, evaluation, program.compile_seconds, program.peak_bytes, trial.diverged())


def _one_run_per_rate(runs: Sequence[Run]) -> list[Run]:
    """The first run of each base learning rate, then the others."""
    first = {run.base_lr: run for run in reversed(runs)}
    return sorted(runs, key=lambda run: first[run.base_lr] is not run)


def matrix_rate(size: int = 1024, products: int = 16) -> float:
    """Floating-point operations per second of one device in a product of square float32 matrices, the best of five."""

    def loop(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: (x @ a) * (1 / size), a)

    a = jnp.ones((size, size))
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(loop).lower(a).compile()
    compiled(a).block_until_ready()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        compiled(a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * products / best


@dataclass(frozen=True)
class ProgramPlan:
    """What one program will cost."""

    batch_size: int
    bn_batch_size: int
    runs: int
    steps: int  # per run
    lanes: int
    data_devices: int  # that share each batch
    flops: float  # of all runs, every one trained to its end
    diverging: int  # runs expected to end at once
    compile_seconds: float
    images_per_second: float
    seconds: float  # of training and evaluation
    peak_bytes: int


def plan_program(job: Job, flops_per_image: float, found: Probe) -> ProgramPlan:
    """What the probe says of all runs of a program."""
    diverging = sum(run.base_lr in found.diverged for run in job.runs)
    surviving = len(job.runs) - diverging
    images = job.total_steps * job.batch_size
    training = surviving * images / found.images_per_second if surviving else 0.0
    seconds = training + surviving * job.experiment.epochs * found.evaluation_seconds
    return ProgramPlan(
        job.batch_size,
        job.bn_batch_size,
        len(job.runs),
        job.total_steps,
        found.lanes,
        job.data_devices,
        flops_per_image * images * len(job.runs),
        diverging,
        found.compile_seconds,
        found.images_per_second,
        seconds,
        found.peak_bytes,
    )


def total_seconds(plans: Sequence[ProgramPlan], compiling_beside: float | None = None) -> float:
    """Of all programs one after the other, each compiled while the one before trains.

    Args:
      plans: in the order of training.
      compiling_beside: how many times as long a compilation takes beside other work; None: 1.75 on CPU, whose cores that
        work keeps busy (measured on 2 cores), else 1.
    """
    if compiling_beside is None:
        compiling_beside = 1.75 if jax.default_backend() == "cpu" else 1.0
    compiling = [compiling_beside * plan.compile_seconds for plan in plans]
    hidden = zip(plans, [*compiling[1:], 0.0], strict=False)
    return sum(compiling[:1]) + sum(max(plan.seconds, following) for plan, following in hidden)


def flops_per_image(model: Model, batch_size: int, image_shape: Sequence[int]) -> float:
    """Floating-point operations of a training step per image of the batch, counted on the model as it is written.

    The tricks by which a convolution is made fast do not count; products with padding neither.
    """
    counted = min(batch_size, 32)  # the body of a loop over images would be counted once
    images = jax.ShapeDtypeStruct((counted, *image_shape), jnp.float32)
    batch = Batch(images, jax.ShapeDtypeStruct((counted,), jnp.int32))
    setting = Setting(*(jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.float32)))
    with forced("plain"):
        state = jax.eval_shape(lambda images: init_state(model, images, jnp.int32(0)), images)
        lowered = jax.jit(make_train_step(model, Program(counted, 1))).lower(state, setting, batch)
    analysis: Any = lowered.cost_analysis()
    return float((analysis or {}).get("flops", math.nan)) / counted


def elsewhere(batch_size: int, runs: int, images: int, stored: Sequence[Mapping[str, Any]], devices: int = 1) -> float:
    """Seconds of training that a program's runs would take at the rates stored for another device.

    Args:
      batch_size: m.
      runs: that train to their end.
      images: that each run trains on.
      stored: results of `benchmark.py --json` on one such device, for the same model.
      devices: that share out the runs, each as fast as the one measured; the one with the most decides.

    Returns:
      Seconds, the rate interpolated between the two nearest batch sizes, on logarithmic axes; NaN without any.
    """
    rates = {int(row["batch_size"]): float(row["images_per_second"]) for row in stored}
    if not rates:
        return math.nan
    sizes = sorted(rates)
    rate = 2.0 ** np.interp(math.log2(batch_size), np.log2(sizes), np.log2([rates[m] for m in sizes]))
    return -(-runs // devices) * images / float(rate)
