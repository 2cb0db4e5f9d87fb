"""A synthetic language whose entropy is known, and a small causal transformer to learn it; for `language_model.ipynb`.

The language is a Markov chain of second order: the first two tokens are uniform, and every further one depends on the two
before it. So the least expected loss of any model is a number that can be computed, not guessed.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def random_language(vocabulary: int, seed: int, concentration: float = 0.2) -> np.ndarray:
    """Returns P[a, b, c] of token c after a and b, float64[V, V, V]: draws from a symmetric Dirichlet distribution."""
    rows = np.random.default_rng(seed).dirichlet([concentration] * vocabulary, size=(vocabulary, vocabulary))
    return (rows + 1e-3) / (1 + 1e-3 * vocabulary)  # no token is impossible, so that every loss is finite


def draw(language: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """Returns sequences of the language, int32[count, length]."""
    rng, vocabulary = np.random.default_rng(seed), len(language)
    tokens = rng.integers(vocabulary, size=(count, length), dtype=np.int32)  # uniform; from the third on replaced
    cumulative = language.cumsum(-1)
    for t in range(2, length):
        below = cumulative[tokens[:, t - 2], tokens[:, t - 1]] <= rng.random((count, 1))
        tokens[:, t] = np.minimum(below.sum(1), vocabulary - 1)
    return tokens


def true_losses(language: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns the loss of the language itself as a model, in nats, the mean over tokens 1 … T-1: float64[n] for int[n, T]."""
    known = -np.log(language[tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]]).sum(1)
    return (np.log(len(language)) + known) / (tokens.shape[1] - 1)


def entropy(language: np.ndarray, length: int) -> float:
    """Returns the expectation of `true_losses` for sequences of a length, exactly: no model has a lower expected loss."""
    pairs = np.full(language.shape[:2], len(language) ** -2.0)  # P(last but one, last)
    of_next, total = -(language * np.log(language)).sum(-1), np.log(len(language))
    for _ in range(2, length):
        total += (pairs * of_next).sum()
        pairs = np.einsum("ab,abc->bc", pairs, language)
    return float(total / (length - 1))


class Transformer(nn.Module):
    """A causal transformer of one block with learnt positions, normalised before each layer, without biases."""

    vocabulary: int
    width: int = 32
    heads: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits float32[n, T, vocabulary] for tokens int32[n, T]; those at t depend on tokens 0 … t."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x += self.param("positions", nn.initializers.normal(0.1), (1, *x.shape[1:]))
        x += self.attention(nn.RMSNorm()(x))
        x += dense(self.width)(nn.relu(dense(4 * self.width)(nn.RMSNorm()(x))))
        return dense(self.vocabulary)(nn.RMSNorm()(x))

    def attention(self, x: jax.Array) -> jax.Array:
        """Returns the heads' averages of the values so far, float32[n, T, width]."""
        size = self.width // self.heads
        q, k, v = (y.reshape(*x.shape[:2], self.heads, size) for y in jnp.split(dense(3 * self.width)(x), 3, -1))
        scores = jnp.einsum("nthd,nshd->nhts", q, k) / size**0.5
        weights = nn.softmax(jnp.where(np.tri(x.shape[1], dtype=bool)[None, None], scores, -jnp.inf))
        return dense(self.width)(jnp.einsum("nhts,nshd->nthd", weights, v).reshape(x.shape))


dense = partial(nn.Dense, use_bias=False)
