"""SGD on the sum of the per-example gradients, the other optimizers, and the unitless schedules of the base learning rate.

Masters & Luschi (2018) write the update with the *sum* of the gradients over a batch (Eq. 5), so that one number, the base
learning rate η̃ = η/m (Eq. 6), is the step length per example whatever the batch size m.

The optimizers that `config.catalog` names are functions of the learning rate η, weight decay λ and their own scalars, each of
which may be traced; they take *mean* gradients ḡ. λ belongs to the loss (§3.1), so that λθ is part of the gradient, except
where it is decoupled: in AdamW and Lion the update has -ηλθ.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from smallbatch_jax.config.fields import exact_fraction


class SummedSgdState(NamedTuple):
    """State of `summed_sgd`."""

    count: jax.Array  # int32[], updates taken


def summed_sgd(
    base_lr: Any, batch_size: Any, schedule: optax.Schedule | None = None, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
    """SGD on the sum of the per-example gradients (Masters & Luschi 2018, Eq. 5).

        θ ← θ - s(k) η̃ m (ḡ + λθ)

    The sum over the batch is m times the mean, so this is Eq. 2-3 with η = η̃·m (Eq. 6). The penalty belongs to the loss of
    every example, so the summed update contains m·λ·θ. Every leaf decays: kernels, biases and normalisation parameters alike.
    To decay only some, give no weight_decay here and chain ``optax.add_decayed_weights(weight_decay, mask)`` before it.

    Args:
      base_lr: η̃, step length per example; scalar, may be traced.
      batch_size: m, examples per update; scalar, may be traced.
      schedule: s(k), a unitless multiplier of η̃ at update k (from 0), 1 at its peak; None keeps 1. `optax.inject_hyperparams`
        needs static_args=("schedule",).
      weight_decay: λ of the penalty (λ/2)‖θ‖² added to the mean loss; scalar, may be traced.

    Returns:
      A GradientTransformation whose ``update`` takes the *mean* gradient ḡ over the batch, and the parameters unless
      ``weight_decay`` is the number 0.

    Raises:
      ValueError: if base_lr or batch_size is not a number, or one (not traced) that is not positive and finite, if
        weight_decay is negative or schedule no function; from ``update``, if there is weight decay and no parameters are given.
    """
    if not (schedule is None or callable(schedule)):
        raise ValueError(
            'schedule: got no function of the update count; with optax.inject_hyperparams give static_args=("schedule",)'
        )
    _require(base_lr, "base_lr", lambda v: v > 0, "a positive, finite number")
    _require(batch_size, "batch_size", lambda v: v >= 1, "at least 1")
    _require(weight_decay, "weight_decay", lambda v: v >= 0, "a number that is not negative")
    decays = not (isinstance(weight_decay, (int, float, np.number)) and weight_decay == 0)

    def init(params: optax.Params) -> SummedSgdState:
        return SummedSgdState(count=jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[optax.Updates, SummedSgdState]:
        mean_grads = updates
        multiplier: Any = 1.0 if schedule is None else schedule(state.count)
        length = -multiplier * base_lr * batch_size
        if decays:
            if params is None:
                raise ValueError("params: not given to update(updates, state, params), but weight decay needs them")
            mean_grads = jax.tree.map(lambda g, p: g + weight_decay * p, mean_grads, params)
        steps = jax.tree.map(lambda g: jnp.asarray(length * g, g.dtype), mean_grads)
        return steps, SummedSgdState(count=jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


class Optimizer(NamedTuple):
    """An optimizer of a program. The scalars of a run are arguments of `make`, so that new values need no recompilation."""

    make: Callable[..., optax.GradientTransformation]  # (learning_rate, weight_decay, **scalars, mask=None)
    scalars: tuple[str, ...] = ()  # names of the arguments of `make` beyond the first two
    rule: float | None = None  # ratio of the learning rate to η̃; None: the batch size (Eq. 6)
    elementwise: bool = True  # whether an element's update depends on neither other elements nor parameter names

    def init(self, params: optax.Params) -> optax.OptState:
        """Returns the state before the first update, which depends on no scalar."""
        return self.make(1.0, 0.0, **dict.fromkeys(self.scalars, 0.5)).init(params)


def in_float32(make: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """Returns `make` with a state in float32 and arithmetic in float32, also for parameters in bfloat16 or float16."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)

    def made(*args: Any, **scalars: Any) -> optax.GradientTransformation:
        init, update = make(*args, **scalars)
        return optax.GradientTransformation(
            lambda params: init(wide(params)), lambda updates, state, params=None: update(wide(updates), state, wide(params))
        )

    return made


def is_kernel(params: optax.Params) -> Any:
    """Returns a `mask` of weight decay: True for arrays of two or more dimensions; biases and normalisation do not decay.

    The mask also holds for lanes that train side by side, whose vectors are packed into one array
    (`program.side_by_side.Packing`): that array has one dimension, and kernels are not packed.
    """
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def sgd(learning_rate: Any, weight_decay: Any, mask: Any = None) -> optax.GradientTransformation:
    """SGD without momentum, θ ← θ - η (ḡ + λθ): `summed_sgd` with η = η̃·m."""
    if mask is None:
        return summed_sgd(learning_rate, 1, weight_decay=weight_decay)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), summed_sgd(learning_rate, 1))


