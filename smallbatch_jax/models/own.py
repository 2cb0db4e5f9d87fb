"""The user's own linen module, adapted to the calling convention of this package and checked before anything runs."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import linen as nn
from jax.interpreters.partial_eval import dce_jaxpr

from smallbatch_jax.config.experiment import OWN, InputError
from smallbatch_jax.models import identity

# Arguments that tell a module whether it trains, and their values while it does.
MODES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "use_running_stats", "inference", "inference_mode"), False),
    **dict.fromkeys(("eval", "evaluate", "is_eval", "eval_mode", "test", "testing", "is_test"), False),
}
RECOGNISED = f"Arguments of __call__ that are recognised: {', '.join(MODES)}."
_MOST_CHARACTERS = 300  # of a module's error message
_TRACED_EXAMPLES = 2


class OwnModel:
    """A linen module behind `apply(…, train=…)`, whatever the name of its own mode argument.

    Batch norm and dropout work as everywhere in Flax: running statistics are in the collection "batch_stats", dropout
    draws from the key "dropout". Modules with other collections are refused.
    """

    def __init__(self, module: Any, modes: Sequence[str] | None = None):
        """`modes` are the arguments in MODES that the module takes; None reads them from its signature."""
        if not isinstance(module, nn.Module):
            raise InputError(f"model: got {type(module).__name__}, accepts a model's name or a flax.linen.Module.")
        self.module = module
        self.label = type(module).__name__
        self.name = f"{OWN}{self.label}"
        self._modes = tuple(modes) if modes is not None else _modes_in_signature(module)

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
        """Returns the model with its field `bn_batch_size` set, or unchanged for None; its batches are never sharded."""
        del axis_name
        if bn_batch_size is None:
            return self
        if not hasattr(self.module, "bn_batch_size"):
            raise InputError(f"bn_batch_sizes: {self.label} has no field bn_batch_size to set; give None.")
        return OwnModel(self.module.clone(bn_batch_size=bn_batch_size), self._modes)

    def fingerprint(self, image_shape: Sequence[int]) -> dict[str, Any]:
        """Returns a summary of what the module computes, by which a workdir recognises it (`identity.fingerprint`)."""
        return identity.fingerprint(self, image_shape, self._whole_bn_batches(identity.EXAMPLES))

    def settled(self, image_shape: Sequence[int]) -> "OwnModel":
        """Returns the model with the mode arguments that it takes; traces it and runs nothing.

        Raises:
          InputError: if it cannot take the images, if training changes nothing in it, or if it trains at evaluation.
        """
        candidates = [self._modes]
        if not self._modes and _takes_any_argument(self.module):  # perhaps for a submodule: tries each mode
            candidates = [*((name,) for name in MODES), ()]
        images = jax.ShapeDtypeStruct((self._whole_bn_batches(_TRACED_EXAMPLES), *image_shape), jnp.float32)
        found: list[tuple[OwnModel, _Trace]] = []
        for modes in candidates:
            model = OwnModel(self.module, modes)
            try:
                found.append((model, model._traced(images)))
            except InputError:
                if not found and modes is candidates[-1]:
                    raise
            if found and found[-1][1].trains:
                break
        model, trace = min(found, key=lambda pair: (pair[1].fault is not None, not pair[1].trains))
        hidden = None if trace.trains or model._modes else model._hidden_mode(images)
        if hidden:
            raise InputError(f"model: {self.label} is trained by its argument {hidden}, which is not recognised. {RECOGNISED}")
        if trace.fault:
            raise InputError(f"model: {self.label} {trace.fault}. {RECOGNISED}")
        for remark in trace.remarks:
            print(f"warning: model: {self.label} {remark}", file=sys.stderr, flush=True)
        return model

    def require_batch(self, image_shape: Sequence[int], batch_size: int) -> None:
        """Refuses a module that cannot be trained on batches of this size; runs nothing."""
        self._traced(jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32))

    def _whole_bn_batches(self, examples: int) -> int:
        """Returns about `examples`, rounded to whole BN batches if the module has a field for their size."""
        size = getattr(self.module, "bn_batch_size", None)
        return max(size, examples - examples % size) if isinstance(size, int) and size > 0 else examples

    def _hidden_mode(self, images: Any) -> str | None:
        """Returns an argument outside MODES, True or False by default, whose other value makes the module train."""
        for name, parameter in _parameters(self.module).items():
            if name not in MODES and isinstance(parameter.default, bool):
                try:
                    if self._traced(images, **{name: not parameter.default}).trains:
                        return name
                except InputError:
                    continue
        return None

    def _traced(self, images: Any, **arguments: bool) -> "_Trace":
        """Traces a training step and an evaluation; refuses a module that fails, or that trains at evaluation."""
        trace, key = _Trace(self.label), jax.eval_shape(lambda: jax.random.key(0))
        with self._errors_explained(images):
            variables = jax.eval_shape(self.init, key, images)
            params, stats = ({k: v for k, v in variables.items() if (k == "batch_stats") == moves} for moves in (False, True))
            count = len(jax.tree.leaves(stats))

            def train(key: jax.Array, stats: Any, params: Any, images: jax.Array) -> Any:
                options: Any = {"mutable": ["batch_stats"], "rngs": {"dropout": key}, **arguments}
                with nn.intercept_methods(trace.watch):
                    logits, changed = self.apply({**params, **stats}, images, train=True, **options)
                return changed.get("batch_stats", stats), logits

            jaxpr = jax.make_jaxpr(train)(key, stats, params, images).jaxpr
            trace.key_used = _used_inputs(jaxpr)[0]
            trace.moved = [new is not old for new, old in zip(jaxpr.outvars[:count], jaxpr.invars[1:], strict=False)]
        with self._errors_explained(images):
            try:
                evaluate = jax.make_jaxpr(lambda stats, params, images: self.apply({**params, **stats}, images))
                trace.read = _used_inputs(evaluate(stats, params, images).jaxpr)[:count]
            except flax_errors.InvalidRngError as error:
                raise self._trains_at_evaluation("draws random numbers, as dropout does,") from error
            except flax_errors.ModifyScopeVariableError as error:
                raise self._trains_at_evaluation("changes its batch_stats") from error
        return trace

    def _trains_at_evaluation(self, symptom: str) -> InputError:
        return InputError(f"model: {self.label} {symptom} at evaluation, where it must not train. {RECOGNISED}")

    @contextmanager
    def _errors_explained(self, images: Any) -> Iterator[None]:
        """Turns any error of the module into an InputError of one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            said = " ".join(str(error).split("\n\n")[0].split())
            said = said if len(said) <= _MOST_CHARACTERS else said[: _MOST_CHARACTERS - 3] + "..."
            called = ", ".join([f"float32{list(images.shape)}", *(f"{name}=…" for name in self._modes)])
            raise InputError(f"model: {self.label} raised {type(error).__name__}: {said} (called with {called})") from error


