"""What to train: frozen values made from a config, checked field by field; the grid → runs → programs.

Nothing here imports JAX, so bad input is refused before anything is compiled or written.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from smallbatch_jax.config import catalog, fields
from smallbatch_jax.config.datasets import DATASETS
from smallbatch_jax.config.fields import InputError, config_field
from smallbatch_jax.config.optimizer import BETA_RULES, Optimizer

__all__ = ["BETA_RULES", "Experiment", "InputError", "Optimizer", "Run", "default_config", "from_config", "single_run"]

BROKEN_IMAGES = ("fail", "skip")
OWN = "own:"  # begins the name of a model or dataset that a Python caller brought; no command can make one
BN_STATISTICS = ("running", "precise")  # running averages, or recomputed over training images at each evaluation
WEIGHT_DECAY_MASKS = ("all", "kernels")  # which parameters decay; kernels are arrays of two or more dimensions
PRECISIONS = ("float32", "tf32", "bfloat16")
KEEP_PARAMETERS = ("best", "all")  # of the finished runs: the best of each batch size, or every one
MOST_RUNS = 100_000  # in a grid: far beyond any study, and still listed at once

# Fields outside the grid that may differ when a workdir is resumed: place of the data, layout of the work, trackers.
MAY_CHANGE = (
    *("dataset.data_dir", "dataset.workers", "lanes", "data_devices", "micro_batch_size"),
    *("segment_seconds", "checkpoint_seconds", "tensorboard", "wandb", "keep_parameters", "keep_gib"),
)


@dataclass(frozen=True)
class Dataset:
    """`dataset`: where the images come from."""

    name: str = config_field("digits", fields.choice(DATASETS, "dataset", OWN))
    data_dir: str | None = config_field(None, fields.text)
    # Pad 4, random crop, random flip (§3.1); for streamed images a random crop at a random scale, random flip (§3.5).
    augment: bool = config_field(False, fields.boolean)
    image_size: int | None = config_field(None, fields.integer(1))  # in pixels; only for streamed images
    color_jitter: bool = config_field(False, fields.boolean)  # only for streamed images, with `augment`
    # A streamed image that cannot be decoded ends the sweep with its path, or the next image takes its place.
    broken_images: str = config_field("fail", fields.choice(BROKEN_IMAGES, "way"))
    workers: int | None = config_field(None, fields.integer(0, 1024))  # decoding processes; None: one per core


@dataclass(frozen=True)
class Model:
    """`model`: the network and its normalisation."""

    name: str = config_field("alexnet", fields.choice(catalog.MODELS, "model", OWN))
    norm: str = config_field("none", fields.choice(catalog.NORMS, "norm"))
    bn_decay: float = config_field(0.99, fields.decay)  # of batch norm's running averages
    bn_statistics: str = config_field("running", fields.choice(BN_STATISTICS, "kind of statistics"))  # at evaluation


@dataclass(frozen=True)
class Schedule:
    """`schedule`: unitless multipliers of the base learning rate; see `optim.step_schedule`."""

    boundaries: tuple[float, ...] = config_field((0.5, 0.75), fields.distinct(fields.number(0, 1), most=100))
    factor: float = config_field(0.1, fields.positive(1))
    warmup_fraction: float = config_field(0.0, fields.number(0, 1))


@dataclass(frozen=True)
class Grid:
    """`grid`: every batch size × BN batch size × base learning rate × seed is one run."""

    batch_sizes: tuple[int, ...] = config_field((2, 8, 32), fields.distinct(fields.integer(1), least=1))
    base_lrs: tuple[float, ...] = config_field((2**-8,), fields.distinct(fields.positive(), least=1))
    # Either replaces base_lrs: workdirs in whose results each batch size finds its best base_lr (Fig. 13), or that base_lr.
    base_lrs_from: tuple[str, ...] = config_field((), fields.distinct(fields.text))
    base_lr_by_batch_size: tuple[tuple[int, float], ...] = config_field((), fields.by_batch_size(fields.positive()))
    bn_batch_sizes: tuple[int, ...] | None = config_field(None, fields.distinct(fields.integer(1), least=1))
    seeds: tuple[int, ...] = config_field((0,), fields.distinct(fields.integer(0), least=1))

    def __post_init__(self) -> None:
        rates = 1 if self.base_lr_by_batch_size or self.base_lrs_from else len(self.base_lrs)
        most = len(self.batch_sizes) * len(self.bn_batch_sizes or (None,)) * rates * len(self.seeds)
        if most > MOST_RUNS:
            raise InputError(f"grid: got {most} combinations of its values, accepts at most {MOST_RUNS} runs in all.")

    def shapes(self) -> list[tuple[int, int]]:
        """Every (batch size, BN batch size): a batch size is crossed with the BN batch sizes up to it, which must divide it."""
        pairs = [(m, b) for m in self.batch_sizes for b in self.bn_batch_sizes or (m,) if b <= m]
        for m, b in pairs:
            require_divisor(b, m, "grid.bn_batch_sizes")
        if not pairs:
            raise InputError(
                f"grid.bn_batch_sizes: {fields.shown(self.bn_batch_sizes)} leaves no run, every one is larger than "
                f"every batch size in {fields.shown(self.batch_sizes)}. Use some that divide the batch sizes."
            )
        return pairs


@dataclass(frozen=True, order=True)
class Run:
    """One training, from initialisation to the last epoch."""

    batch_size: int
    bn_batch_size: int
    base_lr: float
    seed: int


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the results of a workdir, and a few fields that only decide how fast they come."""

    name: str = config_field("experiment", fields.folder_name)
    drawn_from: tuple[str, ...] = config_field((), fields.distinct(fields.text))  # workdirs of a figure that trains nothing
    dataset: Dataset = Dataset()
    model: Model = Model()
    epochs: int = config_field(8, fields.integer(1, 100_000))
    weight_decay: float = config_field(0.0, fields.number(0, 1e6))
    weight_decay_mask: str = config_field("all", fields.choice(WEIGHT_DECAY_MASKS, "mask"))
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    grid: Grid = Grid()
    precision: str = config_field("float32", fields.choice(PRECISIONS, "precision"))
    lanes: int | None = config_field(None, fields.integer(1, 4096))  # None: chosen by the runner
    data_devices: int | None = config_field(None, fields.integer(1, 65536))  # number of devices that share each batch
    micro_batch_size: int | None = config_field(None, fields.integer(1))  # at most, per device
    segment_seconds: float = config_field(2.0, fields.positive(3600))  # work between two visits to the host
    checkpoint_seconds: float = config_field(30.0, fields.number(0, 1e6))  # least time between two checkpoints
    tensorboard: bool = config_field(False, fields.boolean)  # whether WORKDIR/tensorboard shows the runs while they train
    wandb: str | None = config_field(None, fields.text)  # W&B project
    # Which final parameters WORKDIR/parameters keeps of the runs that finish from now on, and how much disk they may take.
    keep_parameters: str | None = config_field(None, fields.choice(KEEP_PARAMETERS, "choice"))
    keep_gib: float = config_field(4.0, fields.positive(1e6))

    def __post_init__(self) -> None:
        catalog.require_norm(self.model.name, self.model.norm)
        if self.model.bn_statistics == "precise" and not catalog.NORMS[self.model.norm].batch_statistics:
            raise InputError(
                f"model.bn_statistics: 'precise' recomputes the statistics of batch norm; {self.model.name} with norm "
                f"{self.model.norm!r} has none. Use 'running'."
            )
        for m in self.grid.batch_sizes:
            self.optimizer.scalars(m)
        if self.grid.base_lrs_from:
            self.grid.shapes()
        else:
            self.runs()

    def runs(self) -> list[Run]:
        """Every run of the grid: batch sizes in the order given, then BN batch sizes, base learning rates, seeds.

        Raises:
          InputError: if base learning rates are still to be read from other workdirs (`study.choose_base_lrs`).
        """
        if self.drawn_from:
            return []
        base_lrs = {m: self._base_lrs(m, dict(self.grid.base_lr_by_batch_size)) for m, _ in self.grid.shapes()}
        return [Run(m, b, lr, seed) for m, b in self.grid.shapes() for lr in base_lrs[m] for seed in self.grid.seeds]

    def _base_lrs(self, batch_size: int, chosen: Mapping[int, float]) -> tuple[float, ...]:
        if batch_size in chosen:
            return (chosen[batch_size],)
        if self.grid.base_lrs_from:
            raise InputError(f"grid.base_lrs_from: the best base_lr of batch size {batch_size} has not been read from there.")
        if chosen:
            raise InputError(f"grid.base_lr_by_batch_size: has no base_lr for batch size {batch_size}; give one for each.")
        return self.grid.base_lrs

    def require_examples(self, num_examples: int) -> None:
        """Refuses a batch size larger than the training set."""
        for m in self.grid.batch_sizes:
            if m > num_examples:
                raise InputError(
                    f"grid.batch_sizes (batch_size for one run): {m} is larger than the training set of {num_examples} "
                    f"examples; use 1 to {num_examples}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as stored in a workdir."""
        return dataclasses.asdict(self)

    def can_share(self, batch_size: int, bn_batch_size: int, devices: int) -> bool:
        """Returns whether a batch can be split evenly over this many devices, without splitting a BN group unevenly."""
        if batch_size % devices:
            return False
        share = batch_size // devices
        grouped = catalog.NORMS[self.model.norm].batch_statistics
        return not grouped or share % bn_batch_size == 0 or bn_batch_size % share == 0

    def require_shares(self) -> None:
        """Refuses `data_devices` that cannot share a batch of the grid."""
        devices = self.data_devices or 1
        for m, b in self.grid.shapes():
            if not self.can_share(m, b, devices):
                groups = f" in BN batches of {b}" if b != m else ""
                step = devices * b if b != m else devices  # whole BN groups on each device
                sizes = [size for size in (m // step * step, m // step * step + step) if size]
                fitting = [d for d in range(1, devices) if self.can_share(m, b, d)]
                raise InputError(
                    f"data_devices: {devices} devices cannot share a batch of {m}{groups} evenly. "
                    f"Use batch size {_listed(sizes)}, or data_devices {_listed(fitting)}."
                )


def require_divisor(bn_batch_size: int, batch_size: int, field: str) -> None:
    """Refuses a BN batch size that does not split the SGD batch into equal parts (§3.6)."""
    if batch_size % bn_batch_size:
        small = [b for b in range(1, math.isqrt(batch_size) + 1) if batch_size % b == 0]
        listed = _listed(sorted({*small, *(batch_size // b for b in small)}))
        raise InputError(
            f"{field}: {bn_batch_size} does not divide batch size {batch_size}; each SGD batch is split into equal BN "
            f"sub-batches. Use {listed}."
        )


def _listed(choices: Sequence[int]) -> str:
    """1, 2 or 4; the middle of a long list is left out."""
    named = [str(choice) for choice in choices]
    if len(named) > 12:
        named = [*named[:6], "…", *named[-5:]]
    return " or ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


@dataclass(frozen=True)
class Config(Experiment):
    """All fields of a config: those of the experiment, and those that choose the one run of `train.py`."""

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

    It takes any value: `from_config` checks them all, and says what a field accepts.
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
    """Returns the checked experiment of a config, its grid narrowed to the one run that the config's own fields choose."""
    found = fields.parse(Config, config)
    if found.batch_size is None or found.base_lr is None:
        missing = "batch_size" if found.batch_size is None else "base_lr"
        raise InputError(f"{missing}: not given; one run needs --config.batch_size and --config.base_lr.")
    b = found.bn_batch_size
    if b is not None:
        require_divisor(b, found.batch_size, "bn_batch_size")
    bn_batch_sizes = None if b is None else (b,)
    return found.experiment(
        grid=Grid((found.batch_size,), (found.base_lr,), bn_batch_sizes=bn_batch_sizes, seeds=(found.seed,))
    )


def programs(runs: Iterable[Run]) -> dict[tuple[int, int], list[Run]]:
    """Groups runs by (batch size, BN batch size), the shape of one program, lowest base_lr first.

    High rates tend to diverge, that is to end early: started last, they fill the lanes that the others leave.
    """
    by_shape: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        by_shape.setdefault((run.batch_size, run.bn_batch_size), []).append(run)
    return {shape: sorted(members, key=lambda run: (run.base_lr, run.seed)) for shape, members in by_shape.items()}


def differences(stored: Experiment, asked: Experiment) -> list[str]:
    """One phrase for each field that keeps `stored`'s workdir from being resumed as `asked`; empty if none does.

    The grid may grow. Its old runs are kept, so none of them may be missing from the new grid.
    """
    old, new = _flat(stored.to_dict()), _flat(asked.to_dict())
    found = [
        f"{name} is {fields.shown(old[name])} there and {fields.shown(new[name])} here"
        for name in new
        if name not in MAY_CHANGE and not name.startswith("grid.") and old[name] != new[name]
    ]
    missing = sorted(set(stored.runs()) - set(asked.runs()))
    if missing:
        run = missing[0]
        found.append(
            f"grid lacks {len(missing)} run(s) there, the first with batch_size {run.batch_size}, bn_batch_size "
            f"{run.bn_batch_size}, base_lr {run.base_lr:g}, seed {run.seed} (a grid may grow, not shrink)"
        )
    return found


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by dotted name."""
    flat = {}
    for name, value in sections.items():
        flat |= {f"{name}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {name: value}
    return flat
