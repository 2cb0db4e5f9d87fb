"""A grid's setup, and the job of each of its programs: the runs that it trains and the layout that it is compiled in."""

import copy
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from smallbatch_jax.config import catalog
from smallbatch_jax.config.experiment import OWN, Experiment, InputError, Run, programs
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.data.order import BatchSchedule, Phase
from smallbatch_jax.models import create_model, micro_batch_size
from smallbatch_jax.optim import Optimizer, in_float32, is_kernel
from smallbatch_jax.program import devices, processes
from smallbatch_jax.program import lanes as lane_programs
from smallbatch_jax.program.devices import DATA, LANE, lane_mesh
from smallbatch_jax.program.lanes import COMPUTE_DTYPE, LaneState
from smallbatch_jax.program.tasks import Score, task_of
from smallbatch_jax.program.train import Model, Program, Setting, TrainState
from smallbatch_jax.runner.input import InputPipeline
from smallbatch_jax.runner.progress import Status, title
from smallbatch_jax.runner.signals import Stop
from smallbatch_jax.store.parameters import Parameters
from smallbatch_jax.store.results import ProgramResults
from smallbatch_jax.store.timings import Timings
from smallbatch_jax.tracking.trackers import Trackers

MOST_LANES = 16
SEARCH_LANES = 8  # a round of a search has few runs
SHARED_FROM = 64  # smallest batch size that idle cores share by default
GIB = 2**30
# Makes the model for a BN batch size (None: the whole batch) and, as `axis_name`, the mesh axis that shards a batch, if any.
ModelOf = Callable[..., Model]


class Own(NamedTuple):
    """A Python caller's own optimizer, loss and metrics; None where the config names them."""

    optimizer: Callable[..., optax.GradientTransformation] | None = None  # (learning_rate, **scalars)
    loss: Score | None = None
    metrics: Mapping[str, Score] | None = None


NOTHING_OWN = Own()


class Setup:
    """Experiment, data, model and devices shared by all programs of a grid."""

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset | Photographs,
        model_of: ModelOf | None = None,
        own: Own = NOTHING_OWN,
        target: Sequence[Any] | None = None,
    ):
        """If None, `model_of` makes the experiment's named model, and `target` is this machine's devices."""
        chosen = experiment.model
        self.own, self.task = own, task_of(experiment, own.loss, own.metrics)
        self.experiment, self.dataset, self.devices = experiment, dataset, target or jax.devices()
        self.platform = target[0].platform if target else jax.default_backend()
        self.own_model = chosen.name.startswith(OWN)  # a user's model may do anything with its batch
        self.model_of = model_of or partial(self.named_model, chosen.bn_decay)
        self.programs = programs(experiment.runs())  # runs by (batch size, BN batch size)

    def named_model(self, bn_decay: float, bn_batch_size: int | None, axis_name: str | None = None) -> Model:
        """Returns the experiment's named model."""
        chosen, dtype = self.experiment.model, COMPUTE_DTYPE[self.experiment.precision]
        constants = {"bn_decay": bn_decay, "axis_name": axis_name, "dtype": dtype, "platform": self.platform}
        return create_model(chosen.name, self.dataset.num_classes or 0, chosen.norm, bn_batch_size, **constants)

    @cached_property
    def mesh(self) -> Mesh:
        """Mesh of the devices. `experiment.data_devices` share a batch; by default one, or more where CPU cores would idle.

        Raises:
          InputError: if `data_devices` does not divide the number of devices, or is above 1 with the user's own model.
        """
        devices, sharing = len(self.devices), self.experiment.data_devices or self._idle_devices()
        if devices % sharing:
            divisors = ", ".join(str(d) for d in range(1, devices + 1) if devices % d == 0)
            raise InputError(f"data_devices: {sharing} does not divide the {devices} devices there are; use {divisors}.")
        if sharing > 1 and self.own_model:
            raise InputError(f"data_devices: {sharing} devices cannot share the batches of an own model; use 1.")
        return lane_mesh(self.devices, sharing)

    def _idle_devices(self) -> int:
        """Returns how many cores can share each batch without making a run wait; two are 1.5 to 2 times as fast as one."""
        if self.own_model or processes.several() or self.platform != "cpu":
            return 1
        devices, shapes = len(self.devices), self.programs
        most = devices // max(len(runs) for runs in shapes.values())
        can_share = self.experiment.can_share
        even = [d for d in range(2, most + 1) if devices % d == 0 and all(can_share(m, b, d) for m, b in shapes)]
        return max(even, default=1) if min(shapes)[0] >= SHARED_FROM else 1

    def initialiser(self) -> Callable[[int], TrainState]:
        """Returns a function that maps a seed to the state before the first update."""
        return lane_programs.initialiser(self.model_of(None), self.dataset.example, self.optimizer(1))

    def optimizer(self, batch_size: int) -> Optimizer:
        """Returns the optimizer of a program; only its learning rate depends on the batch size."""
        chosen = self.experiment.optimizer
        if not self.own.optimizer and chosen.name not in catalog.OPTIMIZERS:
            name = repr(chosen.name)
            raise InputError(f"optimizer.name: {name} is a function of a Python caller; resume with `sweep(optimizer=…)`.")
        make = self._own_optimizer
        if not self.own.optimizer:
            make = in_float32(pkgutil.resolve_name(catalog.OPTIMIZERS[chosen.name].make))
        if self.experiment.weight_decay_mask == "kernels":
            make = partial(make, mask=is_kernel)
        first = {name: values[0] for name, values in self.experiment.grid.axes().items()}
        scalars = chosen.scalars(batch_size, first)
        return Optimizer(make, tuple(scalars), chosen.learning_rate(1.0, batch_size), elementwise=not self.own.optimizer)

    def _own_optimizer(self, learning_rate: Any, weight_decay: Any, /, **scalars: Any) -> optax.GradientTransformation:
        """Returns the caller's optimizer; weight decay, if any, is one of its own scalars."""
        assert self.own.optimizer is not None
        return self.own.optimizer(learning_rate, **scalars)


