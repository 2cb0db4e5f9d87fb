"""The experiment: frozen values made from a config, checked field by field; the grid → runs → programs.

Nothing here imports JAX, so bad input is refused before anything is compiled or written.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from smallbatch_jax.config import catalog, fields
from smallbatch_jax.config.datasets import DATASETS
from smallbatch_jax.config.fields import OWN, InputError, config_field
from smallbatch_jax.config.grid import Grid, Run, Search, listed, programs, require_divisor
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.config.optimizer import BETA_RULES, Optimizer
from smallbatch_jax.config.schedule import Schedule

__all__ = ["BETA_RULES", "OWN", "Experiment", "Grid", "InputError", "Optimizer", "Run", "Schedule"]
__all__ += ["default_config", "from_config", "programs", "single_run"]

BROKEN_IMAGES = ("fail", "skip")
BN_STATISTICS = ("running", "precise")  # running averages, or recomputed over training images at each evaluation
WEIGHT_DECAY_MASKS = ("all", "kernels")  # which parameters decay; kernels are arrays of two or more dimensions
PRECISIONS = ("float32", "tf32", "bfloat16")
KEEP_PARAMETERS = ("best", "all")  # which finished runs: the best of each batch size, or all

# Fields outside the grid that may differ when a workdir is resumed: selection, budget, place of the data, layout, trackers.
MAY_CHANGE = (
    *("select", "search.budget", "search.seconds", "search.confirm"),
    *("dataset.data_dir", "dataset.workers", "lanes", "data_devices", "micro_batch_size"),
    *("segment_seconds", "checkpoint_seconds", "tensorboard", "wandb", "keep_parameters", "keep_gib"),
)


@dataclass(frozen=True)
class Dataset:
    """`dataset`: where the images come from."""

    name: str = config_field("digits", fields.choice(DATASETS, "dataset", OWN))  # an entry of `config.datasets.DATASETS`
    data_dir: str | None = config_field(None, fields.text)  # folder of the data; None for a dataset that needs none
    # Pad 4, random crop, random flip (§3.1); for streamed images a random crop at a random scale, random flip (§3.5).
    augment: bool = config_field(False, fields.boolean)
    image_size: int | None = config_field(None, fields.integer(1))  # in pixels; only for streamed images
    color_jitter: bool = config_field(False, fields.boolean)  # only for streamed images, with `augment`
    # Whether an undecodable streamed image ends the sweep with an error that names it, or is replaced by the next image.
    broken_images: str = config_field("fail", fields.choice(BROKEN_IMAGES, "way"))
    workers: int | None = config_field(None, fields.integer(0, 1024))  # decoding processes; None: one per core
    subset: int | None = config_field(None, fields.integer(1))  # number of training examples; None: all of them
    validation_fraction: float = config_field(0.0, fields.below_one)  # of the training examples, held out for selection


@dataclass(frozen=True)
class Model:
    """`model`: the network and its normalisation."""

    name: str = config_field("alexnet", fields.choice(catalog.MODELS, "model", OWN))  # an entry of `config.catalog.MODELS`
    norm: str = config_field("none", fields.choice(catalog.NORMS, "norm"))  # an entry of `config.catalog.NORMS`
    bn_decay: float = config_field(0.99, fields.below_one)  # weight of the old running average of batch norm at each step
    # At evaluation: "running" averages, or "precise" statistics recomputed over training images.
    bn_statistics: str = config_field("running", fields.choice(BN_STATISTICS, "kind of statistics"))


@dataclass(frozen=True)
class Experiment:
    """The fields of a config. They decide the results of a workdir; a few decide only how fast the results come."""

    name: str = config_field("experiment", fields.folder_name)  # shown in results, tables and figures, such as "fig08"
    drawn_from: tuple[str, ...] = config_field((), fields.distinct(fields.text))  # workdirs of a figure that trains nothing
    dataset: Dataset = Dataset()
    model: Model = Model()
    epochs: int = config_field(8, fields.integer(1, 100_000))  # E, of every run whatever m
    weight_decay: float = config_field(0.0, fields.number(0, 1e6))  # λ of the penalty (λ/2)‖θ‖² in the loss
    weight_decay_mask: str = config_field("all", fields.choice(WEIGHT_DECAY_MASKS, "mask"))
    task: str = config_field("classification", fields.choice(catalog.TASKS, "task", OWN))  # the loss
    label_smoothing: float = config_field(0.0, fields.below_one)  # in training only; evaluation uses the plain loss
    metrics: tuple[str, ...] = config_field((), fields.distinct(fields.choice(catalog.METRICS, "metric", OWN)))  # further ones
    # Further columns that help explain training: names in `config.catalog.DIAGNOSTICS`.
    diagnostics: tuple[str, ...] = config_field((), fields.distinct(fields.choice(catalog.DIAGNOSTICS, "diagnostic")))
    # The results column that ranks runs, and "max" or "min"; None takes the task's.
    select: tuple[str, str] | None = config_field(None, fields.selection)
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    grid: Grid = Grid()
    search: Search = Search()
    # Precision of matrix products and convolutions; parameters and statistics are float32.
    precision: str = config_field("float32", fields.choice(PRECISIONS, "precision"))
    lanes: int | None = config_field(None, fields.integer(1, 4096))  # runs trained side by side; None: chosen by the runner
    # Number of devices that share each batch; None: one, or CPU cores that would be idle.
    data_devices: int | None = config_field(None, fields.integer(1, 65536))
    micro_batch_size: int | None = config_field(None, fields.integer(1))  # maximum micro-batch size; None: chosen by the runner
    segment_seconds: float = config_field(2.0, fields.positive(3600))  # target length of a segment
    checkpoint_seconds: float = config_field(30.0, fields.number(0, 1e6))  # minimum time between checkpoints
    tensorboard: bool = config_field(False, fields.boolean)  # whether WORKDIR/tensorboard shows the runs while they train
    wandb: str | None = config_field(None, fields.text)  # W&B project
    # Runs whose final parameters are kept in WORKDIR/parameters, of those that finish from now on, and the disk they may take.
    keep_parameters: str | None = config_field(None, fields.choice(KEEP_PARAMETERS, "choice"))
    keep_gib: float = config_field(4.0, fields.positive(1e6))

    def __post_init__(self) -> None:
        catalog.require_norm(self.model.name, self.model.norm)
        if self.model.bn_statistics == "precise" and not catalog.NORMS[self.model.norm].batch_statistics:
            raise InputError(
                f"model.bn_statistics: 'precise' recomputes the statistics of batch norm; {self.model.name} with norm "
                f"{self.model.norm!r} has none. Use 'running'."
            )
        self._require_task()
        self.optimizer.require_axes(self.grid.axes())
        self.search.require_grid(self.grid)
        for name, plain in (("weight_decay", 0.0), ("weight_decay_mask", "all")):
            if self.optimizer.name.startswith(OWN) and getattr(self, name) != plain:
                raise InputError(f"{name}: an own optimizer decays weights by itself, if at all; use {plain!r}.")
        self.schedule.require_growth(self.grid.batch_sizes, self.grid.warmup_fractions)
        for m in (size for first in self.grid.batch_sizes for size in self.schedule.batch_sizes(first)):
            for given in ({}, *({name: value} for name, values in self.grid.axes().items() for value in values)):
                self.optimizer.scalars(m, given)
        if self.grid.base_lrs_from:
            self.grid.shapes()
        else:
            self.runs()

    def runs(self) -> list[Run]:
        """Returns every run of the grid: batch sizes in the order given, then BN batch sizes, base learning rates, seeds.

        These are all the runs that a search may train, including the confirming seeds.

        Raises:
          InputError: if base learning rates are still to be read from other workdirs (`study.choose_base_lrs`).
        """
        if self.drawn_from:
            return []
        base_lrs = {m: self._base_lrs(m, dict(self.grid.base_lr_by_batch_size)) for m, _ in self.grid.shapes()}
        axes = self.grid.axes()
        points = [tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        return [
            Run(m, b, lr, seed, scalars)
            for m, b in self.grid.shapes()
            for lr in base_lrs[m]
            for scalars in points
            for seed in (*self.grid.seeds, *self.search.fresh_seeds(self.grid.seeds))
        ]

    def metric_names(self) -> tuple[str, ...]:
        """Returns the metrics beside the loss; their columns have the prefixes "train_", "test_" and "validation_"."""
        of_task = catalog.TASKS[self.task].metrics if self.task in catalog.TASKS else ()
        return (*of_task, *(name.removeprefix(OWN) for name in self.metrics))

    def splits(self) -> tuple[str, ...]:
        """Returns the splits that are evaluated after every epoch."""
        return ("test", "validation") if self.dataset.validation_fraction else ("test",)

    @property
    def metric(self) -> Metric:
        """The metric that ranks runs: `select`, or the task's on the validation split, or on the test split without one."""
        if self.select is not None:
            return Metric(*self.select)
        column, best = catalog.TASKS[self.task].select if self.task in catalog.TASKS else ("test_loss", "min")
        return Metric(column.replace("test_", f"{self.splits()[-1]}_"), best)

    def _require_task(self) -> None:
        """Raises InputError for metrics, label smoothing or a selection that the task does not have, or the wrong direction."""
        entry = catalog.TASKS.get(self.task)
        always = entry.metrics if entry else ()
        known = [name for name, metric in catalog.METRICS.items() if self.task in metric.functions and name not in always]
        for name in self.metrics:
            own = name.removeprefix(OWN)
            if own == name and name not in known:
                raise InputError(f"metrics: {name!r} is no further metric of the task {self.task!r}; it has {known or 'none'}.")
            taken = own == "loss" or f"train_{own}" in catalog.diagnostic_columns(self.diagnostics)
            if own != name and (not own.isidentifier() or self.metric_names().count(own) > 1 or taken):
                raise InputError(f"metrics: {fields.shown(own)} cannot name a metric of your own; use another identifier.")
        if self.label_smoothing and not (entry and entry.smoothing):
            raise InputError(f"label_smoothing: {self.label_smoothing:g} needs a task with classes, not {self.task!r}; use 0.")
        if self.select is not None:
            columns = [f"{split}_{name}" for split in ("train", *self.splits()) for name in ("loss", *self.metric_names())]
            if self.select[0] not in columns:
                raise InputError(f"select: {self.select[0]!r} is no column of the results; use one of {', '.join(columns)}.")
            name, best = self.metric.name, "max" if self.metric.fraction else "min"
            if name in ("loss", *catalog.METRICS) and OWN + name not in self.metrics and self.select[1] != best:
                raise InputError(f"select: got {self.select}, accepts {(self.select[0], best)}.")

    def _base_lrs(self, batch_size: int, chosen: Mapping[int, float]) -> tuple[float, ...]:
        if batch_size in chosen:
            return (chosen[batch_size],)
        if self.grid.base_lrs_from:
            raise InputError(f"grid.base_lrs_from: the best base_lr of batch size {batch_size} has not been read from there.")
        if chosen:
            raise InputError(f"grid.base_lr_by_batch_size: has no base_lr for batch size {batch_size}; give one for each.")
        return self.grid.base_lrs

    def require_examples(self, num_examples: int) -> None:
        """Raises InputError for a batch size that is, or grows, larger than the training set."""
        for m in self.grid.batch_sizes:
            if m > num_examples:
                raise InputError(
                    f"grid.batch_sizes (batch_size for one run): {m} is larger than the training set of {num_examples} "
                    f"examples; use 1 to {num_examples}."
                )
            self.schedule.require_examples(m, num_examples)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain nested values, as stored in a workdir."""
        return dataclasses.asdict(self)

    def can_share(self, batch_size: int, bn_batch_size: int, devices: int) -> bool:
        """Returns whether a batch, at all its sizes, splits evenly over devices, without splitting a BN group unevenly."""
        grouped = catalog.NORMS[self.model.norm].batch_statistics
        for m in self.schedule.batch_sizes(batch_size):
            b = m if bn_batch_size == batch_size else bn_batch_size
            if m % devices or (grouped and m // devices % b and b % (m // devices)):
                return False
        return True

    def require_shares(self) -> None:
        """Raises InputError if `data_devices` cannot share every batch of the grid."""
        devices = self.data_devices or 1
        for m, b in self.grid.shapes():
            if not self.can_share(m, b, devices):
                groups = f" in BN batches of {b}" if b != m else ""
                step = devices * b if b != m else devices  # whole BN groups on each device
                sizes = [size for size in (m // step * step, m // step * step + step) if size]
                fitting = [d for d in range(1, devices) if self.can_share(m, b, d)]
                raise InputError(
                    f"data_devices: {devices} devices cannot share a batch of {m}{groups} evenly. "
                    f"Use batch size {listed(sizes)}, or data_devices {listed(fitting)}."
                )


@dataclass(frozen=True)
class Config(Experiment):
    """The fields of a config for `train.py`: those of the experiment, and those that choose its one run."""

    batch_size: int | None = config_field(None, fields.integer(1))
    base_lr: float | None = config_field(None, fields.positive())
    bn_batch_size: int | None = config_field(None, fields.integer(1))
    seed: int = config_field(0, fields.integer(0))

    def experiment(self, **changes: Any) -> Experiment:
        """Returns the experiment, with changed fields, after checking `data_devices`."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(Experiment)}
        found = Experiment(**kept | changes)
        found.require_shares()
        return found


