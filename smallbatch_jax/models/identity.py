"""Recognises the user's own module, so that a workdir resumes only with the module it was made with.

A module is identified by its class's name and by a fingerprint, a summary of what it computes on a fixed input. A changed field
or changed code is noticed if it changes that result by more than the tolerance. Not noticed: an ε of 1e-6 for 1e-5, a limit
that these activations never reach, code that runs for large batches only.
"""

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
    """Summarises one training step and one evaluation of a model at its initial parameters, on CPU.

    Args:
      model: an `OwnModel`.
      example: shape and dtype of one example, as the model receives it.
      examples: size of the batch.

    Returns:
      JSON values: "tolerance", relative, and "values", a dict of pairs (norm, sum / √size) of the initial variables, their
      gradients, the updated batch statistics and the logits.
    """
    drawn = np.random.RandomState(0).standard_normal((examples, *example.shape))
    images = (np.abs(drawn) > 1 if jnp.issubdtype(example.dtype, jnp.integer) else drawn).astype(example.dtype)

    def compute(images: jax.Array) -> dict[str, Any]:
        variables = dict(model.init(jax.random.key(0), images[:1]))
        params = variables.pop("params")

        def loss(params: Any) -> Any:
            options: Any = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
            logits, changed = model.apply({"params": params, **variables}, images, train=True, **options)
            logits = logits.astype(jnp.float32)
            labels = jnp.arange(examples) % logits.shape[-1]
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -picked.mean(), (logits, changed)

        (_, (trained, changed)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        evaluated = model.apply({"params": params, **variables}, images, train=False)
        found = {"evaluation": _summary(evaluated), "training": _summary(trained)}
        trees = {"initial": {"params": params, **variables}, "gradient": gradient, "updated": dict(changed)}
        for kind, tree in trees.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f"{kind} {jax.tree_util.keystr(path, simple=True, separator='/')}"
                found[f"{name} {'x'.join(map(str, leaf.shape))}".rstrip()] = _summary(leaf)
        return found

    try:
        device = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        device = nullcontext()
    with device:
        traced = jax.jit(compute, compiler_options={"xla_backend_optimization_level": 0}).trace(images)
        values = traced.lower().compile()(images)
    few_bits = any(dtype in str(traced.jaxpr) for dtype in ("bf16[", "f16["))
    tolerance = TOLERANCE_16_BITS if few_bits else TOLERANCE
    return {"tolerance": tolerance, "values": {name: np.asarray(v).tolist() for name, v in values.items()}}


def _summary(array: Any) -> jax.Array:
    """Returns norm and sum / √size; the latter is at most the norm, so one tolerance fits both."""
    flat = jnp.ravel(array).astype(jnp.float32)
    return jnp.stack([jnp.linalg.norm(flat), flat.sum() / max(1, flat.size) ** 0.5])
