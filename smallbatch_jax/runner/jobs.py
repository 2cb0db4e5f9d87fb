"""One program's part of an experiment: its runs, where they are kept, and how it is compiled."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smallbatch_jax.config.experiment import OWN, Experiment, InputError, Run
from smallbatch_jax.data import Dataset, Photographs, order
from smallbatch_jax.models import blocks_of, create_model, micro_batch_size
from smallbatch_jax.models.blocks import Blocks
from smallbatch_jax.program import devices
from smallbatch_jax.program import lanes as lane_programs
from smallbatch_jax.program.devices import DATA, LANE, lane_mesh
from smallbatch_jax.program.lanes import LaneMapping, LaneProgram
from smallbatch_jax.program.train import Model, Program, Setting
from smallbatch_jax.runner.input import InputPipeline
from smallbatch_jax.runner.progress import Part
from smallbatch_jax.store.results import ProgramResults

MOST_LANES = 16
GIB = 2**30


class ModelOf(Protocol):
    """The model for a BN batch size, None for the whole batch, of batches spread over a mesh axis, None for none."""

    def __call__(self, bn_batch_size: int | None, /, axis_name: str | None = None) -> Model: ...


def named_model(experiment: Experiment, num_classes: int, bn_decay: float) -> ModelOf:
    """The experiment's own model, by its name."""
    dtype = lane_programs.COMPUTE_DTYPE[experiment.precision]
    model = experiment.model
    return lambda bn_batch_size, axis_name=None: create_model(
        model.name, num_classes, model.norm, bn_batch_size, bn_decay=bn_decay, axis_name=axis_name, dtype=dtype
    )


@dataclass
class Job:
    """The runs that one compiled program trains."""

    experiment: Experiment
    dataset: Dataset | Photographs
    model_of: ModelOf
    batch_size: int
    bn_batch_size: int
    runs: list[Run]
    results: ProgramResults
    statistics_model_of: ModelOf | None = None  # the same model with a decay of 0, where statistics are precise
    data_devices: int = 1  # that share each batch
    memory_bytes: int | None = None  # that its program may use here; None: what there is
    mapping: LaneMapping | None = None  # how lanes share a device; None: as is best on this backend
    most_lanes: int | None = None  # a limit, once memory ran out or few runs are left

    @property
    def name(self) -> str:
        return f"m{self.batch_size:05d}_b{self.bn_batch_size:05d}"

    @property
    def title(self) -> str:
        """What the user is told: "m = 8, BN batch 4"."""
        m, b = self.batch_size, self.bn_batch_size
        return f"m = {m}" + (f", BN batch {b}" if b != m else "")

    @property
    def num_examples(self) -> int:
        return self.dataset.num_train

    @property
    def total_steps(self) -> int:
        return order.total_steps(self.experiment.epochs, self.num_examples, self.batch_size)

    def pending(self) -> list[Run]:
        return [run for run in self.runs if not self.results.complete(run, self.experiment.epochs)]

    def count_complete(self, part: Part) -> None:
        """Adds the runs that are complete already."""
        for run in self.runs:
            if self.results.complete(run, self.experiment.epochs):
                part.add_run(self.results.diverged(run), self.results.final_accuracy(run))

    @property
    def share(self) -> int:
        """Examples of a batch on each device."""
        return self.batch_size // self.data_devices

    def compile(self, supply: InputPipeline) -> LaneProgram:
        """The program with as many lanes as it has runs and as fit, spread evenly over the devices.

        Where not even one lane per row of devices fits, each takes its share of a batch in parts.

        Raises:
          InputError: if that does not fit either.
        """
        rows = lane_mesh(data_devices=self.data_devices).shape[LANE]
        lanes, parts = self.lanes(rows), self._parts(self.experiment.micro_batch_size)
        while True:
            program = self._compile(supply, lanes, parts)
            needed, there = program.peak_bytes, self.memory_bytes or devices.memory_bytes(program.mesh)
            if needed <= there:
                return program
            smaller = self._parts((parts or self.share) // 2)
            if lanes > rows:
                lanes = max(rows, lanes // 2 // rows * rows)
            elif smaller is not None and smaller < (parts or self.share):
                parts = smaller
            else:
                raise InputError(
                    f"m = {self.batch_size}: one lane per device needs {needed / GIB:.1f} GiB, there are {there / GIB:.1f}; "
                    "use a smaller batch size or model, lower precision, or more data_devices."
                )

    def lanes(self, rows: int) -> int:
        """How many lanes are wanted: one for each run, up to a limit, and as many in each row of devices."""
        wanted = min(self.experiment.lanes or min(len(self.runs), MOST_LANES), self.most_lanes or len(self.runs))
        return -(-wanted // rows) * rows

    def _parts(self, most: int | None) -> int | None:
        """Examples of a device's share that it takes at a time, at most so many if that can be; None for all at once."""
        if self.blocks is None:
            return None
        return micro_batch_size(self.experiment.model.norm, self.share, self.bn_batch_size, most, self.blocks.size)

    @property
    def blocks(self) -> Blocks | None:
        """How a batch is cut; None for an own model, which may do anything with its batch."""
        model = self.experiment.model
        return None if model.name.startswith(OWN) else blocks_of(model.norm, self.batch_size, self.bn_batch_size)

    def _compile(self, supply: InputPipeline, lanes: int, parts: int | None) -> LaneProgram:
        chosen, mesh = self.experiment, lane_mesh(data_devices=self.data_devices)
        mapping = self.mapping or lane_programs.lane_mapping()
        schedule = chosen.schedule
        axis_name = DATA if self.data_devices > 1 else None
        augment = chosen.dataset.augment and not isinstance(self.dataset, Photographs)  # which come augmented
        program = Program(
            self.batch_size,
            self.total_steps,
            schedule.boundaries,
            schedule.factor,
            axis_name,
            parts,
            augment,
            self.blocks,
        )
        bn_batch_size = None if self.bn_batch_size == self.batch_size else self.bn_batch_size
        return lane_programs.compile_lanes(
            self.model_of(bn_batch_size, axis_name=axis_name) if axis_name else self.model_of(bn_batch_size),
            program,
            supply.data(mesh, self.batch_size),
            mesh,
            lanes,
            supply.most_steps(mesh, self.batch_size, mapping == "map"),
            chosen.precision,
            mapping,
            statistics_model=self.statistics_model_of and self.statistics_model_of(self.bn_batch_size),
        )

    def settings(self, runs: list[Run | None]) -> Setting:
        """The scalars of the run in each lane, stacked; any valid ones where there is none."""
        return Setting(
            np.array([1.0 if run is None else run.base_lr for run in runs], np.float32),
            np.array([0 if run is None else run.seed for run in runs], np.int32),
            np.full(len(runs), self.experiment.weight_decay, np.float32),
            np.full(len(runs), self.experiment.schedule.warmup_fraction, np.float32),
        )
