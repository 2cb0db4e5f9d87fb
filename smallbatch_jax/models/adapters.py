"""Adapters of models that are not linen modules: flax.nnx, Equinox, and pairs of functions; `adapted` chooses."""

import inspect
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from smallbatch_jax.config import extras
from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.models.own import LinenModel, OwnModel, abstract_key, errors_explained, modes_among

ACCEPTED = (
    "a model's name, a flax.linen.Module, a function or class that makes a flax.nnx.Module from `rngs` or an equinox.Module "
    "from `key`, or a pair of functions (init, apply)"
)
PyTree = Any
# A module's arrays: its parameters, and its state {"statistics": running statistics, "others": random keys, counts, …}.
Arrays = tuple[PyTree, dict[str, PyTree]]


def adapted(model: Any) -> OwnModel:
    """Returns the adapter of a user's model; traces a factory, and runs nothing.

    Args:
      model: a linen module; a factory, `make(rngs)` that returns a `flax.nnx.Module`, or `make(key)` that returns an
        `equinox.Module` or (module, `equinox.nn.State`); or functions `init(key, x)` → parameters and `apply(params, x)`.

    Raises:
      InputError: if it is none of these, or the factory fails.
    """
    first = model[0] if isinstance(model, tuple) and model else model
    if isinstance(model, linen.Module):
        return LinenModel(model)
    if isinstance(first, nnx.Module) or (_is_of_equinox(first) and not isinstance(first, type)):
        kind, argument = type(first).__name__, "rngs" if isinstance(first, nnx.Module) else "key"
        example = f"lambda {argument}: {kind}(…, {argument}={argument})"
        raise InputError(
            f"model: got an instance of {kind}, whose parameters would ignore the seed; give a factory, e.g. {example}."
        )
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return FunctionsModel(*model)
    if not callable(model):
        raise InputError(f"model: got {type(model).__name__}, accepts {ACCEPTED}.")
    make, label = _from_key(model)
    made: list[Any] = []
    with errors_explained(f"model: {label}", "a key; a factory of flax.nnx names its argument rngs, one of Equinox key"):
        jax.eval_shape(lambda key: made.append(make(key)), abstract_key())
    result = made[0]
    if isinstance(result, nnx.Module):
        return NnxModel(make)
    if _is_of_equinox(result[0] if isinstance(result, tuple) and result else result):
        extras.require("equinox", "model")
        return EquinoxModel(make)
    raise InputError(f"model: {label} returns a {type(result).__name__}; accepts {ACCEPTED}.")


def _from_key(factory: Callable[..., Any]) -> tuple[Callable[[jax.Array], Any], str]:
    """Returns the factory as a function of a key, and its name."""
    given = factory if isinstance(factory, partial) else partial(factory)
    label = getattr(given.func, "__name__", type(given.func).__name__)
    function, itself = (given.func.__init__, (None,)) if isinstance(given.func, type) else (given.func, ())  # not a metaclass's
    try:
        parameters = inspect.signature(partial(function, *itself, *given.args, **given.keywords)).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"model: the arguments of {label} cannot be read: {error}; accepts {ACCEPTED}.") from error
    if "rngs" in parameters:
        return lambda key: factory(rngs=nnx.Rngs(key)), label
    kinds = [p.kind for p in parameters.values()]
    if "key" in parameters or inspect.Parameter.VAR_KEYWORD in kinds:  # `equinox.nn.make_with_state` passes any argument on
        return lambda key: factory(key=key), label
    required = [p for p in parameters.values() if p.default is p.empty]
    if len(required) == 1 and required[0].kind in (required[0].POSITIONAL_ONLY, required[0].POSITIONAL_OR_KEYWORD):
        return factory, label
    raise InputError(f"model: {label} takes ({', '.join(parameters)}), neither rngs nor key; accepts {ACCEPTED}.")


def _is_of_equinox(value: Any) -> bool:
    """Returns whether the value's class derives from one of Equinox's, without importing Equinox."""
    return any(kind.__module__.partition(".")[0] == "equinox" for kind in type(value).__mro__)


