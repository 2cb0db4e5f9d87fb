"""The section `grid` of a config, and its runs grouped by program."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smallbatch_jax.config import catalog, fields
from smallbatch_jax.config.fields import InputError, config_field

MOST_RUNS = 100_000  # maximum runs in a grid: far beyond any study, yet still listed quickly


@dataclass(frozen=True)
class Grid:
    """`grid`: one run for every batch size × BN batch size × base learning rate × seed × value of the other axes."""

    batch_sizes: tuple[int, ...] = config_field((2, 8, 32), fields.distinct(fields.integer(1), least=1))  # m
    base_lrs: tuple[float, ...] = config_field((2**-8,), fields.distinct(fields.positive(), least=1))  # η̃ = η/m
    # Replaces base_lrs: workdirs whose results give the best base_lr of each batch size (Fig. 13).
    base_lrs_from: tuple[str, ...] = config_field((), fields.distinct(fields.text))
    # Replaces base_lrs: pairs of a batch size and its base_lr, one for each batch size.
    base_lr_by_batch_size: tuple[tuple[int, float], ...] = config_field((), fields.by_batch_size(fields.positive()))
    # b, each combined with every batch size m ≥ b, which it must divide; None: b = m.
    bn_batch_sizes: tuple[int, ...] | None = config_field(None, fields.distinct(fields.integer(1), least=1))
    seeds: tuple[int, ...] = config_field((0,), fields.distinct(fields.integer(0), least=1))  # of initial values and data order
    # Further axes, none by default: values of `weight_decay`, `schedule.warmup_fraction` and of the optimizer's scalars.
    weight_decays: tuple[float, ...] = config_field((), fields.distinct(fields.number(0, 1e6)))
    warmup_fractions: tuple[float, ...] = config_field((), fields.distinct(fields.number(0, 1)))
    momenta: tuple[float, ...] = config_field((), fields.distinct(fields.below_one))
    beta1s: tuple[float, ...] = config_field((), fields.distinct(fields.below_one))
    beta2s: tuple[float, ...] = config_field((), fields.distinct(fields.below_one))
    beta1_half_lives: tuple[float, ...] = config_field((), fields.distinct(fields.positive()))  # in examples
    beta2_half_lives: tuple[float, ...] = config_field((), fields.distinct(fields.positive()))  # in examples
    epsilons: tuple[float, ...] = config_field((), fields.distinct(fields.positive(1)))
    scalars: tuple[tuple[str, tuple[float, ...]], ...] = config_field((), fields.by_name(fields.number(-3e38, 3e38)))

    def __post_init__(self) -> None:
        self.require_listable(len(self.seeds))

    def require_listable(self, num_seeds: int) -> None:
        """Raises InputError for a grid of more than MOST_RUNS runs, with `num_seeds` runs in each cell."""
        rates = 1 if self.base_lr_by_batch_size or self.base_lrs_from else len(self.base_lrs)
        most = len(self.batch_sizes) * len(self.bn_batch_sizes or (None,)) * rates * num_seeds
        most *= math.prod(map(len, self.axes().values()))
        if most > MOST_RUNS:
            raise InputError(f"grid: got {most} combinations of its values, accepts at most {MOST_RUNS} runs in all.")

    def axes(self) -> dict[str, tuple[float, ...]]:
        """Returns the values of each further axis in use, by the name of its scalar, a column of the results."""
        found = {name: getattr(self, field) for name, field in catalog.AXES.items()}
        own = {f"{catalog.OWN_SCALAR}{name}": values for name, values in self.scalars}
        return {name: values for name, values in found.items() if values} | own

    def shapes(self) -> list[tuple[int, int]]:
        """Returns every pair (batch size, BN batch size); the BN batch size is at most the batch size and must divide it.

        Raises:
          InputError: if one does not, or no pair is left.
        """
        pairs = [(m, b) for m in self.batch_sizes for b in self.bn_batch_sizes or (m,) if b <= m]
        for m, b in pairs:
            require_divisor(b, m, "grid.bn_batch_sizes")
        if not pairs:
            raise InputError(
                f"grid.bn_batch_sizes: {fields.shown(self.bn_batch_sizes)} leaves no run, every one is larger than "
                f"every batch size in {fields.shown(self.batch_sizes)}. Use some that divide the batch sizes."
            )
        return pairs


@dataclass(frozen=True)
class Search:
    """`search`: the budget of a search for the best cells of the grid, instead of training all (`runner.policy`)."""

    budget: float | None = config_field(None, fields.positive(1e18))  # training examples, summed over all runs
    seconds: float | None = config_field(None, fields.positive(1e9))  # time budget, converted once to examples by measurement
    confirm: int = config_field(2, fields.integer(0, 1000))  # number of fresh seeds of the recommended cell, trained last

    @property
    def active(self) -> bool:
        """Whether there is a budget; without one the whole grid is trained."""
        return self.budget is not None or self.seconds is not None

    def default_budget(self, grid: Grid, epochs: int, num_examples: int) -> float:
        """Returns the examples of two whole runs per shape (three with several seeds) and of the confirming runs."""
        runs = (2 + (len(grid.seeds) > 1)) * len(grid.shapes()) + self.confirm
        return float(runs * epochs * num_examples)

    def fresh_seeds(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """Returns the fresh seeds of the confirming runs, all above the grid's `seeds`; none without a budget."""
        first = max(seeds) + 1
        return tuple(range(first, first + self.confirm)) if self.active else ()

    def require_grid(self, grid: Grid) -> None:
        """Raises InputError for a grid that leaves more to choose than batch sizes, base learning rates and seeds."""
        if not self.active:
            return
        for name in ("base_lrs_from", "base_lr_by_batch_size"):
            if getattr(grid, name):
                raise InputError(f"grid.{name}: a search chooses the base learning rates itself; give grid.base_lrs.")
        for name, values in grid.axes().items():
            if len(values) > 1:
                raise InputError(f"search: tries one value of {name}, got {fields.shown(values)}; give one of them.")
        grid.require_listable(len(grid.seeds) + self.confirm)
        if max(grid.seeds) + self.confirm >= 2**31:
            raise InputError(f"search.confirm: {self.confirm} seeds above {max(grid.seeds)} are too large; use smaller seeds.")


