"""An identity that makes XLA:CPU store an array instead of recomputing it wherever it is used."""

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def materialised(x: jax.Array) -> jax.Array:
    """Returns x; on CPU through a call that is not inlined, across which XLA does not fuse, elsewhere as a no-op.

    XLA:CPU fuses cheap element-wise operations into each consumer and so repeats them; it drops an `optimization_barrier`
    before it fuses. A materialised ReLU makes ResNet-8 with batch norm 1.09 × as fast at m = 2 (one core of an AMD EPYC with
    AVX2, medians of 15 interleaved segments, 2026-11-26). Comparisons for a max pool's offsets run once, not 36 times.

    It is a primitive, which keeps the lanes' axis in place under vmap; `lax.platform_dependent` would transpose the array.
    """
    return _materialise.bind(x)


def _stored(x: jax.Array) -> jax.Array:
    with set_xla_metadata(inlineable="false"):
        return _identity(x)


@jax.jit
def _identity(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x)  # keeps JAX from dropping the call


_materialise = Primitive("materialise")
_materialise.def_impl(lambda x: x)
_materialise.def_abstract_eval(lambda x: x)
batching.defvectorized(_materialise)
ad.deflinear2(_materialise, lambda dy, _: [dy])
mlir.register_lowering(_materialise, lambda ctx, x: [x])
mlir.register_lowering(_materialise, mlir.lower_fun(_stored, multiple_results=False), platform="cpu")
