"""The section `schedule` of a config: how the learning rate and the batch size change during training."""

from collections.abc import Sequence
from dataclasses import dataclass

from smallbatch_jax.config import fields
from smallbatch_jax.config.fields import InputError, config_field

MOST_EXAMPLES = 2**31 - 1  # in a batch


@dataclass(frozen=True)
class Schedule:
    """`schedule`: unitless multipliers of the base learning rate, see `optim.step_schedule`; and of the batch size."""

    # Fractions of training, at each of which the learning rate is multiplied by `factor`.
    boundaries: tuple[float, ...] = config_field((0.5, 0.75), fields.distinct(fields.number(0, 1), most=100))
    factor: float = config_field(0.1, fields.positive(1))
    warmup_fraction: float = config_field(0.0, fields.number(0, 1))  # fraction of training; 0: none
    # Multiplies the batch size at each boundary (Smith et al. 2017), while `factor` multiplies η̃ = η/m as ever. With 1/factor
    # the learning rate η = η̃·m stays constant: batches grow instead of η decaying. 1: the batch size stays constant.
    batch_growth: int = config_field(1, fields.integer(1, 1000))

    def batch_sizes(self, batch_size: int) -> list[int]:
        """Returns the batch sizes that a run starting with this one may reach, smallest first."""
        times = sum(boundary < 1 for boundary in self.boundaries) if self.batch_growth > 1 else 0
        return [batch_size * self.batch_growth**k for k in range(times + 1)]

    def require_growth(self, batch_sizes: Sequence[int], warmup_fractions: Sequence[float]) -> None:
        """Raises InputError if batches grow beyond MOST_EXAMPLES or during warm-up; `warmup_fractions` is a grid axis."""
        m, growth = max(batch_sizes), self.batch_growth
        if self.batch_sizes(m)[-1] > MOST_EXAMPLES:
            raise InputError(
                f"schedule.batch_growth: {growth} at {len(self.boundaries)} boundaries makes batch size {m} grow to more than "
                f"{MOST_EXAMPLES} examples; use a smaller one, or fewer boundaries."
            )
        warm_up = max(self.warmup_fraction, *warmup_fractions, 0.0)
        if growth > 1 and warm_up > min(self.boundaries, default=1.0):
            raise InputError(
                f"schedule.batch_growth: {growth} makes batches grow at {min(self.boundaries):g} of training, within the "
                f"warm-up of {warm_up:g}; use 1, or a shorter warm-up."
            )

    def require_examples(self, batch_size: int, num_examples: int) -> None:
        """Raises InputError if a batch would grow larger than the training set."""
        *_, largest = self.batch_sizes(batch_size)
        if largest > num_examples:
            raise InputError(
                f"schedule.batch_growth: {self.batch_growth} makes batch size {batch_size} grow to {largest}, larger than the "
                f"training set of {num_examples} examples; use a smaller one, fewer boundaries or smaller batch sizes."
            )
