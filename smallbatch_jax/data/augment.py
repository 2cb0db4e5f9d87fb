"""Augmentation of §3.1 on the device: pad 4 pixels on each side, take a random crop, flip at random."""

import jax
import jax.numpy as jnp
from jax import lax

PAD = 4  # pixels
OFFSETS = 2 * PAD + 1


def draw_crops(seed: jax.Array, epochs: jax.Array, examples: jax.Array) -> jax.Array:
    """Draws one of the 9·9·2 crops and flips for each image, equally likely to within 4e-8.

    The crop is a function of (seed, epoch, example) alone: the same in any lane, at any batch size and after any restart.

    Args:
      seed: int32[], of the run.
      epochs: int32[n], the epoch of the stream in which each image is seen, from 0.
      examples: int32[n], its index in the training set.

    Returns:
      uint32[n], top + 9·left + 81·flipped, the crop's corner in the padded image.
    """
    run_key = jax.random.fold_in(jax.random.key(seed), 1)  # 0 belongs to the initialisation

    def draw(epoch: jax.Array, example: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(run_key, epoch), example), (), jnp.uint32)
        return bits % (2 * OFFSETS**2)

    return jax.vmap(draw)(epochs, examples)


def crop_and_flip(images: jax.Array, crops: jax.Array) -> jax.Array:
    """Returns a crop of each image [n, H, W, C], padded by 4 pixels of zero, flipped or not; `crops` are from `draw_crops`."""
    top, left, flipped = _corners(crops)

    def crop(image: jax.Array, top: jax.Array, left: jax.Array) -> jax.Array:
        padded = jnp.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)))
        return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)

    cropped = jax.vmap(crop)(images, top, left)
    return jnp.where(flipped[:, None, None, None], cropped[:, :, ::-1], cropped)


def inside(crops: jax.Array, height: int, width: int) -> jax.Array:
    """Returns a mask bool[n, H, W, 1] of the crops' pixels that belong to the image and not to its padding.

    Lin et al. (2013) and He et al. (2015a) pad the normalised image with zeros, its mean colour. Images are cropped as they
    are stored, so normalised padding must be set to zero.
    """

    def one(top: jax.Array, left: jax.Array, flipped: jax.Array) -> jax.Array:
        rows, columns = top + jnp.arange(height), left + jnp.arange(width)
        columns = jnp.where(flipped, columns[::-1], columns)
        rows, columns = (rows >= PAD) & (rows < PAD + height), (columns >= PAD) & (columns < PAD + width)
        return (rows[:, None] & columns[None, :])[..., None]

    return jax.vmap(one)(*_corners(crops))


def _corners(crops: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns top and left of each crop in the padded image, int32[n], and whether it is flipped, bool[n]."""
    top, left = (v.astype(jnp.int32) for v in (crops % OFFSETS, crops // OFFSETS % OFFSETS))
    return top, left, crops // OFFSETS**2 == 1
