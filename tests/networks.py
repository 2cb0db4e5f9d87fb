"""Small models of every library: equal MLPs, and models with batch norm, dropout or noise."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

FEATURES, HIDDEN, CLASSES = 4, 8, 3
ROWS = jax.ShapeDtypeStruct((FEATURES,), jnp.float32)


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="out")(nn.tanh(nn.Dense(HIDDEN, name="hidden")(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(FEATURES, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def make_mlp(key):
    return eqx.nn.MLP(FEATURES, CLASSES, HIDDEN, 1, jnp.tanh, key=key)


def init_mlp(key, x):
    keys = jax.random.split(key)
    sizes = [(x.shape[-1], HIDDEN), (HIDDEN, CLASSES)]
    return [(jax.random.normal(k, size), jnp.zeros(size[1])) for k, size in zip(keys, sizes, strict=True)]


def apply_mlp(params, x):
    (kernel, bias), (out_kernel, out_bias) = params
    return jnp.tanh(x @ kernel + bias[None]) @ out_kernel + out_bias[None]


class Noisy(nnx.Module):
    """A module with batch norm and dropout, which are state of a run."""

    def __init__(self, rngs, rate=0.5):
        self.hidden, self.norm = nnx.Linear(FEATURES, HIDDEN, rngs=rngs), nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout, self.out = nnx.Dropout(rate, rngs=rngs), nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1))))))


class EquinoxNoisy(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear
    order: jax.Array  # integers, hence not parameters

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden, self.out = eqx.nn.Linear(FEATURES, HIDDEN, key=keys[0]), eqx.nn.Linear(HIDDEN, CLASSES, key=keys[1])
        self.norm, self.dropout = eqx.nn.BatchNorm(HIDDEN, "batch", momentum=0.9, mode="ema"), eqx.nn.Dropout(0.5)
        self.order = jax.random.permutation(key, HIDDEN)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.hidden(x.ravel()), state)
        return self.out(self.dropout(jax.nn.relu(x[self.order]), key=key)), state


def noisy_apply(params, rng, x, is_training):
    """Takes its arguments in Haiku's order and adds noise in training."""
    (kernel, bias), (), out = params
    x = jnp.tanh(x.reshape(len(x), -1) @ kernel + bias[None])
    return (x * jax.random.bernoulli(rng, 0.5, x.shape) if is_training else x) @ out


def noisy_init(key, x):
    return [(0.1 * jax.random.normal(key, (x[0].size, HIDDEN)), jnp.zeros(HIDDEN)), (), jnp.ones((HIDDEN, CLASSES))]


make_noisy = eqx.nn.make_with_state(EquinoxNoisy)
NOISY = {"nnx": Noisy, "equinox": make_noisy, "functions": (noisy_init, noisy_apply)}
