"""The user's own model: the base class of all adapters, the adapter of linen modules, and checks before anything runs."""

import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import jax
from flax import errors as flax_errors
from flax import linen as nn
from jax.interpreters.partial_eval import dce_jaxpr

from smallbatch_jax.config.experiment import OWN, InputError
from smallbatch_jax.config.fields import cut
from smallbatch_jax.models import identity

# Arguments that tell a module whether it trains, and their values while it does.
MODES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "use_running_stats", "inference", "inference_mode"), False),
    **dict.fromkeys(("eval", "evaluate", "is_eval", "eval_mode", "test", "testing", "is_test"), False),
}
RECOGNISED = f"Arguments of __call__ that are recognised: {', '.join(MODES)}."
_MOST_CHARACTERS = 300  # quoted from a module's error message
_TRACED_EXAMPLES = 2


class OwnModel(ABC):
    """A user's model behind this package's calling convention; `adapters.adapted` chooses the subclass."""

    bn_batch_size: int | None = None  # b, if the model has a field for it

    def __init__(self, label: str, modes: Sequence[str]):
        """`label` names the model in messages and results; `modes` are the arguments in MODES that it takes."""
        self.label, self._modes = label, tuple(modes)
        self.name = f"{OWN}{label}"

    @abstractmethod
    def init(self, key: jax.Array, x: jax.Array) -> Any:
        """Returns the variables: "params", and "batch_stats", every other array that training changes."""

    @abstractmethod
    def apply(self, variables: Any, x: jax.Array, train: bool = False, **options: Any) -> Any:
        """Returns the outputs for a batch [n, …]; with the option `mutable`, (outputs, {"batch_stats": …}).

        The option `rngs` has the key of the step as "dropout".
        """

    def with_bn_batch_size(self, bn_batch_size: int | None, /, axis_name: str | None = None) -> "OwnModel":
        """Returns the model unchanged for None, and refuses a number; its batches are never sharded."""
        if bn_batch_size is not None:
            raise InputError(f"bn_batch_sizes: {self.label} has no field bn_batch_size to set; give None.")
        return self

    def fingerprint(self, example: jax.ShapeDtypeStruct) -> dict[str, Any]:
        """Returns a summary of what the model computes, by which a workdir recognises it (`identity.fingerprint`)."""
        return identity.fingerprint(self, example, self._whole_bn_batches(identity.EXAMPLES))

    def settled(self, example: jax.ShapeDtypeStruct) -> "OwnModel":
        """Returns the model as it will be trained; traces it and runs nothing.

        Raises:
          InputError: if it cannot take the example, if training changes nothing in it, or if it trains at evaluation.
        """
        self._require_sound(self._traced(batch_of(example, _TRACED_EXAMPLES)))
        return self

    def require_batch(self, example: jax.ShapeDtypeStruct, batch_size: int) -> None:
        """Refuses a model that cannot be trained on batches of this size; runs nothing."""
        self._traced(batch_of(example, batch_size))

    def _traced(self, x: Any) -> "Trace":
        """Traces a training step and an evaluation; refuses a model that fails, or that trains at evaluation."""
        key = abstract_key()
        called = ", ".join([f"{x.dtype}{list(x.shape)}", *(f"{name}=…" for name in self._modes)])
        with errors_explained(f"model: {self.label}", called):
            variables = dict(jax.eval_shape(self.init, key, x))
            stats = variables.pop("batch_stats", {})

            def traced(train: bool) -> Any:
                def step(stats: Any, key: jax.Array, variables: Any, x: jax.Array) -> Any:
                    options: Any = {"mutable": ["batch_stats"], "rngs": {"dropout": key} if train else {}}
                    outputs, changed = self.apply({**variables, "batch_stats": stats}, x, train=train, **options)
                    return changed.get("batch_stats", stats), outputs

                return jax.make_jaxpr(step)(stats, key, variables, x).jaxpr

            trained = traced(True)
            try:
                evaluated = traced(False)
            except flax_errors.InvalidRngError as error:
                raise self._refuse_at_evaluation(True) from error
        kinds = self._kinds(stats)
        count, statistics = len(kinds), [kind == "statistics" for kind in kinds]
        moved, moved_later = (
            [new is not old for new, old in zip(jaxpr.outvars[:count], jaxpr.invars[:count], strict=True)]
            for jaxpr in (trained, evaluated)
        )
        read = used_inputs(evaluated, count)[:count]
        draws = any(compress(read, (kind == "key" for kind in kinds)))
        others = [moves and kind == "others" for moves, kind in zip(moved_later, kinds, strict=True)]
        learns = dce_jaxpr(evaluated, others + [False] * (len(evaluated.outvars) - count))[1][-1]  # the examples come last
        if draws or learns or any(compress(moved_later, statistics)):
            raise self._refuse_at_evaluation(draws)
        key_used = used_inputs(trained)[count]
        return Trace.of(key_used, any(moved), list(compress(moved, statistics)), list(compress(read, statistics)))

    def _whole_bn_batches(self, examples: int) -> int:
        """Returns about `examples`, rounded to whole BN batches if the module has a field for their size."""
        size = self.bn_batch_size or 1
        return max(size, examples - examples % size)

    def _kinds(self, stats: Any) -> list[str]:
        """Returns the kind of each array in batch_stats: "statistics", "key" (a random key) or "others"."""
        return ["statistics"] * len(jax.tree.leaves(stats))

    def _mode(self, train: bool) -> dict[str, bool]:
        return {name: MODES[name] == train for name in self._modes}

    def _require_sound(self, trace: "Trace") -> None:
        if trace.fault:
            raise InputError(f"model: {self.label} {trace.fault}. {RECOGNISED}")
        for remark in trace.remarks:
            print(f"warning: model: {self.label} {remark}", file=sys.stderr, flush=True)

    def _refuse_at_evaluation(self, draws: bool) -> InputError:
        does = "draws random numbers, as dropout does," if draws else "changes its batch_stats"
        return InputError(f"model: {self.label} {does} at evaluation, where it must not train. {RECOGNISED}")


