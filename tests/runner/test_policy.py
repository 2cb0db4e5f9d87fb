"""Search policies on stored grids, on surfaces whose best is known, and on curves of any kind."""

import dataclasses
import itertools
import math
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallbatch_jax.config.grid import Run
from smallbatch_jax.config.metric import Metric
from smallbatch_jax.runner.policy import Space, _Search, best_cells, final_values, recommended, search

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
from replay import FEW_BASE_LRS, Stored, grids, noise, replay

SIZES = (2, 8, 32, 128, 512)
BASE_LRS = tuple(2.0**k for k in range(-12, 1))


def space(budget, sizes=SIZES, base_lrs=BASE_LRS, epochs=16, seeds=(0,), **options):
    return Space(tuple((m, m) for m in sizes), base_lrs, epochs, seeds, budget, **options)


def runs_of(space):
    return [Run(*shape, lr, seed) for shape in space.shapes for lr in space.base_lrs for seed in space.seeds]


def surface(epochs=16, follows=1.0, slow=None, top=None, noise=0.004, sign=1, dead=()):
    """Returns run → curve, with one best rate per batch size, a cliff two rates above it and a rise at mid-schedule.

    Args:
      follows: exponent of 1/m in the best η̃; 1 keeps η = η̃·m constant, 0 keeps η̃ constant.
      slow: time constant of learning in epochs, by batch size; 2 by default.
      top: final value of the best rate, by batch size; by default 0.9, falling by 0.02 for each factor of 4.
      sign: -1 for a loss.
      dead: batch sizes at which every run diverges.
    """

    def curve(run):
        m, rng = run.batch_size, random.Random(repr(run))
        best = -4 - follows * math.log2(m)
        off = math.log2(run.base_lr) - best
        if off > 2 or m in dead:
            return [math.nan]
        value = (top or {}).get(m, 0.9 - 0.01 * math.log2(m)) - 0.01 * off**2
        values = []
        for epoch in range(1, epochs + 1):
            learnt = 1 - math.exp(-epoch / (slow or {}).get(m, 2) * 2**off if off < 0 else -epoch / (slow or {}).get(m, 2))
            high = 0.1 * max(0, off + 2) * (epoch <= epochs / 2)  # a high rate looks bad before the schedule reduces it
            values.append(sign * max(0.1, 0.1 + (value - 0.1) * learnt - high + rng.gauss(0, noise)))
        return values

    return curve


def drive(space, curve, shuffled=False):
    """Runs a search; returns its rounds, the curves it has seen and the epochs trained, a diverged one counted whole."""
    seen, rounds, given_up, asked = {}, [], set(), None
    policy = search(space)
    try:
        asked = next(policy)
        while True:
            assert asked.shape in space.shapes
            assert all((run.batch_size, run.bn_batch_size) == asked.shape for run in asked.goals)
            for run, goal in asked.goals.items():
                reached = len(seen.get(run, ()))
                assert reached <= goal <= space.epochs
                assert goal == reached or (run not in given_up and not (reached and math.isnan(seen[run][-1])))
            assert any(goal > len(seen.get(run, ())) for run, goal in asked.goals.items()), "a round trains something"
            given_up |= {run for run in seen if (run.batch_size, run.bn_batch_size) == asked.shape} - set(asked.goals)
            rounds.append(asked)
            curves = {run: curve(run)[:goal] for run, goal in asked.goals.items()}
            seen |= curves
            asked = policy.send(dict(reversed(curves.items())) if shuffled else curves)
    except StopIteration:
        pass
    return rounds, seen, sum(map(len, seen.values()))


def regret(space, curve):
    """Returns how much better the whole grid's best cell is than the search's, by the grid's values."""
    _, seen, spent = drive(space, curve)
    assert spent <= space.budget
    grid = {run: curve(run) for run in runs_of(space)}
    of_grid = {cell: sum(values) / len(values) for cell, values in final_values(space, grid).items()}
    shape, (base_lr, _) = next(iter(best_cells(space, seen).items()))
    return max(of_grid.values()) - of_grid[shape, base_lr]


GRIDS = {f"{name}-{'-'.join(map(str, found[0].seeds))}": found for name, *found in grids(0.25)}


