"""Augmentation of §3.1 on the device: pad 4 pixels on each side, take a random crop, flip at random."""

import jax
import jax.numpy as jnp
from jax import lax

PAD = 4  # pixels
OFFSETS = 2 * PAD + 1


def crop_and_flip(images: jax.Array, seed: jax.Array, epochs: jax.Array, examples: jax.Array) -> jax.Array:
    """Takes a random crop of each image padded by 4 pixels, flipped left to right with probability 1/2.

    Follows Lin et al. (2013) and He et al. (2015a), who pad the normalised image with zeros, its mean colour. The crop is a
    function of (seed, epoch, example) alone: the same in any lane, at any batch size and after any restart.

    Args:
      images: float32[n, H, W, C], normalised.
      seed: int32[], of the run.
      epochs: int32[n], the epoch of the stream in which each image is seen, from 0.
      examples: int32[n], its index in the training set.

    Returns:
      float32[n, H, W, C].
    """
    run_key = jax.random.fold_in(jax.random.key(seed), 1)  # 0 belongs to the initialisation
    choices = jax.vmap(lambda epoch, example: _choice(run_key, epoch, example))(epochs, examples)
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    crops = jax.vmap(lambda image, choice: _crop(image, choice, images.shape[1:]))(padded, choices)
    flipped = choices // OFFSETS**2 == 1
    return jnp.where(flipped[:, None, None, None], crops[:, :, ::-1], crops)


def _choice(key: jax.Array, epoch: jax.Array, example: jax.Array) -> jax.Array:
    """Draws one of the 9·9·2 crops and flips, equally likely to within 4e-8: uint32[]."""
    bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, epoch), example), (), jnp.uint32)
    return bits % (2 * OFFSETS**2)


def _crop(padded: jax.Array, choice: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    top, left = choice % OFFSETS, choice // OFFSETS % OFFSETS
    return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), shape)
