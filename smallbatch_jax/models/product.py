"""The product of examples with a layer's kernel, and its gradients."""

import jax

from smallbatch_jax.models import blocks
from smallbatch_jax.models.fusion import rounded

# Examples of a batch up to which the gradient of a dense layer's kernel is a sum of outer products on CPU.
FEW_EXAMPLES = 32


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[N, D] · [D, F] → [N, F], or with rows of each example [N, R, D] · [D, F] → [N, R, F]."""
    rows = x.shape[1] if x.ndim == 3 else 1
    return blocks.filled(lambda x: x @ kernel, rows, x)


def _forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _backward(residuals, dy):
    x, kernel = residuals
    return product(dy, kernel.T), _kernel_gradient(x, dy)


product.defvjp(_forward, _backward)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Σ_n xᵀ dy, [D, F].

    Of few examples as a sum of outer products: XLA:CPU has no fast product for so short a sum, and can fuse this one with the
    update of the kernel. The first is rounded, so that each of the others can only be fused into the sum, nothing into it.
    """
    n = len(x)
    if x.ndim == 2 and blocks.together(n) <= FEW_EXAMPLES and jax.default_backend() == "cpu":
        outer = [x[i][:, None] * dy[i][None, :] for i in range(n)]
        size = n // blocks.count(n)
        of_blocks = [sum(outer[i + 1 : i + size], rounded(outer[i])) for i in range(0, n, size)]
        while len(of_blocks) > 1:
            of_blocks = [a + b for a, b in zip(of_blocks[::2], of_blocks[1::2], strict=True)]
        return of_blocks[0]

    def of_few(x: jax.Array, dy: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])

    rows = x.shape[1] if x.ndim == 3 else 1
    return blocks.summed(of_few, blocks.at_once(n, max(1, blocks.LONGEST_SUM // rows)), x, dy)