SGD = Optimizer(sgd)


def heavy_ball(learning_rate: Any, weight_decay: Any, momentum: Any, mask: Any = None) -> optax.GradientTransformation:
    """SGD with momentum: v ← μv + ḡ + λθ, θ ← θ - ηv."""
    decayed = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(decayed, optax.trace(momentum), optax.scale(-learning_rate))


def nesterov(learning_rate: Any, weight_decay: Any, momentum: Any, mask: Any = None) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum: v ← μv + ḡ + λθ, θ ← θ - η (ḡ + λθ + μv)."""
    decayed = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(decayed, optax.trace(momentum, nesterov=True), optax.scale(-learning_rate))


def adam(
    learning_rate: Any, weight_decay: Any, beta1: Any, beta2: Any, epsilon: Any, mask: Any = None
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015); the penalty is part of the gradient."""
    scaled = optax.scale_by_adam(beta1, beta2, epsilon)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), scaled, optax.scale(-learning_rate))


def adamw(
    learning_rate: Any, weight_decay: Any, beta1: Any, beta2: Any, epsilon: Any, mask: Any = None
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return optax.adamw(learning_rate, beta1, beta2, epsilon, weight_decay=weight_decay, mask=mask)


def lion(learning_rate: Any, weight_decay: Any, beta1: Any, beta2: Any, mask: Any = None) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023), with decoupled weight decay."""
    return optax.lion(learning_rate, beta1, beta2, weight_decay=weight_decay, mask=mask)


def step_schedule(
    total_steps: Any,
    boundaries: Sequence[float | Fraction] = (0.5, 0.75),
    factor: Any = 0.1,
    warmup_fraction: Any = 0.0,
    warmup_start: Any = 1 / 32,
) -> optax.Schedule:
    """Unitless multiplier of η̃: reductions at fractions of training, after an optional linear warm-up (§3.1, §3.4).

    With T = total_steps, update k (from 0) is multiplied by ``factor`` once for every boundary with k ≥ boundary·T. During
    the first warmup_fraction·T updates it is also multiplied by a line from warmup_start (at k = 0) to 1 (Goyal et al.
    2017), after which "the standard learning rate schedule is used for the rest of training".

    Args:
      total_steps: T, updates in the whole run; scalar, may be traced.
      boundaries: fractions of T, each within [0, 1]; a `Fraction` is taken exactly if T is an int.
      factor: multiplier at each boundary; may be traced.
      warmup_fraction: fraction of T spent warming up; 0 means none; may be traced.
      warmup_start: multiplier at k = 0 when warming up; may be traced.

    Returns:
      s(k) for an integer k ≥ 0, float32[], 1 at its peak (lower if the warm-up outlasts the first boundary).

    Raises:
      ValueError: if a number (not traced) is out of the range above.
    """
    _require(total_steps, "total_steps", lambda v: v >= 1, "at least 1")
    _require(factor, "factor", lambda v: v > 0, "a positive, finite number")
    _require(warmup_fraction, "warmup_fraction", lambda v: 0 <= v <= 1, "within [0, 1]")
    _require(warmup_start, "warmup_start", lambda v: 0 < v <= 1, "within (0, 1]")
    for boundary in boundaries:
        _require(boundary, "boundaries", lambda v: 0 <= v <= 1, "fractions within [0, 1]")
    first_reduced_steps = [_first_step_from(boundary, total_steps) for boundary in boundaries]

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count)
        multiplier = jnp.ones([], jnp.float32)
        for first_reduced in first_reduced_steps:
            multiplier = jnp.where(step >= first_reduced, multiplier * factor, multiplier)
        warmup_steps = jnp.asarray(warmup_fraction * total_steps, jnp.float32)
        progress = step / jnp.maximum(warmup_steps, jnp.finfo(jnp.float32).tiny)
        warming_up = warmup_start + (1 - warmup_start) * progress
        return multiplier * jnp.where(step < warmup_steps, warming_up, 1.0)

    return schedule


def _first_step_from(fraction: float | Fraction, total_steps: Any) -> Any:
    """Returns the first integer step k ≥ fraction·T, in exact integer arithmetic."""
    if isinstance(total_steps, (int, np.integer)):
        return math.ceil(exact_fraction(fraction) * int(total_steps))
    near = Fraction(fraction).limit_denominator(10_000)
    # Computed from quotient and remainder, so that no product exceeds int32.
    steps = jnp.asarray(total_steps, jnp.int32)
    p, q = near.numerator, near.denominator
    return steps // q * p + -(-(steps % q * p) // q)


def _require(value: Any, name: str, accepts: Any, what: str) -> None:
    """Raises ValueError for a concrete number out of range, and for what is no number; traced values and arrays pass."""
    if not isinstance(value, (Real, np.number, np.ndarray, jax.Array)):
        raise ValueError(f"{name}: got a {type(value).__name__}, must be {what}")
    if isinstance(value, (int, float, np.number)) and not (math.isfinite(value) and accepts(value)):
        raise ValueError(f"{name}: got {value}, must be {what}")
