"""A caller's own model, data and task, checked against known numbers: the entropy of a language, a constant guess."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import scale

import smallbatch_jax as sbj
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.study.answer import answer

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

from language import Transformer, draw, entropy, random_language, true_losses

LENGTH = 16
LANGUAGE = random_language(8, seed=0)


def standard_error(values):
    return values.std() / len(values) ** 0.5


@pytest.mark.parametrize("length", [3, LENGTH])
def test_the_entropy_of_the_language_is_the_mean_loss_of_the_language_itself(length):
    losses = true_losses(LANGUAGE, draw(LANGUAGE, 20_000, length, seed=1))
    assert abs(losses.mean() - entropy(LANGUAGE, length)) < 3 * standard_error(losses) < 0.01


def test_any_other_language_has_a_larger_loss():
    other, tokens = random_language(8, seed=1), draw(LANGUAGE, 1000, LENGTH, seed=1)
    assert true_losses(other, tokens).mean() > entropy(LANGUAGE, LENGTH) + 0.5


@pytest.mark.slow  # the notebook `language_model` asserts it too
def test_the_transformer_comes_within_a_twentieth_of_a_nat_of_the_entropy_and_not_below_it():
    tokens, test = draw(LANGUAGE, 2000, LENGTH, seed=1), draw(LANGUAGE, 1000, LENGTH, seed=2)
    data = sbj.data.Dataset(tokens, None, test, None, num_classes=8)
    adamw = {"optimizer": "adamw", "rule": "constant", "beta2": 0.95}
    rows = sbj.sweep(Transformer(8), data, (4,), (2**-8,), epochs=6, progress=NoProgress(), **adamw)
    loss, truth = rows["test_loss"].iloc[-1], true_losses(LANGUAGE, test)
    assert truth.mean() - 2 * standard_error(truth) < loss < entropy(LANGUAGE, LENGTH) + 0.05


class Regressor(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden, self.out = nnx.Linear(10, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, rows):
        return self.out(nnx.tanh(self.hidden(rows)))


@pytest.mark.long
def test_a_regression_beats_the_constant_guess_and_its_answer_names_the_validation_split(tmp_path):
    rows, targets = map(scale, load_diabetes(return_X_y=True))
    data = sbj.data.Dataset(rows[:342], targets[:342], rows[342:], targets[342:])
    grid = {"batch_sizes": (8,), "base_lrs": (2**-12, 2**-8), "epochs": 5, "seeds": (0, 1), "validation_fraction": 0.2}
    sbj.sweep(partial(Regressor, 8), data, **grid, workdir=tmp_path / "w", progress=NoProgress())
    study = sbj.study.load(tmp_path / "w")
    guess = np.square(targets[342:] - targets[:342].mean()).mean()
    tested = study.rows[(study.rows["epoch"] == 5) & (study.rows["base_lr"] == 2**-8)]["test_loss"]
    assert (tested < 0.75 * guess).all()
    assert study.metric.column == "validation_loss"
    found = answer(study)
    assert found.sentence.startswith("Best at m = 8, η̃ = 2^-8: validation loss ")
    assert any(caveat.startswith("The validation split chose it; its test loss is 0.") for caveat in found.caveats)