class _Float(float):
    """A float whose ConfigDict field keeps any value as given; in a field with a plain float True would become 1.0."""


def default_config() -> Any:
    """Returns a ConfigDict with every field at its default, from which a config file starts.

    Its fields take any value: `from_config` checks them all and reports what a field accepts.
    """
    return _default(Config())


def _default(value: Any) -> Any:
    if dataclasses.is_dataclass(value):  # a dict given for one of its fields stays a dict, whatever its keys
        defaults = {field.name: _default(field.default) for field in dataclasses.fields(value)}
        return ConfigDict(defaults, type_safe=False, convert_dict=isinstance(value, Config))
    return _Float(value) if isinstance(value, float) else value


def from_config(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Returns the checked experiment of a config; fields that choose one run are checked and left out.

    Raises:
      InputError: for the first field that cannot be used, with its value and what is accepted.
    """
    return fields.parse(Config, config).experiment()


def single_run(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Returns the checked experiment of a config, its grid narrowed to the one run of `batch_size`, `base_lr` and `seed`.

    Raises:
      InputError: as `from_config`; or if batch_size or base_lr is not given, or bn_batch_size does not divide batch_size.
    """
    found = fields.parse(Config, config)
    if found.batch_size is None or found.base_lr is None:
        missing = "batch_size" if found.batch_size is None else "base_lr"
        raise InputError(f"{missing}: not given; one run needs --config.batch_size and --config.base_lr.")
    b = found.bn_batch_size
    if b is not None:
        require_divisor(b, found.batch_size, "bn_batch_size")
    bn_batch_sizes = None if b is None else (b,)
    return found.experiment(
        grid=Grid((found.batch_size,), (found.base_lr,), bn_batch_sizes=bn_batch_sizes, seeds=(found.seed,)), search=Search()
    )


def differences(stored: Experiment, asked: Experiment) -> list[str]:
    """Returns a phrase for each field that prevents `stored`'s workdir from being resumed as `asked`; empty if none does.

    The grid may grow. Its old runs are kept, so none of them may be missing from the new grid, except those that confirmed
    the choice of a search.
    """
    old, new = _flat(stored.to_dict()), _flat(asked.to_dict())
    found = [
        f"{name} is {fields.shown(old[name])} there and {fields.shown(new[name])} here"
        for name in new
        if name not in MAY_CHANGE and not name.startswith("grid.") and old[name] != new[name]
    ]
    missing = sorted({run for run in stored.runs() if run.seed in stored.grid.seeds} - set(asked.runs()))
    if missing:
        run = missing[0]
        scalars = "".join(f", {name} {value!r}" for name, value in run.scalars)
        found.append(
            f"grid lacks {len(missing)} run(s) there, the first with batch_size {run.batch_size}, bn_batch_size "
            f"{run.bn_batch_size}, base_lr {run.base_lr!r}, seed {run.seed}{scalars} (a grid may grow, not shrink)"
        )
    return found


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by dotted name."""
    flat = {}
    for name, value in sections.items():
        flat |= {f"{name}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {name: value}
    return flat
