"""Identity of a user's module: the same in every process, and different for modules that train differently.

Two parts. `digest` describes the module's fields down to constants, array contents and what functions close over. `fingerprint`
is what the module computes: it tells apart code that the fields do not show. Bytecode is in neither: it differs between
versions of Python.
"""

import dataclasses
import enum
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from smallbatch_jax.config.experiment import InputError

# Libraries whose functions are known by their name, wherever a version of the library keeps them.
_LIBRARIES = ("flax", "jax", "jaxlib", "numpy", "optax")
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|\bobject at \w+")
_THIS_PROCESS = os.urandom(8).hex()
_held: dict[int, Any] = {}  # objects known by their address, so that no other object gets it


def digest(module: nn.Module) -> tuple[str, list[str]]:
    """Returns a digest of the module's class and fields, and the fields that no other process can recognise.

    An object is unrecognisable if nothing but its address tells it from others of its class, e.g. a generator. It is then
    equal to itself alone, and only in this process.
    """
    unstable: list[str] = []
    try:
        described = _Describer(unstable).describe(module, "")
    except RecursionError as error:
        raise InputError(
            f"model: the fields of {type(module).__name__} are nested too deeply to be told from others."
        ) from error
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12], unstable


class _Describer:
    """Turns a value into nested lists of texts that are equal for equal values."""

    def __init__(self, unstable: list[str]):
        self._unstable = unstable
        self._open: list[int] = []  # what is being described: a value may contain itself

    def describe(self, value: Any, path: str) -> Any:
        if id(value) in self._open:
            return ["again", len(self._open) - self._open.index(id(value))]
        self._open.append(id(value))
        try:
            return self._describe(value, path)
        finally:
            self._open.pop()

    def _describe(self, value: Any, path: str) -> Any:
        if isinstance(value, enum.Enum):
            return ["enum", _name(type(value)), value.name]
        if isinstance(value, np.generic):
            return self._describe(value.item(), path) if not isinstance(value.item(), np.generic) else [repr(value)]
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, range, slice, type(...))):
            return [type(value).__name__, repr(value)]
        if isinstance(value, (jax.Array, np.ndarray)):
            return self._array(value, path)
        if isinstance(value, np.dtype) or _is_scalar_type(value):
            return ["dtype", str(np.dtype(value))]
        if isinstance(value, Mapping):
            pairs = [[self.describe(k, f"{path} key"), self.describe(v, f"{path}[{k!r}]")] for k, v in value.items()]
            return ["mapping", *sorted(pairs, key=json.dumps)]
        if isinstance(value, (set, frozenset)):
            return ["set", *sorted((self.describe(v, f"{path} element") for v in value), key=json.dumps)]
        if isinstance(value, (list, tuple)):
            return ["sequence", *(self.describe(v, f"{path}[{i}]") for i, v in enumerate(value))]
        if isinstance(value, functools.partial):
            return ["partial", *(self.describe(part, path) for part in (value.func, value.args, value.keywords))]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, type):
            return ["class", _name(value), *([] if _importable(value) else self._methods(value, path))]
        if _importable(value):
            return ["named", _name(value)]
        if isinstance(value, types.FunctionType):
            return self._function(value, path)
        if isinstance(value, types.MethodType):
            return ["method", self.describe(value.__self__, path), value.__name__]
        if callable(value) and hasattr(value, "__wrapped__"):  # by jax.jit, jax.custom_jvp and the like
            return ["wrapped", _name(type(value)), self.describe(value.__wrapped__, path)]
        return self._object(value, path)

    def _array(self, value: Any, path: str) -> Any:
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return ["key", self._array(jax.random.key_data(value), path)]
        array = np.asarray(value)
        if array.dtype.hasobject:
            return ["objects", list(array.shape), self.describe(array.ravel().tolist(), path)]
        content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return ["array", str(array.dtype), list(array.shape), content]

    def _function(self, function: types.FunctionType, path: str) -> Any:
        """A lambda or a function made by another one: its constants and names, and the values that it takes from around it."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        closure = [[name, self._cell(cell, f"{path}.{name}")] for name, cell in cells]
        defaults = [self.describe(given, path) for given in (function.__defaults__, function.__kwdefaults__)]
        constants = [] if _of_library(function) else self._constants(function.__code__)
        return ["function", _name(function), constants, closure, defaults]

    def _cell(self, cell: Any, path: str) -> Any:
        try:
            return self.describe(cell.cell_contents, path)
        except ValueError:  # not filled yet
            return ["empty"]

    def _constants(self, code: types.CodeType) -> list[str]:
        """Constants and names of the code and of the functions in it, in an order that no version of Python changes."""
        found = {*map(repr, code.co_names)}
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found.update(self._constants(constant))
            elif constant is not None:
                found.add(json.dumps(self.describe(constant, "")))
        return sorted(found)

    def _methods(self, kind: type, path: str) -> list[Any]:
        """What a class that cannot be imported is made of, e.g. one of a notebook."""
        bases = [self.describe(base, path) for base in kind.__bases__ if base is not object]
        found = []
        for name, attribute in sorted(vars(kind).items()):
            written = getattr(attribute, "__wrapped__", attribute)  # flax wraps the methods of a module
            if isinstance(written, types.FunctionType) and written.__code__.co_filename != "<string>":  # not a dataclass's own
                found.append([name, self._function(written, f"{path}.{name}")])
        return bases + found

    def _is_default(self, value: Any, default: Any) -> bool:
        return value is default or self.describe(value, "") == self.describe(default, "")

    def _object(self, value: Any, path: str) -> Any:
        kind = type(value)
        described = self.describe(kind, path)
        if dataclasses.is_dataclass(value):
            given = [field for field in dataclasses.fields(value) if field.name != "parent"]
            if _of_library(kind):  # another version of it may have more fields
                given = [field for field in given if not self._is_default(getattr(value, field.name, None), field.default)]
            names = [field.name for field in given]
        else:
            slots = itertools.chain.from_iterable(_slots(base) for base in kind.__mro__)
            names = [*sorted(getattr(value, "__dict__", {})), *sorted(set(slots))]
        if names or dataclasses.is_dataclass(value):
            prefix = f"{path}." if path else ""
            fields = [[n, self.describe(getattr(value, n), prefix + n)] for n in names if hasattr(value, n)]
            return ["object", described, fields]
        try:
            text = repr(value)
        except Exception:
            text = f"object at {id(value)}"
        if not _ADDRESS.search(text):
            return ["object", described, text]
        self._unstable.append(path)
        _held[id(value)] = value
        return ["address", described, _THIS_PROCESS, id(value)]


def _of_library(value: Any) -> bool:
    """Whether another version of a library may have other code for it, and has the same meaning."""
    return _name(value).partition(":")[0] in _LIBRARIES


def _is_scalar_type(value: Any) -> bool:
    """np.float32, which is a class, or jnp.float32, which has a dtype."""
    return isinstance(value, type) and (issubclass(value, np.generic) or isinstance(getattr(value, "dtype", None), np.dtype))


def _slots(kind: type) -> Iterator[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return (name for name in names if name not in ("__dict__", "__weakref__"))


def _name(value: Any) -> str:
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", None) or value.__name__
    package = module.partition(".")[0]
    return f"{package if package in _LIBRARIES else module}:{name}"


def _importable(value: Any) -> bool:
    """Whether its name finds it, in this process and in another: a function or class of a module, not of a notebook."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


