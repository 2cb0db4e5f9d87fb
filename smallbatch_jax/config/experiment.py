"""What to train: frozen values made from a config, checked field by field; the grid → runs → programs.

Nothing here imports JAX, so bad input is refused before anything heavy is loaded, compiled or written.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from smallbatch_jax.config import fields
from smallbatch_jax.config.datasets import DATASETS
from smallbatch_jax.config.fields import InputError, config_field

__all__ = ["Experiment", "InputError", "Run", "default_config", "from_config", "single_run"]

BROKEN_IMAGES = ("fail", "skip")
NORMS = ("none", "batch", "group", "batch_renorm")
MODEL_NORMS = {"alexnet": (*NORMS, "batch_conv_only")} | dict.fromkeys(("resnet8", "resnet20", "resnet32", "resnet50"), NORMS)
OWN = "own:"  # begins the name of a model or dataset that a Python caller brought; no command can make one
BN_STATISTICS = ("running", "precise")  # running averages, or recomputed over training images at each evaluation
PRECISIONS = ("float32", "tf32", "bfloat16")
MOST_RUNS = 100_000  # of a grid: far beyond any study, and still listed at once
ALL_NORMS = tuple(dict.fromkeys(norm for norms in MODEL_NORMS.values() for norm in norms))

# What may differ when a workdir is resumed: where the data lies, how the work is laid out, where it can be watched, and
# train.py's own choice of one run, which is in the grid by then.
MAY_CHANGE = (
    "dataset.data_dir",
    "dataset.workers",
    "lanes",
    "data_devices",
    "micro_batch_size",
    "segment_seconds",
    "checkpoint_seconds",
    "tensorboard",
    "wandb",
)


@dataclass(frozen=True)
class Dataset:
    """`dataset`: where the images come from."""

    name: str = config_field("digits", fields.choice(tuple(DATASETS), "dataset", OWN))
    data_dir: str | None = config_field(None, fields.optional(fields.text), str)
    # Pad 4, random crop, random flip (§3.1); of streamed images a random crop at a random scale, random flip (§3.5).
    augment: bool = config_field(False, fields.boolean)
    image_size: int | None = config_field(None, fields.optional(fields.integer(1)), int)  # of streamed images, in pixels
    color_jitter: bool = config_field(False, fields.boolean)  # of streamed images, if augmented
    # What becomes of a streamed image that cannot be decoded: the sweep ends with its path, or the next one takes its place.
    broken_images: str = config_field("fail", fields.choice(BROKEN_IMAGES, "way"))
    workers: int | None = config_field(None, fields.optional(fields.integer(0, 1024)), int)  # that decode; None: one per core


@dataclass(frozen=True)
class Model:
    """`model`: the network and its normalisation."""

    name: str = config_field("alexnet", fields.choice(tuple(MODEL_NORMS), "model", OWN))
    norm: str = config_field("none", fields.choice(ALL_NORMS, "norm"))
    bn_decay: float = config_field(0.99, fields.decay)  # of the running averages of batch norm
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
    # Workdirs from whose results each batch size takes its best base_lr (Fig. 13), and what it is, once that is known;
    # either of them replaces base_lrs.
    base_lrs_from: tuple[str, ...] = config_field((), fields.distinct(fields.text))
    base_lr_by_batch_size: tuple[tuple[int, float], ...] = config_field((), fields.by_batch_size(fields.positive()))
    bn_batch_sizes: tuple[int, ...] | None = config_field(
        None, fields.optional(fields.distinct(fields.integer(1), least=1)), tuple
    )
    seeds: tuple[int, ...] = config_field((0,), fields.distinct(fields.integer(0, 2**31 - 1), least=1))

    def __post_init__(self) -> None:
        chosen = self.base_lr_by_batch_size or self.base_lrs_from
        counts = {
            "batch_sizes": len(self.batch_sizes),
            "bn_batch_sizes": len(self.bn_batch_sizes or (None,)),
            "base_lrs": 1 if chosen else len(self.base_lrs),
            "seeds": len(self.seeds),
        }
        if math.prod(counts.values()) > MOST_RUNS:
            factors = " × ".join(f"{count} {name}" for name, count in counts.items())
            raise InputError(f"grid: got {factors}, accepts at most {MOST_RUNS} runs in all.")


@dataclass(frozen=True, order=True)
class Run:
    """One training, from initialisation to the last epoch."""

    batch_size: int
    bn_batch_size: int
    base_lr: float
    seed: int


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the results of a workdir, and a few things that only decide how fast they come."""

    name: str = config_field("experiment", fields.folder_name)
    drawn_from: tuple[str, ...] = config_field((), fields.distinct(fields.text))  # workdirs of a figure that trains nothing
    dataset: Dataset = config_field(Dataset(), fields.nested(Dataset))
    model: Model = config_field(Model(), fields.nested(Model))
    epochs: int = config_field(8, fields.integer(1, 100_000))
    weight_decay: float = config_field(0.0, fields.number(0, 1e6))
    schedule: Schedule = config_field(Schedule(), fields.nested(Schedule))
    grid: Grid = config_field(Grid(), fields.nested(Grid))
    precision: str = config_field("float32", fields.choice(PRECISIONS, "precision"))
    lanes: int | None = config_field(None, fields.optional(fields.integer(1, 4096)), int)  # None: chosen by the driver
    data_devices: int | None = config_field(None, fields.optional(fields.integer(1, 65536)), int)  # that share each batch
    micro_batch_size: int | None = config_field(None, fields.optional(fields.integer(1)), int)  # most at a time, per device
    segment_seconds: float = config_field(2.0, fields.positive(3600))  # work between two visits to the host
    checkpoint_seconds: float = config_field(30.0, fields.number(0, 1e6))  # least time between two checkpoints
    tensorboard: bool = config_field(False, fields.boolean)  # whether WORKDIR/tensorboard shows the runs, also while they train
    wandb: str | None = config_field(None, fields.optional(fields.text), str)  # the W&B project that shows them

    def __post_init__(self) -> None:
        known = MODEL_NORMS.get(self.model.name, ALL_NORMS)
        if self.model.norm not in known:
            raise InputError(f"model.norm: {self.model.name} has no norm {self.model.norm!r}; it accepts {', '.join(known)}.")
        if self.model.bn_statistics == "precise" and self.model.norm in ("none", "group"):
            raise InputError(
                f"model.bn_statistics: 'precise' recomputes the statistics of batch norm; {self.model.name} with norm "
                f"{self.model.norm!r} has none. Use 'running'."
            )
        if self.grid.base_lrs_from:
            self._batch_sizes()
        else:
            self.runs()

    def runs(self) -> list[Run]:
        """Every run of the grid: batch sizes in the order given, then BN batch sizes, base learning rates, seeds.

        Raises:
          InputError: if base learning rates are still to be read from other workdirs (`study.choose_base_lrs`).
        """
        if self.drawn_from:
            return []
        seeds, chosen = self.grid.seeds, dict(self.grid.base_lr_by_batch_size)
        return [Run(m, b, lr, seed) for m, b in self._batch_sizes() for lr in self._base_lrs(m, chosen) for seed in seeds]

    def _base_lrs(self, batch_size: int, chosen: Mapping[int, float]) -> tuple[float, ...]:
        if batch_size in chosen:
            return (chosen[batch_size],)
        if self.grid.base_lrs_from:
            raise InputError(f"grid.base_lrs_from: the best base_lr of batch size {batch_size} has not been read from there.")
        if chosen:
            raise InputError(f"grid.base_lr_by_batch_size: has no base_lr for batch size {batch_size}; give one for each.")
        return self.grid.base_lrs

    def _batch_sizes(self) -> list[tuple[int, int]]:
        """Every (batch size, BN batch size) of the grid."""
        pairs = [(m, b) for m in self.grid.batch_sizes for b in self._bn_batch_sizes(m)]
        if not pairs:
            raise InputError(
                f"grid.bn_batch_sizes: {fields.shown(self.grid.bn_batch_sizes)} leaves no run, every one is larger than "
                f"every batch size in {fields.shown(self.grid.batch_sizes)}. Use some that divide the batch sizes."
            )
        return pairs

    def _bn_batch_sizes(self, batch_size: int) -> list[int]:
        """The BN batch sizes that `batch_size` is crossed with: those not larger, each of which must divide it."""
        if self.grid.bn_batch_sizes is None:
            return [batch_size]
        smaller = [b for b in self.grid.bn_batch_sizes if b <= batch_size]
        for b in smaller:
            require_divisor(b, batch_size, "grid.bn_batch_sizes")
        return smaller

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
        """Whether so many devices can share a batch: as many examples on each, and BN batches not cut anyhow.

        Without a batch norm any part of a batch will do; else a BN batch must divide a device's share, or be several of them.
        """
        if batch_size % devices:
            return False
        share = batch_size // devices
        return self.model.norm in ("none", "group") or share % bn_batch_size == 0 or bn_batch_size % share == 0

    def require_shares(self) -> None:
        """Refuses `data_devices` that cannot share a batch of the grid."""
        asked = self.data_devices or 1
        for m, b in self._batch_sizes():
            if self.can_share(m, b, asked):
                continue
            bn = f" in BN batches of {b}" if b != m else ""
            multiples = range(m // asked * asked, 0, -asked), itertools.count(m // asked * asked + asked, asked)
            found = [next((size for size in sizes if self._shares_like(m, b, size)), None) for sizes in multiples]
            fitting = [d for d in range(1, asked) if self.can_share(m, b, d)]
            raise InputError(
                f"data_devices: {asked} devices cannot share a batch of {m}{bn} evenly. Use batch size "
                f"{_listed([size for size in found if size])}, or data_devices {_listed(fitting)}."
            )

    def _shares_like(self, batch_size: int, bn_batch_size: int, other: int) -> bool:
        """Whether another batch size, with the same BN batches or a single one as this, would do for `data_devices`."""
        b = other if bn_batch_size == batch_size else bn_batch_size
        return other % b == 0 and self.can_share(other, b, self.data_devices or 1)


def require_divisor(bn_batch_size: int, batch_size: int, field: str) -> None:
    """Refuses a BN batch size that does not cut the SGD batch into equal parts (§3.6)."""
    if batch_size % bn_batch_size:
        small = [b for b in range(1, math.isqrt(batch_size) + 1) if batch_size % b == 0]
        listed = _listed(sorted({*small, *(batch_size // b for b in small)}))
        raise InputError(
            f"{field}: {bn_batch_size} does not divide batch size {batch_size}; each SGD batch is split into equal BN "
            f"sub-batches. Use {listed}."
        )


def _listed(choices: Sequence[int]) -> str:
    """1, 2 or 4; those in the middle left out if there are many."""
    named = [str(choice) for choice in choices]
    if len(named) > 12:
        named = [*named[:6], "…", *named[-5:]]
    return ", ".join(named[:-1]) + " or " + named[-1] if len(named) > 1 else "".join(named)


@dataclass(frozen=True)
class OneRun:
    """The fields of a config that choose the one run of `train.py`."""

    batch_size: int | None = config_field(None, fields.optional(fields.integer(1)), int)
    base_lr: float | None = config_field(None, fields.optional(fields.positive()), float)
    bn_batch_size: int | None = config_field(None, fields.optional(fields.integer(1)), int)
    seed: int = config_field(0, fields.integer(0, 2**31 - 1))


def default_config() -> Any:
    """A ConfigDict with every field there is, at its default; what a config file starts from.

    It takes any value: `from_config` checks them all, and says what a field accepts.
    """
    return ConfigDict({**_defaults(Experiment), **_defaults(OneRun)}, type_safe=False)


def _defaults(kind: type) -> dict[str, Any]:
    return {field.name: _default(field.default) for field in dataclasses.fields(kind)}


def _default(value: Any) -> Any:
    if dataclasses.is_dataclass(value):  # a dict given for one of its fields stays a dict, whatever its keys
        return ConfigDict(_defaults(type(value)), type_safe=False, convert_dict=False)
    return _Float(value) if isinstance(value, float) else value


class _Float(float):
    """A float that a ConfigDict replaces by any value as it is; for a plain float it would turn True into 1.0."""


def require_field(path: str) -> dataclasses.Field:
    """Returns the field of a config that a dotted name refers to; refuses a name that refers to none."""
    known, prefix, field = [*dataclasses.fields(Experiment), *dataclasses.fields(OneRun)], "", None
    for name in path.split("."):
        if field is not None and not dataclasses.is_dataclass(field.default):
            raise InputError(f"{path}: unknown field; {prefix[:-1]} has no fields of its own.")
        fields.refuse_unknown({name: None}, [field.name for field in known], prefix)
        field = next(field for field in known if field.name == name)
        prefix = f"{prefix}{name}."
        known = dataclasses.fields(field.default) if dataclasses.is_dataclass(field.default) else ()
    assert field is not None
    return field


def override(config: ConfigDict, texts: Mapping[str, str]) -> None:
    """Sets fields of a config, by dotted name, to the values of their texts; sections before their fields."""
    for path in sorted(texts, key=lambda path: path.count(".")):
        _put(config, path, fields.read(require_field(path), texts[path]))


def _put(config: ConfigDict, path: str, value: Any) -> None:
    if dataclasses.is_dataclass(require_field(path).default) and isinstance(value, dict):
        for name in value:  # the section's other fields keep their values
            _put(config, f"{path}.{name}", value[name])
        return
    *sections, name = path.split(".")
    target = config
    for section in sections:
        if section not in target:
            with target.unlocked():
                target[section] = ConfigDict(type_safe=False)
        target = target[section]
        if not isinstance(target, ConfigDict):
            raise InputError(f"{section}: got {fields.shown(target)}, accepts a section with fields such as {path}.")
    with target.unlocked(), target.ignore_type():
        target[name] = value


def from_config(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """The checked experiment of a config; fields that choose one run are checked and left out.

    Raises:
      InputError: naming the first field that cannot be used, what it got and what it accepts.
    """
    experiment = _split(config)[0]
    experiment.require_shares()
    return experiment


def single_run(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """The checked experiment of a config with its grid narrowed to the one run that the config's own fields choose."""
    experiment, run = _split(config)
    if run.batch_size is None or run.base_lr is None:
        missing = "batch_size" if run.batch_size is None else "base_lr"
        raise InputError(f"{missing}: not given; one run needs --config.batch_size and --config.base_lr.")
    b = run.bn_batch_size
    if b is not None:
        require_divisor(b, run.batch_size, "bn_batch_size")
    bn_batch_sizes = None if b is None else (b,)
    grid = Grid((run.batch_size,), (run.base_lr,), bn_batch_sizes=bn_batch_sizes, seeds=(run.seed,))
    chosen = dataclasses.replace(experiment, grid=grid)
    chosen.require_shares()
    return chosen


def _split(config: ConfigDict | Mapping[str, Any]) -> tuple[Experiment, OneRun]:
    values = _plain(config)
    one_run = {field.name for field in dataclasses.fields(OneRun)}
    known = [field.name for field in dataclasses.fields(Experiment)] + sorted(one_run)
    if not isinstance(values, dict):
        raise InputError(
            f"config: got {fields.shown(config)}, accepts a ConfigDict or dict with the fields {', '.join(known)}."
        )
    fields.refuse_unknown(values, known, "")
    run = fields.parse(OneRun, {k: v for k, v in values.items() if k in one_run}, "")
    experiment = fields.parse(Experiment, {k: v for k, v in values.items() if k not in one_run}, "")
    return experiment, run


def programs(runs: Iterable[Run]) -> dict[tuple[int, int], list[Run]]:
    """Runs by (batch size, BN batch size): what one program can train side by side, lowest base_lr first.

    High rates tend to diverge, that is to end early: started last, they fill the slots that the others leave.
    """
    by_shape: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        by_shape.setdefault((run.batch_size, run.bn_batch_size), []).append(run)
    return {shape: sorted(members, key=lambda r: (r.base_lr, r.seed)) for shape, members in by_shape.items()}


def differences(stored: Experiment, asked: Experiment) -> list[str]:
    """What stands in the way of going on with `stored`'s workdir as `asked`: one phrase per field, empty if nothing.

    The grid may grow. Its old runs are kept, so none of them may be missing from the new grid.
    """
    old, new = _flat(stored.to_dict()), _flat(asked.to_dict())
    found = [
        f"{name} is {fields.shown(old[name])} there and {fields.shown(new[name])} here"
        for name in new
        if name not in MAY_CHANGE and not name.startswith("grid.") and old.get(name) != new[name]
    ]
    missing = sorted(set(stored.runs()) - set(asked.runs()))
    if missing:
        run = missing[0]
        found.append(
            f"grid lacks {len(missing)} run(s) there, the first with batch_size {run.batch_size}, bn_batch_size "
            f"{run.bn_batch_size}, base_lr {run.base_lr:g}, seed {run.seed} (a grid may grow, not shrink)"
        )
    return found


def _plain(config: Any, path: str = "", depth: int = 3) -> Any:
    """Nested dicts of a config's sections, no deeper than its fields go: a config may even contain itself."""
    if not depth or not isinstance(config, (ConfigDict, Mapping)):
        return config
    plain, reading = {}, path or "config"
    try:
        for name in config:
            reading = f"{path}.{fields.label(name)}" if path else fields.label(name)
            plain[name] = _plain(config[name], reading, depth - 1)
    except InputError:
        raise
    except Exception as error:  # a reference that has no value or cannot be worked out; names that cannot be sorted
        raise InputError(f"{reading}: cannot be read: {type(error).__name__}: {fields.cut(str(error))}") from None
    return plain


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    return flat