@dataclass
class _Trace:
    """What a module does in one training step and one evaluation."""

    label: str
    key_used: bool = False  # whether training uses the key of dropout
    moved: list[bool] = field(default_factory=list)  # whether training changes it, for each leaf of batch_stats
    read: list[bool] = field(default_factory=list)  # whether evaluation depends on it, for each leaf of batch_stats
    active: dict[str, bool | None] = field(default_factory=dict)  # whether dropout drops anything; None is not known

    @property
    def trains(self) -> bool:
        return self.key_used or any(self.moved)

    @property
    def unused_dropout(self) -> list[str]:
        return [path for path, active in self.active.items() if not (self.key_used if active is None else active)]

    @property
    def fault(self) -> str | None:
        if self.moved and not any(self.moved):
            return "has batch_stats that training never changes: its batch norm is left at mean 0 and variance 1"
        if any(self.moved) and not any(self.read):
            return "has batch_stats that evaluation does not use: its batch norm takes the statistics of the test images"
        if self.active and len(self.unused_dropout) == len(self.active):
            return f"has dropout ({self.unused_dropout[0]}) that training never uses"
        return None

    @property
    def remarks(self) -> list[str]:
        """Layers that stay in evaluation mode while others train, which may be intended."""
        found, off, still = [], self.unused_dropout, self.moved.count(False)
        if off:
            found.append(f"has {len(off)} dropout layer(s) of {len(self.active)} that training never uses: {off[0]}.")
        if still:
            found.append(f"has {still} of {len(self.moved)} arrays in batch_stats that training never changes.")
        return found

    def watch(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Interceptor of `nn.intercept_methods`, which sees each call of each submodule."""
        module, x = context.module, args[0] if args else None
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(module.path) or self.label
        if hasattr(x, "shape"):
            _require_several_values(module, path, x, args, kwargs)
        result = call(*args, **kwargs)
        if isinstance(module, nn.Dropout):
            if module.rate:
                self.active[path] = bool(self.active.get(path)) or result is not x
            return result
        for name in module.__dataclass_fields__:  # such as the dropout_rate of attention
            rate = getattr(module, name, None)
            if "drop" in name and isinstance(rate, float) and 0 < rate < 1:
                self.active[f"{path}.{name}={rate:g}"] = None
        return result


def _used_inputs(jaxpr: Any) -> list[bool]:
    """Returns for each input whether any output depends on it."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]


def _require_several_values(module: nn.Module, path: str, x: Any, args: Any, kwargs: Any) -> None:
    """Refuses a norm of Flax that takes mean and variance over a single value, because it gives a constant."""
    if isinstance(module, nn.BatchNorm):
        average = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
        if (module.use_running_average if average is None else average) or module.axis_name is not None:
            return
        kept = _axes(module.axis, x)
    elif isinstance(module, nn.LayerNorm):
        kept = set(range(x.ndim)) - _axes(module.reduction_axes, x)
    elif isinstance(module, nn.InstanceNorm):
        kept = {0} | _axes(module.feature_axes, x)
    elif isinstance(module, nn.GroupNorm):
        kept = set(range(x.ndim)) - (
            set(range(1, x.ndim)) if module.reduction_axes is None else _axes(module.reduction_axes, x)
        )
    else:
        return
    statistics = math.prod(x.shape[axis] for axis in kept)
    if isinstance(module, nn.GroupNorm):
        statistics *= module.num_groups or x.shape[-1] // (module.group_size or 1)
    if x.size == statistics:
        way = "use larger batches, or no batch norm there" if isinstance(module, nn.BatchNorm) else "leave it out"
        raise InputError(
            f"model: {path} ({type(module).__name__}) takes mean and variance over a single value of its input "
            f"{list(x.shape)}, and gives a constant; {way}."
        )


def _axes(given: int | Sequence[int], x: Any) -> set[int]:
    return {axis % x.ndim for axis in ((given,) if isinstance(given, int) else given)}


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Returns the arguments of the module's call that can be given by name, without the images."""
    found = list(inspect.signature(type(module).__call__).parameters.values())[1:]  # without self
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if found and found[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        found = found[1:]
    return {p.name: p for p in found if p.kind in named}


def _modes_in_signature(module: nn.Module) -> tuple[str, ...]:
    parameters = _parameters(module).items()
    return tuple(name for name, p in parameters if name in MODES and p.default in (p.empty, None, True, False))


def _takes_any_argument(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).__call__).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
