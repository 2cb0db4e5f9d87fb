"""How tests compile quickly what is compared to rounding; conftest.py makes the cache of compiled programs."""

import functools

import jax

# `jax.jit` in half the time: LLVM leaves XLA's loops as they are. For equations that hold to rounding, by whatever code.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
QUICKLY = "--xla_backend_optimization_level=0"  # the same in XLA_FLAGS
ENVIRONMENT = {"XLA_FLAGS": QUICKLY}