@dataclass
class Session:
    """Open files, input pipeline and progress, shared by all programs of a grid that train in this process."""

    pipeline: InputPipeline
    initial: Callable[[int], TrainState]  # seed → the state before the first update
    status: Status
    show: Callable[[Status, str], None]  # takes the status and what is being done
    timings: Timings
    stop: Stop
    trackers: Trackers
    parameters: Parameters


def lacks_memory(error: Exception) -> bool:
    """Returns whether an error of a device or compiler means that a smaller layout may fit."""
    return "RESOURCE_EXHAUSTED" in str(error)


class Layout(NamedTuple):
    """Sizes that determine how much memory a program needs."""

    lanes: int
    micro_batch_size: int | None  # examples per micro-batch; None: the whole shard


class Job:
    """The runs of one (batch size, BN batch size), trained by one compiled program; one phase of them if batches grow."""

    def __init__(
        self,
        setup: Setup,
        batch_size: int,
        bn_batch_size: int,
        results: ProgramResults | None = None,
        memory_bytes: int | None = None,
    ):
        """`results` may be None if the job is only measured; `memory_bytes` None allows all memory that its devices have."""
        experiment, mesh = setup.experiment, setup.mesh
        self.setup, self.experiment, self.model_of = setup, experiment, setup.model_of
        self.shape, self.results = (batch_size, bn_batch_size), cast(ProgramResults, results)
        self.batch_size, self.bn_batch_size = self.shape  # batch sizes of the phase
        self.name = f"m{batch_size:05d}_b{bn_batch_size:05d}"
        self.title = title(batch_size, bn_batch_size)
        self.runs = setup.programs[batch_size, bn_batch_size]  # lowest base_lr first
        self.num_examples = setup.dataset.num_train
        self.batches = BatchSchedule.of(experiment, self.num_examples, batch_size)
        self.total_steps = self.batches.total_steps
        self.steps = range(self.total_steps)  # updates that belong to the phase
        self.parked: dict[Run, LaneState] = {}  # states of runs that may continue later, as NumPy arrays
        self.goals = dict.fromkeys(self.runs, experiment.epochs)  # epochs to train each run to
        self.data_devices = mesh.shape[DATA]  # number of devices that share a batch
        self._memory_bytes = memory_bytes or devices.memory_bytes(mesh)
        self.layout = self._first_layout()  # layout of the last compiled program

    @cached_property
    def phases(self) -> list["Job"]:
        """One job for each batch size that the runs reach; only this job if batches do not grow."""
        found = self.batches.phases
        if found == (Phase(0, 0, self.batch_size),):
            return [self]
        stops = [*(phase.step for phase in found[1:]), self.total_steps]
        return [self._of_phase(phase, stop) for phase, stop in zip(found, stops, strict=True)]

    def _of_phase(self, phase: Phase, stop: int) -> "Job":
        """Returns a job of the same runs, goals and results for the updates of a phase."""
        job, m = copy.copy(self), phase.batch_size
        job.batch_size, job.bn_batch_size = m, m if self.bn_batch_size == self.batch_size else self.bn_batch_size
        job.steps, job.layout = range(phase.step, stop), job._first_layout()
        job.title += f", grown to {m}" if m > self.batch_size else ""
        return job

    def _first_layout(self) -> Layout:
        most = self.experiment.lanes or (SEARCH_LANES if self.experiment.search.active else MOST_LANES)
        lanes, rows = min(len(self.runs), most), self.setup.mesh.shape[LANE]
        even = -(-lanes // rows) * rows  # the same number in every row of devices
        return Layout(even, self._micro_batch_size(self.experiment.micro_batch_size))

    def pending(self) -> list[Run]:
        """Returns the runs of this phase that have not reached their goal."""
        left = [run for run, epochs in self.goals.items() if not self.results.complete(run, epochs)]
        return [run for run in left if self.steps_taken(run) in self.steps]

    def steps_taken(self, run: Run) -> int:
        """Returns the number of updates that a parked run has taken; 0 for any other."""
        return int(self.parked[run].train.step) if run in self.parked else 0

    def goal(self, run: Run) -> int:
        """Returns the update number at which a run stops in this phase."""
        return min(self.batches.epoch_end(self.goals[run]), self.steps.stop)

    def left(self, lane: LaneState) -> LaneState:
        """Returns the state of a parked lane; at the end of the phase its loss sum is rescaled to the next batch size."""
        following = self.batches.phase_of_step(int(lane.train.step)).batch_size
        return lane._replace(loss_sum=np.float32(lane.loss_sum * np.float32(self.batch_size / following)))

    def settings(self, runs: list[Run | None]) -> Setting:
        """Returns the scalars of each lane's run, stacked; a lane without a run gets any valid ones."""
        experiment, axes = self.experiment, [dict((run or self.runs[0]).scalars) for run in runs]
        scalars = [experiment.optimizer.scalars(self.batch_size, of_run) for of_run in axes]

        def column(name: str, default: float) -> np.ndarray:
            return np.array([of_run.get(name, default) for of_run in axes], np.float32)

        return Setting(
            np.array([1.0 if run is None else run.base_lr for run in runs], np.float32),
            np.array([0 if run is None else run.seed for run in runs], np.int32),
            column("weight_decay", experiment.weight_decay),
            column("warmup_fraction", experiment.schedule.warmup_fraction),
            {name: np.array([of_run[name] for of_run in scalars], np.float32) for name in scalars[0]} or None,
        )

    def compile(self, pipeline: InputPipeline, make: Callable[..., Any] | None = None) -> Any:
        """Returns the compiled program in the present layout, or in the first smaller one that fits the memory.

        `make` is called like `compile_lanes`, which is the default, and its result is returned; it has a `peak_bytes`.

        Raises:
          InputError: if no layout fits.
        """
        while True:
            needed = None
            try:
                program = (make or lane_programs.compile_lanes)(**self.arguments(pipeline))
                if (needed := program.peak_bytes) <= self._memory_bytes:
                    return program
            except jax.errors.JaxRuntimeError as error:  # TPU compilers raise if a program does not fit
                if not lacks_memory(error):
                    raise
            self.layout = self.smaller(needed)

    def smaller(self, needed: int | None) -> Layout:
        """Returns the layout to try after memory ran out: half the lanes, or with one lane per device half the micro-batch.

        `needed` is the memory in bytes that the present layout needs, for the message; None if it is not known.

        Raises:
          InputError: if there is no smaller layout.
        """
        lanes, rows = self.layout.lanes, self.setup.mesh.shape[LANE]
        if lanes > rows:
            return self.layout._replace(lanes=max(rows, lanes // 2 // rows * rows))
        now = self.layout.micro_batch_size or self.batch_size // self.data_devices
        smaller = self._micro_batch_size(now // 2)
        if smaller is not None and smaller < now:
            return Layout(lanes, smaller)
        there = f"{self._memory_bytes / GIB:.1f}"
        needs = f"more than {there} GiB" if needed is None else f"{needed / GIB:.1f} GiB of {there}"
        raise InputError(
            f"m = {self.batch_size}: out of memory: one lane per device needs {needs}; use a smaller batch size or model, "
            "lower precision, or more data_devices."
        )

    def _micro_batch_size(self, most: int | None) -> int | None:
        """Returns the micro-batch size, at most `most` if that is possible; None for the whole shard."""
        if self.setup.own_model:
            return None
        norm, shard = self.experiment.model.norm, self.batch_size // self.data_devices
        return micro_batch_size(norm, shard, self.bn_batch_size, most, self.setup.platform)

    def arguments(self, pipeline: InputPipeline) -> dict[str, Any]:
        """Returns the arguments of `compile_lanes`."""
        experiment, mesh = self.experiment, self.setup.mesh
        mapping = lane_programs.lane_mapping(self.setup.platform)
        axis_name = DATA if self.data_devices > 1 else None
        program = Program(
            self.batch_size,
            self.batches.schedule_steps,
            self.batches.schedule_boundaries,
            experiment.schedule.factor,
            axis_name,
            self.layout.micro_batch_size,
            augment=experiment.dataset.augment and isinstance(self.setup.dataset, Dataset),  # photographs come augmented
            optimizer=self.setup.optimizer(self.batch_size),
            task=self.setup.task,
            diagnostics=experiment.diagnostics,
            position_of_step_0=self.batches.examples(self.steps.start) - self.steps.start * self.batch_size,
        )
        bn_batch_size = None if self.bn_batch_size == self.batch_size else self.bn_batch_size
        precise = experiment.model.bn_statistics == "precise"
        return {
            "model": self.model_of(bn_batch_size, **({"axis_name": axis_name} if axis_name else {})),
            "program": program,
            "data": pipeline.data(mesh, self.batch_size),
            "mesh": mesh,
            "lanes": self.layout.lanes,
            "segment_steps": pipeline.most_steps(mesh, self.batch_size, mapping == "map"),
            "precision": experiment.precision,
            "mapping": mapping,
            "statistics_model": self.setup.named_model(0.0, self.bn_batch_size) if precise else None,
        }