@pytest.mark.parametrize("name", GRIDS)
def test_a_stored_grids_best_is_found_within_the_noise_for_a_quarter_of_its_images(name):
    chosen, runs, examples = GRIDS[name]
    found = replay(chosen, runs)
    assert found.regret <= noise(found, examples)
    assert 0 < found.cost <= 0.25 or len(chosen.base_lrs) < FEW_BASE_LRS


def test_every_study_with_a_free_rate_is_replayed():
    results = Path(__file__).parents[2] / "notebooks" / "results"
    studies = {str(path.parent.relative_to(results)) for path in results.glob("*/*/experiment.json")}
    fixed = {name for name in studies if name.startswith("pytorch/") or "fig13" in name or name.endswith("fig04")}
    diverged = {"cifar10_5000/resnet32_nobn"}
    assert {name.partition("-")[0] for name in GRIDS} == studies - fixed - diverged


def test_of_rates_that_begin_about_as_well_the_higher_ones_go_on():
    """Three rates are about equal after an epoch, as at m = 8 with warm-up, where the highest of them ends best."""
    chosen = space(10, (8,), tuple(2.0**k for k in (-9, -7, -5, -3)), epochs=5)
    first = dict(zip(runs_of(chosen), ([0.303], [0.302], [0.302], [0.225]), strict=True))
    assert _Search(chosen, 10, first).ranked((8, 8), range(4)) == [2, 1, 0, 3]


@pytest.mark.parametrize("follows", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, -1])
def test_the_best_rate_of_every_batch_size_is_found_with_a_fifth_of_the_grid(follows, order):
    chosen = space(0.2 * 16 * len(SIZES) * len(BASE_LRS), SIZES[::order], base_lrs=tuple(2.0**k for k in range(-16, -1)))
    curve = surface(follows=follows)
    _, seen, _ = drive(chosen, curve)
    best = best_cells(chosen, seen)
    expected = {m: -4 - follows * math.log2(m) for m in SIZES}
    assert {m for m, _ in best} == set(SIZES)
    assert all(abs(math.log2(base_lr) - expected[m]) <= 1 for (m, _), (base_lr, _) in best.items())


@pytest.mark.parametrize("best", [0, 12])
def test_the_best_rate_may_be_the_lowest_or_the_highest(best):
    curve = surface(follows=0)
    rates = tuple(2.0 ** (-4 + i - best) for i in range(13))
    assert regret(space(150, base_lrs=rates), curve) <= 0.02


def test_large_batches_that_learn_slowly_are_not_given_up_for_small_ones_that_learn_fast():
    slow, top = {512: 6, 128: 5}, dict(zip(SIZES, (0.7, 0.7, 0.72, 0.75, 0.9), strict=True))
    chosen, curve = space(200), surface(slow=slow, top=top)
    _, seen, _ = drive(chosen, curve)
    early = {m: max(curve(run)[0] for run in runs_of(chosen) if run.batch_size == m and len(curve(run)) > 1) for m in SIZES}
    assert early[512] < early[2]
    assert next(iter(best_cells(chosen, seen))) == (512, 512)


def test_a_batch_size_at_which_all_diverge_is_searched_down_to_the_lowest_rate_and_left():
    chosen = space(200)
    _, seen, spent = drive(chosen, surface(dead=(32,)))
    assert min(run.base_lr for run in seen if run.batch_size == 32) == BASE_LRS[0]
    assert {m for m, _ in best_cells(chosen, seen)} == set(SIZES) - {32}
    dead = sum(len(values) for run, values in seen.items() if run.batch_size == 32)
    assert dead <= len(BASE_LRS)
    assert spent > 200 - 16, "its part of the budget goes to the others"


def test_where_all_survivors_diverge_late_lower_rates_follow():
    def curve(run):
        return [0.8] * 4 + [math.nan] if run.base_lr > 2.0**-9 else [0.3] * 16

    _, seen, _ = drive(space(160), curve)
    best = best_cells(space(160), seen)
    assert {m for m, _ in best} == set(SIZES)
    assert all(base_lr <= 2.0**-9 for base_lr, _ in best.values())


def test_nothing_is_found_where_every_run_diverges():
    _, seen, _ = drive(space(200), surface(dead=SIZES))
    assert best_cells(space(200), seen) == {}
    assert all(Run(m, m, BASE_LRS[0], 0) in seen for m in SIZES)


