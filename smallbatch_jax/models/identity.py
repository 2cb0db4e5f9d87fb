"""Recognises the user's own module, so that a workdir resumes only with the module it was made with.

A module is identified by its class's name and by a fingerprint, a summary of what it computes on a fixed input. A changed field
or changed code is detected if it changes that result by more than the tolerance. Not detected are an ε of 1e-6 instead of 1e-5,
a limit that these activations never reach, and code that runs for large batches only.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EXAMPLES = 4
# Processors and versions of XLA round sums differently: float32 agrees to about 1e-6 of the norm, after some layers to 1e-5.
# `store.workdir` compares values within this relative tolerance. Hashes of rounded values would differ at rounding boundaries.
TOLERANCE, TOLERANCE_16_BITS = 1e-4, 3e-2


def fingerprint(model: Any, example: jax.ShapeDtypeStruct, examples: int) -> dict[str, Any]:
    """Summarises one training step and one evaluation of an `OwnModel` at its initial parameters, on CPU.

    Returns:
      JSON values: "tolerance", relative, and "values", a dict of pairs (norm, sum / √size) of the initial variables, their
      gradients, the updated batch statistics and the logits.
    """
    images = drawn(np.random.RandomState(0), (examples, *example.shape), example.dtype)

    def compute(images: jax.Array) -> dict[str, Any]:
        variables = dict(model.init(jax.random.key(0), images[:1]))
        params = variables.pop("params")

        def loss(params: Any) -> Any:
            options: Any = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
            outputs, changed = model.apply({"params": params, **variables}, images, train=True, **options)
            return _loss(outputs), (outputs, changed)

        (_, (trained, changed)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        evaluated = model.apply({"params": params, **variables}, images, train=False)
        trees = {"evaluation": evaluated, "training": trained}
        trees |= {"initial": {"params": params, **variables}, "gradient": gradient, "updated": dict(changed)}
        found = {}
        for kind, tree in trees.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                place = jax.tree_util.keystr(path, simple=True, separator="/")
                shape = "x".join(map(str, leaf.shape)) if place else ""  # a single output array is named by its kind alone
                found[" ".join(filter(None, (kind, place, shape)))] = summary(leaf)
        return found

    return compiled_summaries(compute, images)


def drawn(rng: np.random.RandomState, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Draws a fixed input: normal numbers, or zeros and ones for an integer dtype."""
    values = rng.standard_normal(tuple(shape))
    return (np.abs(values) > 1 if jnp.issubdtype(dtype, jnp.integer) else values).astype(dtype)


def _loss(outputs: Any) -> jax.Array:
    """Returns the cross-entropy of logits [n, classes] with arbitrary labels; otherwise the sum of outputs' mean squares."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(outputs)]
    if len(leaves) != 1 or leaves[0].ndim != 2:
        return sum((jnp.square(leaf).mean() for leaf in leaves), jnp.float32(0))
    labels = jnp.arange(len(leaves[0])) % leaves[0].shape[-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(leaves[0]), labels[:, None], 1).mean()


def compiled_summaries(compute: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Runs on CPU a function that returns summaries by name; returns the same dict as `fingerprint`."""
    try:
        device = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        device = nullcontext()
    with device:
        traced = jax.jit(compute, compiler_options={"xla_backend_optimization_level": 0}).trace(*arguments)
        values = traced.lower().compile()(*arguments)
    few_bits = any(dtype in str(traced.jaxpr) for dtype in ("bf16[", "f16["))
    tolerance = TOLERANCE_16_BITS if few_bits else TOLERANCE
    return {"tolerance": tolerance, "values": {name: np.asarray(v).tolist() for name, v in values.items()}}


def summary(array: Any) -> jax.Array:
    """Returns norm and sum / √size; the latter is at most the norm, so one tolerance fits both."""
    flat = jnp.ravel(array).astype(jnp.float32)
    return jnp.stack([jnp.linalg.norm(flat), flat.sum() / max(1, flat.size) ** 0.5])
