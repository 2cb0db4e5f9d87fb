"""Lanes that train side by side on a GPU or TPU: the gradient of their summed losses, and few arrays to update."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from smallbatch_jax.program.diagnostics import hessian_product
from smallbatch_jax.program.train import Model, PyTree, TrainState


def summed_value_and_grad(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Returns `jax.value_and_grad` of a function that is vmapped over lanes; differentiates the sum of the lanes' losses.

    The gradients are the same, but outside the vmap the gradient of a convolution keeps the kernel's own window, for which
    GPUs have a routine (`batch_group_count`). Inside it becomes a convolution with a window as large as the image.
    """

    @custom_vmap
    def function(*arguments: Any) -> Any:
        return jax.value_and_grad(loss_fn, has_aux=has_aux)(*arguments)

    @function.def_vmap
    def side_by_side(lanes: int, batched: Any, params: PyTree, *others: Any) -> Any:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched[1:]))

        def total(params: PyTree) -> tuple[jax.Array, Any]:
            outputs = jax.vmap(loss_fn, (0, *axes), axis_size=lanes)(params, *others)
            return (outputs[0] if has_aux else outputs).sum(), outputs

        grads, outputs = jax.grad(total, has_aux=True)(params)
        return (outputs, grads), jax.tree.map(lambda _: True, (outputs, grads))

    return function


def summed_hessian_product(loss_fn: Callable[..., Any]) -> Callable[..., PyTree]:
    """Returns `diagnostics.hessian_product` of a function that is vmapped over lanes; see `summed_value_and_grad`."""

    @custom_vmap
    def function(*arguments: Any) -> PyTree:
        return hessian_product(loss_fn)(*arguments)

    @function.def_vmap
    def side_by_side(lanes: int, batched: Any, *arguments: Any) -> Any:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched[2:]))
        params, vector = jax.tree.map(  # the first vector is the same in all lanes
            lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (lanes, *x.shape)), arguments[:2], tuple(batched[:2])
        )

        def total(params: PyTree) -> tuple[jax.Array, Any]:
            losses, aux = jax.vmap(loss_fn, (0, *axes), axis_size=lanes)(params, *arguments[2:])
            return losses.sum(), aux

        product = hessian_product(total)(params, vector)
        return product, jax.tree.map(lambda _: True, product)

    return function


class Packing(NamedTuple):
    """The packing of a tree of arrays: all vectors of a dtype in one array, which a GPU updates in one kernel.

    Kernels of convolutions and dense layers stay separate arrays: a slice of a longer one would be copied at each use.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[str, ...]  # each leaf's dtype if it is a vector or scalar, else a name of its own

    @classmethod
    def of(cls, tree: PyTree) -> "Packing":
        leaves, structure = jax.tree.flatten(tree)
        groups = (str(leaf.dtype) if leaf.ndim <= 1 else f"leaf {i}" for i, leaf in enumerate(leaves))
        return cls(structure, tuple(leaf.shape for leaf in leaves), tuple(groups))

    def pack(self, tree: PyTree) -> dict[str, jax.Array]:
        leaves = jax.tree.leaves(tree)
        return {
            name: jnp.concatenate([leaf.ravel() for leaf, group in zip(leaves, self.groups, strict=True) if group == name])
            if self.groups.count(name) > 1
            else leaves[self.groups.index(name)]
            for name in dict.fromkeys(self.groups)
        }

    def unpack(self, packed: dict[str, jax.Array]) -> PyTree:
        parts = {}
        for name, array in packed.items():
            shapes = [shape for shape, group in zip(self.shapes, self.groups, strict=True) if group == name]
            parts[name] = iter([array] if len(shapes) == 1 else lax.split(array, [math.prod(shape) for shape in shapes]))
        leaves = [next(parts[group]).reshape(shape) for group, shape in zip(self.groups, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


class Unpacked:
    """Stands in for a `Packing` and leaves every tree as it is."""

    structure = jax.tree.structure(None)
    pack = unpack = staticmethod(lambda tree: tree)


class PackedModel(NamedTuple):
    """A model whose parameters and running averages are packed."""

    model: Model
    params: Packing | Unpacked
    batch_stats: Packing

    @classmethod
    def of(cls, model: Model, states: TrainState, elementwise: bool) -> "PackedModel":
        """Returns the packed model for stacked lane states; parameters are packed only if the optimizer is `elementwise`."""
        lane = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)
        return cls(model, Packing.of(lane.params) if elementwise else Unpacked(), Packing.of(lane.batch_stats))

    def pack(self, state: TrainState) -> TrainState:
        opt_state, params = _of_each(self.params.structure, self.params.pack, (state.opt_state, state.params))
        return state._replace(params=params, batch_stats=self.batch_stats.pack(state.batch_stats), opt_state=opt_state)

    def unpack(self, state: TrainState) -> TrainState:
        packed = jax.tree.structure(state.params)
        opt_state, params = _of_each(packed, self.params.unpack, (state.opt_state, state.params))
        return state._replace(params=params, batch_stats=self.batch_stats.unpack(state.batch_stats), opt_state=opt_state)

    def apply(self, variables: dict[str, Any], images: jax.Array, **options: Any) -> Any:
        """Calls `model.apply` in training mode, with "batch_stats" mutable."""
        unpacked = {name: getattr(self, name).unpack(value) for name, value in variables.items()}
        logits, updated = self.model.apply(unpacked, images, **options)
        return logits, {name: self.batch_stats.pack(value) for name, value in updated.items()}


def _of_each(structure: Any, function: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """Applies a function to each subtree that has this structure."""

    def has_structure(tree: PyTree) -> bool:
        return jax.tree.structure(tree) == structure

    return jax.tree.map(lambda part: function(part) if has_structure(part) else part, tree, is_leaf=has_structure)