@dataclass(frozen=True, order=True)
class Run:
    """One training, from initialisation to the last epoch."""

    batch_size: int  # m
    bn_batch_size: int  # b; m if not given
    base_lr: float  # η̃
    seed: int
    scalars: tuple[tuple[str, float], ...] = ()  # values on the grid's further axes, in the order of `Grid.axes`

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Run":
        """Returns the run whose `dataclasses.asdict` was stored as JSON, with lists for tuples; old versions had no scalars."""
        return cls(**{**stored, "scalars": tuple((name, value) for name, value in stored.get("scalars", ()))})

    def to_dict(self) -> dict[str, Any]:
        """Returns the run's values by column of the results."""
        return {name: getattr(self, name) for name in RUN_COLUMNS} | dict(self.scalars)


RUN_COLUMNS = ("batch_size", "bn_batch_size", "base_lr", "seed")


def name_of(run: Run) -> str:
    """Returns the name of a run, unique in its grid: m00008_b00004_lr2^-7_seed0, without b if b = m."""
    mantissa, exponent = math.frexp(run.base_lr)
    base_lr = f"2^{exponent - 1}" if mantissa == 0.5 else repr(run.base_lr)
    bn = f"_b{run.bn_batch_size:05d}" if run.bn_batch_size != run.batch_size else ""
    scalars = "".join(f"_{name}{value!r}" for name, value in run.scalars)
    return f"m{run.batch_size:05d}{bn}_lr{base_lr}{scalars}_seed{run.seed}"


def programs(runs: Iterable[Run]) -> dict[tuple[int, int], list[Run]]:
    """Groups runs by (batch size, BN batch size), the shape of one program, lowest base_lr first.

    High rates tend to diverge and end early: started last, they fill lanes that other runs free.
    """
    by_shape: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        by_shape.setdefault((run.batch_size, run.bn_batch_size), []).append(run)
    return {shape: sorted(members, key=lambda run: (run.base_lr, run.seed, run.scalars)) for shape, members in by_shape.items()}


def require_divisor(bn_batch_size: int, batch_size: int, field: str) -> None:
    """Raises InputError for a BN batch size that does not split the SGD batch into equal BN groups (§3.6)."""
    if batch_size % bn_batch_size:
        small = [b for b in range(1, math.isqrt(batch_size) + 1) if batch_size % b == 0]
        choices = listed(sorted({*small, *(batch_size // b for b in small)}))
        raise InputError(
            f"{field}: {bn_batch_size} does not divide batch size {batch_size}; each SGD batch is split into equal BN "
            f"sub-batches. Use {choices}."
        )


def listed(choices: Sequence[int]) -> str:
    """Formats choices as "1, 2 or 4"; the middle of a long list is left out."""
    named = [str(choice) for choice in choices]
    if len(named) > 12:
        named = [*named[:6], "…", *named[-5:]]
    return " or ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