@pytest.mark.parametrize("sizes", [(8,), SIZES])
@pytest.mark.parametrize("rates", [1, 2, 13])
@pytest.mark.parametrize("epochs", [1, 2, 16])
def test_one_rate_and_one_batch_size_are_enough(sizes, rates, epochs):
    chosen = space(3 * epochs * len(sizes), sizes, BASE_LRS[:rates], epochs)
    _, seen, spent = drive(chosen, surface(epochs))
    assert {m for m, _ in best_cells(chosen, seen)} == set(sizes)
    assert spent <= chosen.budget


def test_the_budget_is_spread_evenly_over_the_batch_sizes():
    _, seen, _ = drive(space(200), surface(follows=0, top=dict.fromkeys(SIZES, 0.9)))
    spent = {m: sum(len(values) for run, values in seen.items() if run.batch_size == m) for m in SIZES}
    assert max(spent.values()) - min(spent.values()) <= 16


@pytest.mark.parametrize(("dead", "searched"), [((), {2, 16, 128}), ((16, 128), {1, 2, 4, 16, 128})])
def test_a_short_budget_goes_to_every_third_batch_size_and_what_is_left_to_those_beside_the_best(dead, searched):
    chosen = space(4 * 32, tuple(2**k for k in range(9)))
    _, seen, _ = drive(chosen, surface(follows=0, dead=dead))
    assert {run.batch_size for run in seen} == searched
    assert {m for m, _ in best_cells(chosen, seen)} == searched - set(dead)


@pytest.mark.parametrize("budget", [2, 5, 16, 20, 40])
def test_a_tiny_budget_still_finishes_a_run(budget):
    chosen = space(budget)
    _, seen, spent = drive(chosen, surface())
    assert best_cells(chosen, seen)
    assert spent < budget + 16


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_budget_as_large_as_the_grid_tries_all_of_it_and_ends(seeds):
    chosen = space(8 * 13 * 3 * len(seeds), SIZES[:3], epochs=8, seeds=seeds)
    _, seen, _ = drive(chosen, surface(8, dead=(2,)))
    assert set(seen) == set(runs_of(chosen))
    assert all(len(values) == 8 or math.isnan(values[-1]) for values in seen.values())


def test_a_run_goes_on_from_its_rung():
    chosen = space(200)
    rounds, seen, _ = drive(chosen, surface())
    reached = {run: sorted({asked.goals[run] for asked in rounds if run in asked.goals}) for run in seen}
    assert [1, 8, 16] in reached.values()
    assert {goal for goals in reached.values() for goal in goals} == {1, 8, 16}


def test_rounds_of_a_shape_follow_each_other_until_its_halving_ends():
    chosen = space(600, seeds=(0, 1), fresh=(2, 3))
    rounds, *_ = drive(chosen, surface())
    shapes = [shape for shape, _ in itertools.groupby(rounds, key=lambda asked: asked.shape)]
    assert shapes[: len(SIZES)] == [(m, m) for m in SIZES]
    seen = set()
    for i, (_, group) in enumerate(itertools.groupby(rounds, key=lambda asked: asked.shape)):
        goals = {run: goal for asked in group for run, goal in asked.goals.items()}
        assert i < len(SIZES) or (set(goals.values()) == {16} and not seen & set(goals))
        seen |= set(goals)


def test_leaders_get_further_seeds_and_shapes_out_of_reach_do_not():
    top = dict(zip(SIZES, (0.9, 0.9, 0.6, 0.5, 0.4), strict=True))
    chosen = space(480, seeds=tuple(range(10)))
    _, seen, _ = drive(chosen, surface(top=top))
    seeds = {m: len({run.seed for run in seen if run.batch_size == m}) for m in SIZES}
    assert min(seeds[2], seeds[8]) > 3
    assert seeds[128] == seeds[512] == 1


def test_the_runner_up_gets_about_half_as_many_seeds_as_the_leader():
    chosen = space(2 * 32 + 12 * 16, SIZES[:2], seeds=tuple(range(16)))
    _, seen, _ = drive(chosen, surface(top={2: 0.9, 8: 0.9}, noise=0.02))
    seeds = sorted(len({run.seed for run in seen if run.batch_size == m}) for m in SIZES[:2])
    assert 0.25 <= seeds[0] / seeds[1] <= 0.75