class FactoryModel(OwnModel):
    """A module made by a factory from a key; `init` extracts its arrays, and each traced step puts them back.

    "params" and "batch_stats" are dicts of arrays keyed by their path in the module. Random keys are stored as uint32 data.
    """

    def __init__(self, make: Callable[[jax.Array], Any]):
        made: list[Any] = []

        def split(key: jax.Array) -> Arrays:
            module, arrays, rest = self._split(key)
            made.extend((type(module), rest))
            return arrays

        self._make = make
        self._shapes: Arrays = jax.eval_shape(split, abstract_key())
        kind, self._rest = made
        self._parameters = list(inspect.signature(kind.__call__).parameters.values())[2:]  # after self and the input
        super().__init__(kind.__name__, modes_among(self._parameters))

    @abstractmethod
    def _split(self, key: jax.Array) -> tuple[Any, Arrays, Any]:
        """Makes a module; returns it, its arrays, and what else `_call` needs to rebuild it."""

    @abstractmethod
    def _call(self, arrays: Arrays, x: jax.Array, train: bool, key: jax.Array | None) -> tuple[Any, dict[str, PyTree]]:
        """Returns the outputs for a batch, and the state after it; `key` is the step's key in training, else None."""

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        _, (params, state), _ = self._split(key)
        return {"params": _named(params), "batch_stats": _named(state)}

    def apply(self, variables: Any, x: jax.Array, train: bool = False, **options: Any) -> Any:
        params, state = self._shapes
        arrays = _rebuilt(variables["params"], params), _rebuilt(variables["batch_stats"], state)
        outputs, state = self._call(arrays, x, train, options.get("rngs", {}).get("dropout"))
        return (outputs, {"batch_stats": _named(state)}) if "mutable" in options else outputs

    def settled(self, example: jax.ShapeDtypeStruct) -> OwnModel:
        return super(FactoryModel, type(self)(self._make)).settled(example)  # made again: JAX's flags may have changed

    def _kinds(self, stats: Any) -> list[str]:
        leaves = jax.tree_util.tree_leaves_with_path(self._shapes[1])
        kinds = {_name(path): "key" if _is_key(leaf) else path[0].key for path, leaf in leaves}
        return [kinds[name] for name in sorted(stats)]  # JAX sorts a dict's leaves


class NnxModel(FactoryModel):
    """A `flax.nnx.Module`: every nnx.Param is a parameter; nnx.BatchStat, random streams and other variables are state."""

    _KINDS = nnx.Param, nnx.BatchStat, nnx.Intermediate, ...  # sown values (nnx.Intermediate) are discarded

    def _split(self, key: jax.Array) -> tuple[Any, Arrays, Any]:
        module = self._make(key)
        graph, params, statistics, _, others = nnx.split(module, *self._KINDS)
        found = set(map(id, jax.tree.leaves((params, statistics, others))))
        for path, submodule in nnx.iter_modules(module):
            for name, value in vars(submodule).items():
                if isinstance(value, Tracer) and id(value) not in found:
                    place = ".".join(map(str, (type(module).__name__, *path, name)))
                    raise InputError(f"model: {place} is an array outside nnx's variables; make it an nnx.Variable.")
        return module, (params, {"statistics": statistics, "others": others}), graph

    def _call(self, arrays: Arrays, x: jax.Array, train: bool, key: jax.Array | None) -> tuple[Any, dict[str, PyTree]]:
        params, state = arrays
        module = nnx.merge(self._rest, params, state["statistics"], state["others"])
        (module.train if train else module.eval)()
        outputs = module(x, **self._mode(train))
        _, _, statistics, _, others = nnx.split(module, *self._KINDS)
        return outputs, {"statistics": statistics, "others": others}


