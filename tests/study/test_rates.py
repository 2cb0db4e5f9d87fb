"""Tests the fitted rule of the best learning rates η*(m) on surfaces whose rule is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny

from smallbatch_jax.study.rates import _place, best_rates, fit_rule
from smallbatch_jax.study.study import Study

SIZES, RATES = 2.0 ** np.arange(1, 9), 2.0 ** np.arange(-13, 1)


def surface(where, draw, examples, sizes=SIZES):
    """Returns a study of accuracy 0.9 - 0.02·(log2 η - where(log2 m))², with the noise of `examples` test examples."""
    m, lr = (values.ravel() for values in np.meshgrid(sizes, RATES, indexing="ij"))
    true = np.clip(0.9 - 0.02 * (np.log2(lr * m) - where(np.log2(m))) ** 2, 0.05, None)
    seen = true + np.sqrt(true * (1 - true) / examples) * draw.normal(size=m.size)
    columns = {"experiment": "s", "batch_size": m.astype(int), "bn_batch_size": m.astype(int), "base_lr": lr}
    counts = {"finished": 1, "diverged": 0, "pending": 0}
    cells = pd.DataFrame({**columns, "test_accuracy": seen, "test_accuracy_std": np.nan, **counts})
    return Study(Path("s"), tiny.grid(name="s"), pd.DataFrame(), cells, 10, (5000, examples))


def fitted(where, examples, sizes=SIZES, seed=0):
    return fit_rule(best_rates(surface(where, np.random.default_rng(seed), examples, sizes)))


def test_the_exponent_is_recovered_and_its_interval_covers_it():
    draw, found = np.random.default_rng(0), []
    for _ in range(200):
        p, offset, table = draw.uniform(0, 1), draw.uniform(-6, -5), []
        for m in SIZES:
            true = 0.9 - 0.02 * (np.log2(RATES * m) - offset - p * np.log2(m)) ** 2
            centre, std, _, _ = _place(np.log2(RATES), true + 0.03 * draw.normal(size=RATES.size), np.full(RATES.size, 0.03))
            table.append((m, m * 2**centre, std, False))
        rule = fit_rule(pd.DataFrame(table, columns=["batch_size", "rate", "std", "edge"]))
        found.append((rule.exponent - p, rule.low <= p <= rule.high))
    errors, covered = np.array(found).T
    assert abs(errors.mean()) < 0.03
    assert 0.84 <= covered.mean() <= 0.96


RULES = {
    "linear": lambda x: x - 8.3,
    "square-root": lambda x: x / 2 - 6.3,
    "saturating": lambda x: np.minimum(x, 4) - 7.7,
}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_told_apart_by_enough_batch_sizes(name):
    rule = fitted(RULES[name], 10_000)
    assert rule.supported == name
    assert f"follows the {name} rule" in rule.sentence()
    assert rule.rate(name, 16.0) == pytest.approx(2 ** RULES[name](4.0), rel=0.3)
    if name == "saturating":
        assert 11 < rule.turn < 23


@pytest.mark.parametrize("name", RULES)
def test_few_noisy_batch_sizes_do_not_tell(name):
    rule = fitted(RULES[name], 50, sizes=SIZES[:3])
    assert len(rule.likely) > 1
    assert "cannot tell between" in rule.sentence()
    assert rule.low < rule.exponent < rule.high


def test_an_exponent_between_the_rules_is_not_called_saturating():
    rule = fitted(lambda x: 0.75 * x - 7, 1000)
    assert rule.supported == "another power"
    assert "neither the linear nor the √ rule: η* ∝ m^0.7" in rule.sentence()


def test_a_best_at_the_end_of_the_rates_is_not_fitted():
    rule = fitted(lambda x: x - 8 + 9 * (x > 7), 10_000)
    assert rule.table["edge"].tolist() == [False] * 7 + [True]
    assert rule.supported == "linear"
    assert "over 7 batch sizes" in rule.sentence()
    two = fit_rule(rule.table.assign(edge=[False] * 2 + [True] * 6))
    assert two.sentence().endswith("cannot tell; the best rate is inside the range tried at 2 batch sizes; three are needed.")


def test_a_flat_top_leaves_the_rate_uncertain():
    sharp, flat = (best_rates(surface(RULES["linear"], np.random.default_rng(0), n))["std"] for n in (10_000, 50))
    assert sharp.median() < 0.35 < flat.median()


def test_without_known_noise_nothing_is_fitted():
    study = surface(RULES["linear"], np.random.default_rng(0), 10_000)
    table = best_rates(study).assign(std=np.nan)
    assert fit_rule(table).likely == ()
    assert fit_rule(table).offsets == {}
    assert fit_rule(table).sentence().endswith("cannot tell; the noise of a single seed is not known.")
