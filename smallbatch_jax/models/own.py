"""A user's own linen module, brought to the calling convention of this package."""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import linen as nn
from jax.interpreters.partial_eval import dce_jaxpr

from smallbatch_jax.config.experiment import OWN, InputError
from smallbatch_jax.models import identity

# Arguments that tell a module whether it trains, and what they are while it does.
MODES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "use_running_stats", "inference", "inference_mode"), False),
    **dict.fromkeys(("eval", "evaluate", "is_eval", "eval_mode", "test", "testing", "is_test"), False),
}
RECOGNISED = f"Arguments of __call__ that are recognised: {', '.join(MODES)}."
_MOST_CHARACTERS = 300  # of what a module raised
_TRIED_ON = 2  # examples


class OwnModel:
    """A linen module as the steps call it: `apply(…, train=…)`, whatever the module calls its mode, if it has one.

    Batch norm and dropout work as everywhere in Flax: running statistics live in the collection "batch_stats", dropout
    draws from the key "dropout". Modules with other changing collections are refused.
    """

    def __init__(self, module: Any, modes: Sequence[str] | None = None):
        """`modes` are the arguments, of those in MODES, that the module takes; None goes by its signature."""
        if not isinstance(module, nn.Module):
            raise InputError(f"model: got {type(module).__name__}, accepts a model's name or a flax.linen.Module.")
        self.module = module
        self._modes = tuple(modes) if modes is not None else _named_modes(module)

    def init(self, key: jax.Array, images: jax.Array) -> Any:
        variables: Any = self.module.init(key, images, **self._mode(False))  # pyright: ignore[reportArgumentType]
        others = sorted(set(variables) - {"params", "batch_stats"})
        if others or "params" not in variables:
            raise InputError(f"model: {self.label} has the collections {sorted(variables)}, accepts params and batch_stats.")
        return variables

    def apply(self, variables: Any, images: jax.Array, train: bool = False, **options: Any) -> Any:
        return self.module.apply(variables, images, **self._mode(train), **options)

    def _mode(self, train: bool) -> dict[str, bool]:
        return {name: MODES[name] == train for name in self._modes}

    def with_bn_batch_size(self, bn_batch_size: int | None, /, axis_name: str | None = None) -> "OwnModel":
        """The same model with its field `bn_batch_size` set; None leaves it as it is. Its batches are never spread."""
        del axis_name
        if bn_batch_size is None:
            return self
        if not hasattr(self.module, "bn_batch_size"):
            raise InputError(f"bn_batch_sizes: {self.label} has no field bn_batch_size to set; give None.")
        return OwnModel(self.module.clone(bn_batch_size=bn_batch_size), self._modes)

    @property
    def label(self) -> str:
        return type(self.module).__name__

    @functools.cached_property
    def _digest(self) -> tuple[str, list[str]]:
        return identity.digest(self.module)

    @property
    def name(self) -> str:
        """A name that tells it from other modules, in every process: its class, and a digest of its fields."""
        return f"{OWN}{self.label}-{self._digest[0]}"

    def warn_of_unstable_fields(self, workdir: Path) -> None:
        """Says in one line if a field makes `name` another one in another process, so that the workdir is refused there."""
        if self._digest[1]:
            fields = ", ".join(dict.fromkeys(self._digest[1]))
            print(
                f"warning: model: nothing but its address identifies {fields} of {self.label}; {workdir} can be resumed with "
                "this very object in this process alone. Use a function, a dataclass or plain values there.",
                file=sys.stderr,
                flush=True,
            )

    def fingerprint(self, image_shape: Sequence[int]) -> dict[str, Any]:
        """What the module computes (`identity.fingerprint`): it tells apart code that `name` does not."""

        def apply(variables: Any, images: jax.Array, train: bool, key: Any) -> Any:
            if not train:
                return self.apply(variables, images, train=False)
            return self.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]

        return identity.fingerprint(self.init, apply, image_shape, self._batch(identity.EXAMPLES))

    def settled(self, image_shape: Sequence[int]) -> "OwnModel":
        """The same model with the mode arguments that it is found to take; traces it and runs nothing.

        Raises:
          InputError: if it cannot take the images, or if training or evaluation leaves it in the other one's mode.
        """
        candidates = [self._modes]
        if not self._modes and _takes_any(self.module):  # for itself, or to hand on to a submodule: tried
            candidates = [*((name,) for name in MODES), ()]
        images = jax.ShapeDtypeStruct((self._batch(_TRIED_ON), *image_shape), jnp.float32)
        found: list[tuple[OwnModel, _Seen]] = []
        for modes in candidates:
            model = OwnModel(self.module, modes)
            found.append((model, model._observed(images)))
            if found[-1][1].error is None and found[-1][1].trains:
                break
        working = [(model, seen) for model, seen in found if seen.error is None]
        if not working:
            raise found[-1][1].error or AssertionError
        # Of several that are taken, one that does something.
        model, seen = min(working, key=lambda pair: (pair[1].fault is not None, not pair[1].trains))
        hidden = None if seen.trains or model._modes else model._hidden_mode(images)
        if hidden:
            raise InputError(f"model: {self.label} is trained by its argument {hidden}, which is not recognised. {RECOGNISED}")
        if seen.fault:
            raise InputError(f"model: {self.label} {seen.fault}. {RECOGNISED}")
        for remark in seen.remarks:
            print(f"warning: model: {self.label} {remark}", file=sys.stderr, flush=True)
        return model

    def require_batch(self, image_shape: Sequence[int], batch_size: int) -> None:
        """Refuses what cannot be trained on batches of this size; runs nothing."""
        seen = self._observed(jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32))
        if seen.error:
            raise seen.error

    def _batch(self, examples: int) -> int:
        """Examples to try it on: whole BN batches, if it says how large they are."""
        given = getattr(self.module, "bn_batch_size", None)
        return max(given, given * (examples // given)) if isinstance(given, int) and given > 0 else examples

    def _hidden_mode(self, images: Any) -> str | None:
        """An argument of another name, True or False by default, whose other value makes the module train."""
        for name, parameter in _parameters(self.module).items():
            if name not in MODES and isinstance(parameter.default, bool):
                seen = self._observed(images, **{name: not parameter.default})
                if seen.error is None and seen.trains:
                    return name
        return None

    def _observed(self, images: Any, **arguments: Any) -> "_Seen":
        """What happens in a training step and at evaluation, traced."""
        seen, count = _Seen(self.label), 0
        try:
            variables = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)), images)
            stats = variables.get("batch_stats", {})

            def train(key: jax.Array, stats: Any, variables: Any, images: jax.Array) -> Any:
                variables = {**variables, "batch_stats": stats} if "batch_stats" in variables else variables
                mode = self._mode(True) | arguments
                options: Any = {"mutable": ["batch_stats"], "rngs": {"dropout": key}}
                with nn.intercept_methods(seen.watch):
                    logits, changed = self.module.apply(variables, images, **mode, **options)
                return changed.get("batch_stats", stats), logits

            key = jax.eval_shape(lambda: jax.random.key(0))
            count = len(jax.tree.leaves(stats))
            traced = jax.make_jaxpr(train)(key, stats, variables, images).jaxpr
            seen.key_used = dce_jaxpr(traced, [True] * len(traced.outvars))[1][0]
            seen.moved = [traced.outvars[i] is not traced.invars[1 + i] for i in range(count)]
        except Exception as error:
            seen.error = self._explained(error, images)
            return seen
        try:

            def evaluate(stats: Any, variables: Any, images: jax.Array) -> Any:
                mode: Any = self._mode(False)
                return self.module.apply({**variables, "batch_stats": stats}, images, **mode)

            traced = jax.make_jaxpr(evaluate)(stats, variables, images).jaxpr
            seen.read = dce_jaxpr(traced, [True] * len(traced.outvars))[1][:count]
        except (flax_errors.InvalidRngError, flax_errors.ModifyScopeVariableError) as error:
            drawn = isinstance(error, flax_errors.InvalidRngError)
            does = "draws random numbers, as dropout does," if drawn else "changes its batch_stats"
            seen.error = InputError(f"model: {self.label} {does} at evaluation, where it must not train. {RECOGNISED}")
        except Exception as error:
            seen.error = self._explained(error, images)
        return seen

    def _explained(self, error: Exception, images: Any) -> Exception:
        if isinstance(error, InputError):
            return error
        said = " ".join(str(error).split("\n\n")[0].split())
        said = said if len(said) <= _MOST_CHARACTERS else said[: _MOST_CHARACTERS - 3] + "..."
        explained = InputError(
            f"model: {self.label} raised {type(error).__name__}: {said} (called with float32{list(images.shape)}"
            f"{''.join(f', {name}=…' for name in self._modes)})"
        )
        explained.__cause__ = error
        return explained