class EquinoxModel(FactoryModel):
    """An `equinox.Module` for one example, with or without an `equinox.nn.State`; its floating-point arrays are parameters."""

    def _split(self, key: jax.Array) -> tuple[Any, Arrays, Any]:
        import equinox as eqx

        made = self._make(key)
        module, state = made if isinstance(made, tuple) else (made, None)
        params, rest = eqx.partition(module, eqx.is_inexact_array)
        statistics, rest_of_state = eqx.partition(state, eqx.is_inexact_array)
        others, static = eqx.partition((rest, rest_of_state), eqx.is_array)
        return module, (params, {"statistics": statistics, "others": others}), static

    def _call(self, arrays: Arrays, x: jax.Array, train: bool, key: jax.Array | None) -> tuple[Any, dict[str, PyTree]]:
        # Within a mesh an array's type has a sharding and a constant's has none; an Equinox State refuses the mismatch.
        types = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (arrays, x, key))
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jaxpr, made = jax.make_jaxpr(partial(self._called, train), return_shape=True)(*types)
        results, structure = jaxpr_as_fun(jaxpr)(*jax.tree.leaves((arrays, x, key))), jax.tree.structure(made)
        return jax.tree.map(  # a constant comes as a Python scalar
            lambda x, like: x if isinstance(x, jax.Array) else jnp.asarray(x, like.dtype), structure.unflatten(results), made
        )

    def _called(self, train: bool, arrays: Arrays, x: jax.Array, key: jax.Array | None) -> tuple[Any, dict[str, PyTree]]:
        import equinox as eqx

        params, before = arrays
        rest, rest_of_state = eqx.combine(before["others"], self._rest)
        module, state = eqx.combine(params, rest), eqx.combine(before["statistics"], rest_of_state)
        options = self._mode(train)
        if not train:
            module = eqx.nn.inference_mode(module)

        def call(x: jax.Array, key: jax.Array | None, state: Any) -> Any:
            keyed = {"key": key} if any(p.name == "key" for p in self._parameters) else {}
            if state is None:
                return module(x, **keyed, **options), None
            return module(x, state, **keyed, **options)

        keys, mapped = (None, None) if key is None else (jax.random.split(key, len(x)), 0)
        outputs, state = jax.vmap(call, (0, mapped, None), (0, None), axis_name="batch")(x, keys, state)
        statistics, rest_of_state = eqx.partition(state, eqx.is_inexact_array)
        others = before["others"][0], eqx.filter(rest_of_state, eqx.is_array)
        return outputs, {"statistics": statistics, "others": others}


class FunctionsModel(OwnModel):
    """A pair of pure, stateless functions: `init(key, x)`, which returns parameters, and `apply(params, x)`.

    `apply` gets the modes in `own.MODES` that it takes; an argument `rng` or `key` gets the step's key, or None at evaluation.
    """

    def __init__(self, init: Callable[..., PyTree], apply: Callable[..., Any]):
        self._init, self._apply = init, apply
        parameters = list(inspect.signature(apply).parameters.values())[1:]
        super().__init__(getattr(apply, "__name__", type(apply).__name__).strip("<>"), modes_among(parameters))
        self._key = next((p.name for p in parameters if p.name in ("rng", "key")), None)
        self._key_first = bool(parameters) and parameters[0].name == self._key  # apply(params, rng, x), as Haiku's

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        params = self._init(key, x)
        for dtype in map(jnp.result_type, jax.tree.leaves(params)):
            if not jnp.issubdtype(dtype, jnp.floating):
                raise InputError(f"model: init of {self.label} gives parameters of {dtype}, accepts floating point.")
        return {"params": {"params": params}, "batch_stats": {}}

    def apply(self, variables: Any, x: jax.Array, train: bool = False, **options: Any) -> Any:
        params, key = variables["params"]["params"], options.get("rngs", {}).get("dropout")
        if self._key_first:
            outputs = self._apply(params, key, x, **self._mode(train))
        else:
            outputs = self._apply(params, x, **self._mode(train), **({self._key: key} if self._key else {}))
        return (outputs, {"batch_stats": {}}) if "mutable" in options else outputs


def _named(tree: PyTree) -> dict[str, Any]:
    """Returns a tree's arrays by path; random keys become uint32 data, which every store can hold."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves}


def _rebuilt(named: dict[str, Any], like: PyTree) -> PyTree:
    """Returns the tree that `_named` flattened; `like` gives its structure, shapes and dtypes."""

    def array(path: Any, like: Any) -> Any:
        return jax.random.wrap_key_data(named[_name(path)]) if _is_key(like) else named[_name(path)]

    return jax.tree_util.tree_map_with_path(array, like)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