def test_the_last_round_trains_fresh_seeds_of_the_recommended_cell():
    chosen = space(300, seeds=(0, 3), fresh=(4, 5))
    rounds, seen, spent = drive(chosen, surface())
    last = rounds[-1]
    before = {run: values for run, values in seen.items() if run not in last.goals}
    shape, base_lr = recommended(chosen, before)
    assert last == (shape, {Run(*shape, base_lr, seed): 16 for seed in (4, 5)})
    assert {run.seed for run in before} == {0, 3}
    assert spent <= 300


def test_a_loss_is_searched_as_the_accuracy_that_it_mirrors():
    high, low = space(200, seeds=(0, 1)), space(200, seeds=(0, 1), metric=Metric("test_loss", "min"))
    assert drive(high, surface())[0] == drive(low, surface(sign=-1))[0]
    grid = Stored({run: surface(sign=-1)(run) for run in runs_of(low)}, dict.fromkeys(runs_of(low), 16.0))
    assert 0 <= replay(low, grid).regret < 0.02
    assert replay(dataclasses.replace(low, budget=20), grid).regret > 0


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_same_curves_give_the_same_rounds(seeds):
    chosen = space(300, seeds=seeds, fresh=(9,))
    assert drive(chosen, surface())[0] == drive(chosen, surface(), shuffled=True)[0]


def test_a_run_given_up_is_left_out_and_one_that_diverged_rules_its_cell_out():
    chosen = space(0, (8,), (0.5, 0.25), epochs=2, seeds=(0, 1))
    curves = {Run(8, 8, 0.5, 0): [0.8, 0.9], Run(8, 8, 0.5, 1): [math.nan]}
    curves |= {Run(8, 8, 0.25, 0): [0.2, 0.4], Run(8, 8, 0.25, 1): [0.1]}
    values = {((8, 8), 0.5): [pytest.approx(0.85), -math.inf], ((8, 8), 0.25): [pytest.approx(0.3)]}
    assert final_values(chosen, curves) == values
    assert best_cells(chosen, curves) == {(8, 8): (0.25, pytest.approx(0.3))}


def test_a_lucky_single_seed_is_not_recommended_over_a_cell_of_two():
    chosen = space(0, (8,), (0.5, 0.25), epochs=1, seeds=(0, 1))
    curves = {Run(8, 8, 0.5, 0): [0.9], Run(8, 8, 0.25, 0): [0.8], Run(8, 8, 0.25, 1): [0.7]}
    assert recommended(chosen, curves) == ((8, 8), 0.25)


def test_the_replay_counts_what_diverged_runs_trained_in_the_grid_and_in_the_search():
    chosen = space(8, (8,), (2.0**-7, 1.0), epochs=4)
    good, bad = Run(8, 8, 2.0**-7, 0), Run(8, 8, 1.0, 0)
    found = replay(chosen, Stored({good: [0.1, 0.2, 0.3, 0.4], bad: [math.nan]}, {good: 4.0, bad: 0.25}))
    assert found == (((8, 8), 2.0**-7), 0.25, ((8, 8), 2.0**-7), 0.25, 0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_curves_keep_the_budget_and_the_contract(data):
    epochs, seeds = data.draw(st.integers(1, 20)), tuple(range(data.draw(st.integers(1, 3))))
    sizes = SIZES[: data.draw(st.integers(1, 5))]
    rates = BASE_LRS[: data.draw(st.integers(1, 13))]
    budget = data.draw(st.floats(0.5, 1.2 * epochs * len(sizes) * len(rates) * len(seeds)))
    chosen = space(budget, sizes, rates, epochs, seeds, fresh=tuple(range(7, 7 + data.draw(st.integers(0, 3)))))
    seed, share = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))

    def curve(run):
        rng = random.Random(f"{run}{seed}")
        drawn = [rng.random() for _ in range(epochs)]
        diverged = rng.randrange(epochs) if rng.random() < share else epochs
        return [*drawn[:diverged], math.nan][:epochs]

    _, seen, spent = drive(chosen, curve)
    finished = sum(len(values) == epochs and not math.isnan(values[-1]) for values in seen.values())
    assert spent < budget + epochs
    assert spent <= budget or finished <= 1
