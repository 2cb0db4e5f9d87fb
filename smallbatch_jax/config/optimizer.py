"""The section `optimizer` of a config, and its scalars and learning rate at a batch size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smallbatch_jax.config import catalog, fields
from smallbatch_jax.config.fields import OWN, InputError, config_field

BETA_RULES = ("constant", "half_life", "sde")
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


@dataclass(frozen=True)
class Optimizer:
    """`optimizer`: the update rule for the mean gradient, and how its scalars depend on the batch size m."""

    name: str = config_field("sgd", fields.choice(catalog.OPTIMIZERS, "optimizer", OWN))  # in `config.catalog.OPTIMIZERS`
    rule: str = config_field("linear", fields.choice(catalog.RULES, "rule"))  # the learning rate at m: η̃·m, η̃·√m or η̃
    momentum: float | None = config_field(None, fields.below_one)  # None: the optimizer's default, or it has no momentum
    beta1: float | None = config_field(None, fields.below_one)  # None: as momentum
    beta2: float | None = config_field(None, fields.below_one)  # None: as momentum
    epsilon: float | None = config_field(None, fields.positive(1))  # None: as momentum
    beta_rule: str = config_field("constant", fields.choice(BETA_RULES, "rule"))  # how momentum and betas depend on m
    beta_batch_size: int | None = config_field(None, fields.integer(1))  # m′, where they have the given values

    def __post_init__(self) -> None:
        known = () if self.name.startswith(OWN) else catalog.OPTIMIZERS[self.name].scalars
        for name in (name for entry in catalog.OPTIMIZERS.values() for name in entry.scalars):
            if getattr(self, name, None) is not None and name not in known:
                has = " and ".join(known) or "no scalars"
                raise InputError(f"optimizer.{name}: {self.name} has none, it has {has}; leave it None.")
        if self.beta_rule != "constant" and not set(known) & set(catalog.DECAY_RATES):
            raise InputError(f"optimizer.beta_rule: {self.name} has neither momentum nor betas; use 'constant'.")
        if self.beta_rule != "constant" and self.beta_batch_size is None:
            raise InputError(
                f"optimizer.beta_rule: {self.beta_rule!r} needs optimizer.beta_batch_size, the batch size at which momentum, "
                "beta1 and beta2 have the values given."
            )
        if self.beta_rule == "constant" and self.beta_batch_size is not None:
            raise InputError("optimizer.beta_batch_size: belongs to the beta_rules 'half_life' and 'sde'; leave it None.")

    def require_axes(self, axes: Mapping[str, Sequence[float]]) -> None:
        """Raises InputError for a grid axis that the optimizer lacks, or that a field or another axis sets already."""
        own = self.name.startswith(OWN)
        known = () if own else catalog.OPTIMIZERS[self.name].scalars
        for name in axes:
            scalar, field = name.removesuffix("_half_life"), f"grid.{catalog.AXES.get(name, 'scalars')}"
            if own and name in catalog.AXES and name != "warmup_fraction":
                raise InputError(f"{field}: an own optimizer has scalars of its own; give them as grid.scalars.")
            if not own and name.startswith(catalog.OWN_SCALAR):
                raise InputError(f"{field}: {self.name} accepts no custom scalars, only an own optimizer does; leave them out.")
            if not own and name not in ("weight_decay", "warmup_fraction", *known) and scalar not in known:
                raise InputError(f"{field}: {self.name} has no {scalar}, it has {' and '.join(known) or 'no scalars'}.")
            if getattr(self, scalar, None) is not None or (scalar != name and scalar in axes):
                raise InputError(f"{field}: optimizer.{scalar} or another axis says what {scalar} is; leave one of them out.")

    def scalars(self, batch_size: int, given: Mapping[str, float] | None = None) -> dict[str, float]:
        """Returns the optimizer's scalars at a batch size m; `given` are a run's values by axis of the grid.

        With beta_rule "half_life" a beta is β^(m/m′), so that its half-life in examples is the same at every m (Marek et al.
        2025). With "sde" it is 1 - (1 - β)·m/m′, and epsilon ε/√(m/m′) (Malladi et al. 2022, the square-root rule of Adam).

        Raises:
          InputError: if m is so large that the rule "sde" makes a beta negative, or if momentum or a beta is 1 in float32.
        """
        axes = given or {}
        if self.name.startswith(OWN):
            own = {name: value for name, value in axes.items() if name.startswith(catalog.OWN_SCALAR)}
            return {name.removeprefix(catalog.OWN_SCALAR): value for name, value in own.items()}
        found = {}
        ratio = batch_size / (self.beta_batch_size or batch_size)
        for name, default in catalog.OPTIMIZERS[self.name].scalars.items():
            field, decays = getattr(self, name, None), name in catalog.DECAY_RATES
            value = axes.get(name, default if field is None else field)
            if f"{name}_half_life" in axes:
                value = 0.5 ** (batch_size / axes[f"{name}_half_life"])
            elif self.beta_rule == "sde" and name == "epsilon":
                value = value / math.sqrt(ratio)
            elif self.beta_rule == "sde" and decays:
                value = 1 - (1 - value) * ratio
                if value < 0:
                    raise InputError(
                        f"optimizer.beta_rule: 'sde' makes {name} {value:.3g} at batch size {batch_size}; use larger betas, "
                        "a larger beta_batch_size or smaller batch sizes."
                    )
            elif self.beta_rule == "half_life" and decays:
                value = value**ratio
            if decays and value > BELOW_ONE:
                raise InputError(
                    f"optimizer.{name}: is {value:.10g} at batch size {batch_size}, which is 1 in float32; use less, at most "
                    f"{BELOW_ONE:.8f}, a shorter half-life or larger batch sizes."
                )
            found[name] = value
        return found

    @property
    def title(self) -> str:
        """Name for use in sentences."""
        return self.name.removeprefix(OWN) if self.name.startswith(OWN) else catalog.OPTIMIZERS[self.name].title

    def described(self) -> list[str]:
        """Returns its differences from the paper's optimizer, such as ["AdamW", "sqrt rule"]."""
        named = [self.title] * (self.name != "sgd")
        return named + [f"{self.rule} rule"] * (self.rule != "linear")

    def learning_rate(self, base_lr: float, batch_size: int) -> float:
        """Returns the learning rate η at a batch size, before the schedule."""
        return base_lr * catalog.RULES[self.rule][1](batch_size)