class LinenModel(OwnModel):
    """A linen module behind `apply(…, train=…)`, whatever the name of its own mode argument.

    Batch norm and dropout follow Flax's conventions: running statistics are in the collection "batch_stats", dropout
    draws from the key "dropout". Modules with other collections are refused.
    """

    def __init__(self, module: Any, modes: Sequence[str] | None = None):
        """`modes` are the arguments in MODES that the module takes; None reads them from its signature."""
        super().__init__(type(module).__name__, modes_among(_parameters(module)) if modes is None else modes)
        self.module, size = module, getattr(module, "bn_batch_size", None)
        self.bn_batch_size = size if isinstance(size, int) and size > 0 else None

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        variables: Any = self.module.init(key, x, **self._mode(False))  # pyright: ignore[reportArgumentType]
        if not {"params"} <= variables.keys() <= {"params", "batch_stats"}:
            raise InputError(f"model: {self.label} has the collections {sorted(variables)}, accepts params and batch_stats.")
        return variables

    def apply(self, variables: Any, x: jax.Array, train: bool = False, **options: Any) -> Any:
        return self.module.apply(variables, x, **self._mode(train), **options)

    def with_bn_batch_size(self, bn_batch_size: int | None, /, axis_name: str | None = None) -> "OwnModel":
        """Returns the model with its field `bn_batch_size` set, or unchanged for None; its batches are never sharded."""
        if bn_batch_size is None or not hasattr(self.module, "bn_batch_size"):
            return super().with_bn_batch_size(bn_batch_size, axis_name)
        return LinenModel(self.module.clone(bn_batch_size=bn_batch_size), self._modes)

    def settled(self, example: jax.ShapeDtypeStruct) -> "LinenModel":
        """Returns the model with the mode arguments that it takes, as `OwnModel.settled`."""
        candidates = [self._modes]
        if not self._modes and any(p.kind is p.VAR_KEYWORD for p in _parameters(self.module)):
            # The keyword arguments may pass a mode on to a submodule, so each mode is tried.
            candidates = [*((name,) for name in MODES), ()]
        images = batch_of(example, self._whole_bn_batches(_TRACED_EXAMPLES))
        found: list[tuple[LinenModel, Trace]] = []
        for modes in candidates:
            model = LinenModel(self.module, modes)
            try:
                found.append((model, model._traced(images)))
            except InputError:
                if not found and modes is candidates[-1]:
                    raise
            if found and found[-1][1].trains:
                break
        model, trace = min(found, key=lambda pair: (pair[1].fault is not None, not pair[1].trains))
        self._require_sound(trace)
        return model

    def _traced(self, x: Any) -> "Trace":
        dropouts: dict[str, bool | None] = {}  # by path, whether it drops anything; None is not known
        with nn.intercept_methods(partial(_watch, self.label, dropouts)):
            trace = super()._traced(x)
        unused = [path for path, drops in dropouts.items() if not (trace.draws if drops is None else drops)]
        if unused:
            layers = f"has {len(unused)} dropout layer(s) of {len(dropouts)} that training never uses: {unused[0]}."
            trace.remarks.insert(0, layers)
            if len(unused) == len(dropouts) and not trace.fault:
                trace = trace._replace(fault=f"has dropout ({unused[0]}) that training never uses")
        return trace