@dataclass
class _Seen:
    """What a module was seen to do in a training step."""

    label: str
    error: Exception | None = None
    key_used: bool = False  # the key of dropout
    moved: list[bool] = field(default_factory=list)  # of each leaf of batch_stats, whether training changes it
    read: list[bool] = field(default_factory=list)  # whether evaluation depends on it
    dropouts: dict[str, bool] = field(default_factory=dict)  # whether each layer of nn.Dropout drops anything
    rates: list[str] = field(default_factory=list)  # fields of other layers that are named after dropout

    @property
    def trains(self) -> bool:
        return self.key_used or any(self.moved)

    @property
    def fault(self) -> str | None:
        if self.moved and not any(self.moved):
            return "has batch_stats that training never changes: its batch norm is left at mean 0 and variance 1"
        if any(self.moved) and not any(self.read):
            return "has batch_stats that evaluation does not use: its batch norm takes the statistics of the test images"
        if self.dropouts and not any(self.dropouts.values()):
            return f"has dropout ({next(iter(self.dropouts))}) that training never uses"
        if self.rates and not self.key_used:
            return f"has dropout ({self.rates[0]}) that training never uses"
        return None

    @property
    def remarks(self) -> list[str]:
        """Layers that are left in evaluation mode, where others are not: which may be meant."""
        found = []
        off = [path for path, active in self.dropouts.items() if not active]
        if off:
            found.append(f"has {len(off)} dropout layer(s) of {len(self.dropouts)} that training never uses: {off[0]}.")
        if not all(self.moved):
            still = len(self.moved) - sum(self.moved)
            found.append(f"has {still} of {len(self.moved)} arrays in batch_stats that training never changes.")
        return found

    def watch(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Called in place of each method of each submodule."""
        module, x = context.module, args[0] if args else None
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(module.path) or self.label
        if hasattr(x, "shape"):
            _require_statistics(module, path, x, args, kwargs)
        result = call(*args, **kwargs)
        if isinstance(module, nn.Dropout):
            if module.rate:
                self.dropouts[path] = self.dropouts.get(path, False) or result is not x
            return result
        for name in module.__dataclass_fields__:
            rate = getattr(module, name, None)
            if "drop" in name and isinstance(rate, float) and 0 < rate < 1:
                self.rates.append(f"{path}.{name}={rate:g}")
        return result


def _require_statistics(module: nn.Module, path: str, x: Any, args: Any, kwargs: Any) -> None:
    """Refuses one of Flax's norms that would take mean and variance over a single value: it gives a constant."""
    axes: Any
    if isinstance(module, nn.BatchNorm):
        average = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
        axes = module.axis if isinstance(module.axis, (tuple, list)) else (module.axis,)
        if (module.use_running_average if average is None else average) or module.axis_name is not None:
            return
        values = x.size // math.prod(x.shape[axis] for axis in axes)
    elif isinstance(module, nn.GroupNorm):
        axes, channels = module.reduction_axes, module.group_size or x.shape[-1] // (module.num_groups or 1)
        axes = range(1, x.ndim) if axes is None else axes if isinstance(axes, (tuple, list)) else (axes,)
        pixels = [x.shape[axis] for axis in axes if axis % x.ndim != x.ndim - 1]
        values = channels * math.prod(pixels)
    elif isinstance(module, (nn.LayerNorm, nn.InstanceNorm)):
        features: Any = getattr(module, "reduction_axes", None)
        if features is None:
            channel: Any = module.feature_axes if isinstance(module, nn.InstanceNorm) else ()
            channels = {a % x.ndim for a in ((channel,) if isinstance(channel, int) else channel)}
            features = [a for a in range(1, x.ndim) if a not in channels]
        reduced: Any = (features,) if isinstance(features, int) else features
        values = math.prod(x.shape[a] for a in reduced)
    else:
        return
    if values == 1:
        way = "use larger batches, or no batch norm there" if isinstance(module, nn.BatchNorm) else "leave it out"
        raise InputError(
            f"model: {path} ({type(module).__name__}) takes mean and variance over a single value of its input "
            f"{list(x.shape)}, and gives a constant; {way}."
        )


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of its call that can be named, but for the images."""
    found = list(inspect.signature(type(module).__call__).parameters.values())[1:]  # without self
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if found and found[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        found = found[1:]
    return {p.name: p for p in found if p.kind in named}


def _named_modes(module: nn.Module) -> tuple[str, ...]:
    switches = {name: p for name, p in _parameters(module).items() if name in MODES}
    return tuple(name for name, p in switches.items() if p.default in (p.empty, None, True, False))


def _takes_any(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).__call__).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
