"""Tests augmentation (pad 4, random crop, random flip), which depends only on seed, epoch and example (§3.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from smallbatch_jax.config.experiment import from_config
from smallbatch_jax.data.augment import crop_and_flip, draw_crops, inside
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results

# Multiples of 1/256, so that adding 7 to them rounds nothing.
IMAGES = jnp.asarray(np.random.default_rng(0).integers(-500, 500, (6, 8, 10, 3)) / 256, jnp.float32)


@jax.jit
def augment(images, seed, epochs, examples):
    """Returns normalised images cropped as in training: stored images are cropped, then the padding is set to zero."""
    crops = draw_crops(seed, epochs, examples)
    stored = images + 7  # a padded pixel that is not set to zero shows
    return jnp.where(inside(crops, *images.shape[1:3]), crop_and_flip(stored, crops) - 7, 0)


def test_every_result_is_one_of_the_162_crops_and_flips_and_all_of_them_come_up():
    image = np.asarray(IMAGES[0])
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = [padded[i : i + 8, j : j + 10] for i in range(9) for j in range(9)]
    allowed = {np.ascontiguousarray(c).tobytes() for crop in crops for c in (crop, crop[:, ::-1])}
    assert len(allowed) == 162
    n = 3000
    found = augment(jnp.broadcast_to(IMAGES[0], (n, 8, 10, 3)), 0, jnp.zeros(n, jnp.int32), jnp.arange(n))
    seen = [np.asarray(image).tobytes() for image in found]
    assert set(seen) == allowed
    counts = np.unique(seen, return_counts=True)[1]
    assert counts.max() < 3000 / 162 * 2.2


def test_what_an_image_gets_depends_on_seed_epoch_and_example_alone():
    epochs, examples = jnp.array([0, 0, 1, 1, 2, 2]), jnp.array([7, 3, 9, 7, 7, 1])
    together = augment(IMAGES, 5, epochs, examples)
    for order in ([5, 0, 3, 1, 2, 4], [2, 1]):
        i = jnp.array(order)
        np.testing.assert_array_equal(augment(IMAGES[i], 5, epochs[i], examples[i]), together[i])


@pytest.mark.parametrize("change", ["seed", "epoch", "example"])
def test_another_seed_epoch_or_example_gives_other_crops(change):
    n = 64
    images, zeros = jnp.broadcast_to(IMAGES[0], (n, 8, 10, 3)), jnp.zeros(n, jnp.int32)
    first = augment(images, 0, zeros, jnp.arange(n))
    other = {
        "seed": lambda: augment(images, 1, zeros, jnp.arange(n)),
        "epoch": lambda: augment(images, 0, zeros + 1, jnp.arange(n)),
        "example": lambda: augment(images, 0, zeros, jnp.arange(n) + n),
    }[change]()
    assert (first != other).any((1, 2, 3)).mean() > 0.9


@pytest.mark.long
def test_a_run_sees_the_same_crops_in_any_lane_and_segment_and_others_than_without(tmp_path):
    def train(name, augment, **fields):
        config = tiny.grid(base_lrs=(2**-7,), **fields).to_dict()
        config["dataset"]["augment"] = augment
        experiment = from_config(config)
        train_grid(experiment, tmp_path / name, tiny.dataset(), NoProgress(), tiny.TinyModel)
        return tiny.rows(tmp_path / name, seed=0)

    plain, cropped = train("plain", False), train("cropped", True)
    assert (plain.train_loss != cropped.train_loss).all()
    beside = train("beside", True, seeds=(1, 0), lanes=4, segment_seconds=1e-9)
    assert beside.equals(cropped)
    assert len(results.load(tmp_path / "beside")) == 6