class Trace(NamedTuple):
    """Behaviour of a model in one training step and one evaluation."""

    draws: bool  # whether training uses its random key
    trains: bool
    fault: str | None  # an error that cannot be intended
    remarks: list[str]  # on layers that stay in evaluation mode while others train, which may be intended

    @classmethod
    def of(cls, draws: bool, moves: bool, moved: list[bool], read: list[bool]) -> "Trace":
        """Builds a trace; per running statistic, `moved`: whether training changes it, `read`: whether evaluation uses it."""
        fault, still = None, moved.count(False)
        if moved and not any(moved):
            fault = "has batch_stats that training never changes: its batch norm is left at mean 0 and variance 1"
        elif moved and not any(read):
            fault = "has batch_stats that evaluation does not use: its batch norm takes the statistics of the test images"
        remark = f"has {still} of {len(moved)} arrays in batch_stats that training never changes."
        return cls(draws, draws or moves, fault, [remark] if still else [])


@contextmanager
def errors_explained(subject: str, called: str) -> Iterator[None]:
    """Converts an error of the user's code to a one-line InputError: the subject ("model: NAME") raised it, called with …"""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = cut(" ".join(str(error).split("\n\n")[0].split()), _MOST_CHARACTERS)
        raise InputError(f"{subject} raised {type(error).__name__}: {said} (called with {called})") from error


def modes_among(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """Returns the names in MODES among the parameters of a call."""
    return [p.name for p in parameters if p.name in MODES and p.default in (p.empty, None, True, False)]


def abstract_key() -> Any:
    """Returns shape and dtype of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def batch_of(example: jax.ShapeDtypeStruct, size: int) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of a batch of examples."""
    return jax.ShapeDtypeStruct((size, *example.shape), example.dtype)


def used_inputs(jaxpr: Any, first: int = 0) -> list[bool]:
    """Returns for each input whether any output depends on it, from output number `first` on."""
    return dce_jaxpr(jaxpr, [place >= first for place in range(len(jaxpr.outvars))])[1]


def _watch(label: str, dropouts: dict[str, bool | None], call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor for `nn.intercept_methods`: records each dropout layer and refuses batch norm over a single value."""
    module = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    path = "/".join(module.path) or label
    if isinstance(module, nn.BatchNorm) and args:
        _require_several_values(module, path, *args, **kwargs)
    result = call(*args, **kwargs)
    if isinstance(module, nn.Dropout):
        if module.rate:
            dropouts[path] = bool(dropouts.get(path)) or not any(result is x for x in args)
        return result
    for name in module.__dataclass_fields__:  # such as the dropout_rate of attention
        rate = getattr(module, name, None)
        if "drop" in name and isinstance(rate, float) and 0 < rate < 1:
            dropouts[f"{path}.{name}={rate:g}"] = None
    return result


def _require_several_values(module: nn.BatchNorm, path: str, x: Any, use_running_average: bool | None = None, **_: Any) -> None:
    """Refuses batch norm whose mean and variance are over a single value, because its output is constant."""
    average = module.use_running_average if use_running_average is None else use_running_average
    if average or module.axis_name is not None:
        return
    axes = (module.axis,) if isinstance(module.axis, int) else module.axis
    if x.size == math.prod(x.shape[axis] for axis in axes):
        raise InputError(
            f"model: {path} (BatchNorm) takes mean and variance over a single value of its input {list(x.shape)}, and gives a "
            "constant; use larger batches, or no batch norm there."
        )


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """Returns the parameters of the module's call after self and the images."""
    return list(inspect.signature(type(module).__call__).parameters.values())[2:]