EXAMPLES = 4
# Processors and versions of XLA round sums differently: float32 agrees to about 1e-6 of the norm, behind some layers to 1e-5.
# Values are compared with this tolerance and not rounded before they are hashed: where rounding is, a number may lie at its
# edge. A change of the code that moves nothing by more is not noticed.
TOLERANCE, TOLERANCE_16_BITS = 1e-4, 3e-2

Apply = Callable[..., Any]


def fingerprint(init: Callable[[Any, Any], Any], apply: Apply, image_shape: Sequence[int], examples: int) -> dict[str, Any]:
    """What a module computes, on CPU: norm and mean of its initial parameters, their gradients and its logits.

    Args:
      init: (key, images) → variables.
      apply: (variables, images, train, dropout key) → logits, with the dropout key used in training alone.
      image_shape: of one image.
      examples: of the batch that it is tried on.

    Returns:
      JSON values: "tolerance", relative, and "values", by name two floats on the scale of the first. `workdir.py` compares.
    """
    images = np.random.RandomState(0).standard_normal((examples, *image_shape)).astype(np.float32)

    def compute(images: jax.Array) -> dict[str, Any]:
        variables = dict(init(jax.random.key(0), images[:1]))
        params = variables.pop("params")

        def loss(params: Any) -> Any:
            logits = apply({"params": params, **variables}, images, True, jax.random.key(1)).astype(jnp.float32)
            labels = jnp.arange(examples) % logits.shape[-1]
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -picked.mean(), logits

        (_, trained), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        evaluated = apply({"params": params, **variables}, images, False, None).astype(jnp.float32)
        found = {"evaluation": _summary(evaluated), "training": _summary(trained)}
        for kind, tree in (("initial", {"params": params, **variables}), ("gradient", gradient)):
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            found |= {f"{kind} {_leaf_name(path, leaf)}": _summary(leaf) for path, leaf in leaves}
        return found

    cpus = _cpus()
    with jax.default_device(cpus[0]) if cpus else nullcontext():
        traced = jax.jit(compute, compiler_options={"xla_backend_optimization_level": 0}).trace(images)
        few_bits = any(kind in str(traced.jaxpr) for kind in ("bf16[", "f16["))
        values = traced.lower().compile()(images)
    tolerance = TOLERANCE_16_BITS if few_bits else TOLERANCE
    return {"tolerance": tolerance, "values": {name: np.asarray(v).tolist() for name, v in values.items()}}


def _leaf_name(path: Any, leaf: Any) -> str:
    keys = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
    return f"{keys} {'x'.join(map(str, leaf.shape))}".rstrip()


def _summary(array: Any) -> jax.Array:
    """Norm, and sum divided by the square root of the number of elements, which no cancellation makes larger than the norm."""
    flat = jnp.ravel(array).astype(jnp.float32)
    return jnp.stack([jnp.linalg.norm(flat), flat.sum() / max(1, flat.size) ** 0.5])


def _cpus() -> list[Any]:
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return []
