"""Tests which examples step k sees: constant work, nothing dropped, and an order that depends only on (seed, epoch)."""

import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from smallbatch_jax.data.order import BatchSchedule, epoch_end, epoch_permutation, stream, total_steps
from smallbatch_jax.optim import step_schedule

# (examples, batch size): divisible or not, exact halves (7 / 2), whole training sets, and m = 1.
SIZES = [(1, 1), (5, 1), (5, 5), (6, 3), (7, 2), (7, 3), (7, 5), (9, 6), (10, 4), (10, 7), (13, 13)]


def all_batches(num_examples, batch_size, epochs, seed=0):
    return tiny.batch_indices(seed, 0, total_steps(epochs, num_examples, batch_size), batch_size, num_examples)


def test_epoch_ends_at_the_rounded_number_of_steps():
    """Epoch e ends at step floor(e·N/m + 1/2) in exact integer arithmetic, so halves round up."""
    sizes = [*SIZES, (1437, 512), (50_000, 3), (1_281_167, 2), (10**12 + 1, 2)]
    for epoch in (0, 1, 2, 3, 7, 82, 164):
        for n, m in sizes:
            assert epoch_end(epoch, n, m) == math.floor(Fraction(epoch * n, m) + Fraction(1, 2))


def test_a_run_is_the_same_work_for_every_batch_size():
    """A run has E·N/m steps, rounded to the nearest, so that m·steps is within m/2 examples of E·N (§3.1)."""
    for n, m in SIZES:
        for epochs in range(1, 9):
            assert abs(total_steps(epochs, n, m) * m - epochs * n) <= m / 2


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_epoch_of_step_is_the_inverse_of_epoch_end(num_examples, batch_size):
    """Exactly the steps from the end of epoch e - 1 to before the end of epoch e belong to epoch e."""
    ends = [epoch_end(e, num_examples, batch_size) for e in range(41)]
    expected = [e for e in range(1, 41) for _ in range(ends[e - 1], ends[e])]
    assert [BatchSchedule(num_examples, batch_size).epoch_of_step(k) for k in range(ends[-1])] == expected


@pytest.mark.parametrize("segment", [1, 2, 3, 1000])
@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_batches_are_the_permutations_end_to_end_however_segments_cut_them(num_examples, batch_size, segment):
    """Step k takes positions k·m … k·m+m-1 of permutation 0, permutation 1, …; a batch may straddle two."""
    steps = total_steps(4, num_examples, batch_size)
    segments = [
        tiny.batch_indices(3, first, min(segment, steps - first), batch_size, num_examples)
        for first in range(0, steps, segment)
    ]
    joined = np.concatenate([epoch_permutation(3, e, num_examples) for e in range(6)])
    np.testing.assert_array_equal(np.concatenate(segments), joined[: steps * batch_size].reshape(steps, batch_size))


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_every_epoch_of_the_stream_holds_each_example_once(num_examples, batch_size):
    """Nothing is dropped when m does not divide N: positions e·N … e·N+N-1 are all the examples."""
    stream = all_batches(num_examples, batch_size, epochs=5).reshape(-1)
    for epoch in range(len(stream) // num_examples):
        one_epoch = stream[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(one_epoch) == list(range(num_examples))


def test_order_is_the_same_for_every_batch_size():
    """Every m cuts the same stream of examples into batches."""
    single = all_batches(10, 1, epochs=3).reshape(-1)
    for m in range(2, 11):
        stream = all_batches(10, m, epochs=3).reshape(-1)[: len(single)]
        np.testing.assert_array_equal(stream, single[: len(stream)])


def test_order_depends_on_seed_and_on_epoch():
    """No two of five seeds × five epochs have the same order of 50 examples."""
    orders = {epoch_permutation(seed, epoch, 50).tobytes() for seed in (0, 1, 2, 3, 2**31 - 1) for epoch in range(5)}
    assert len(orders) == 25


def test_order_depends_on_nothing_else():
    """Neither base_lr nor any other setting of a run is an argument."""
    assert list(inspect.signature(epoch_permutation).parameters) == ["seed", "epoch", "num_examples"]
    assert list(inspect.signature(stream).parameters) == ["seed", "position", "count", "num_examples"]


def test_order_is_pinned():
    """The stream never changes, so that later versions reproduce stored results."""
    found = tiny.batch_indices(seed=3, first_step=1, num_steps=3, batch_size=4, num_examples=5)
    np.testing.assert_array_equal(found, [[3, 0, 1, 3], [2, 4, 4, 1], [0, 3, 2, 3]])


def test_a_batch_may_be_written_to_without_changing_the_order():
    """The returned array is a copy, and the cached permutation is read-only."""
    before = tiny.batch_indices(0, 0, 1, 4, 4).copy()
    tiny.batch_indices(0, 0, 1, 4, 4)[:] = 0
    np.testing.assert_array_equal(tiny.batch_indices(0, 0, 1, 4, 4), before)
    assert not epoch_permutation(0, 0, 4).flags.writeable


def test_no_steps_are_an_empty_batch():
    """The result has shape [0, m], so that a segment without steps needs no special case."""
    found = tiny.batch_indices(0, 5, 0, 4, 10)
    assert (found.shape, found.dtype) == ((0, 4), np.int32)


@st.composite
def growing(draw):
    """Draws a schedule of growing batches, none larger than the training set."""
    boundaries = tuple(draw(st.lists(st.sampled_from([0.0, 0.3, 1 / 3, 0.5, 0.55, 0.75, 0.99, 1.0]), max_size=3, unique=True)))
    growth, n = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    most = n // growth ** len(boundaries)
    return BatchSchedule(n, draw(st.integers(1, max(1, most))), draw(st.integers(1, 9)), boundaries, growth if most else 1)


many = settings(max_examples=100, derandomize=True, deadline=None, database=None)


@many
@given(growing())
def test_growing_batches_are_the_same_work_to_within_half_of_the_last_batch(batches):
    total = batches.total_steps
    last = batches.examples(total) - batches.examples(total - 1)
    assert abs(batches.examples(total) - batches.epochs * batches.num_examples) <= last / 2
    assert last == batches.phases[-1].batch_size


@many
@given(growing())
def test_phases_follow_each_other_without_a_gap_in_steps_or_in_the_stream(batches):
    first, *others = batches.phases
    assert (first.step, first.position) == (0, 0)
    for before, phase in zip(batches.phases, others, strict=False):
        assert phase.step > before.step
        assert phase.position - before.position == (phase.step - before.step) * before.batch_size
        assert phase.batch_size % (before.batch_size * batches.growth) == 0
    assert batches.phases[-1].step < batches.total_steps


@many
@given(growing())
def test_epochs_of_growing_batches_end_at_the_nearest_update(batches):
    seen = [batches.examples(step) for step in range(batches.total_steps + 1)]
    ends = [batches.epoch_end(epoch) for epoch in range(batches.epochs + 1)]
    for epoch, end in enumerate(ends):
        distances = [abs(examples - epoch * batches.num_examples) for examples in seen]
        assert end == max(step for step, distance in enumerate(distances) if distance == min(distances))
    expected = [epoch for epoch in range(1, batches.epochs + 1) for _ in range(ends[epoch - 1], ends[epoch])]
    assert [batches.epoch_of_step(step) for step in range(batches.total_steps)] == expected


@many
@given(growing())
def test_batches_grow_where_the_learning_rate_is_reduced(batches):
    """Batches grow at the exact steps of the schedule, even if several boundaries fall on one step."""
    multiplier = step_schedule(batches.schedule_steps, batches.schedule_boundaries, 0.5)
    for phase in batches.phases if batches.growth > 1 else ():
        reductions = round(math.log2(1 / float(multiplier(phase.step))))
        assert phase.batch_size == batches.batch_size * batches.growth**reductions


@many
@given(growing())
def test_without_growth_everything_is_as_for_one_batch_size(batches):
    n, m, epochs = batches.num_examples, batches.batch_size, batches.epochs
    same = BatchSchedule(n, m, epochs, batches.boundaries)
    assert same.phases == ((0, 0, m),)
    assert same.total_steps == same.schedule_steps == total_steps(epochs, n, m)
    assert [same.epoch_end(epoch) for epoch in range(20)] == [epoch_end(epoch, n, m) for epoch in range(20)]
    assert [same.examples(step) for step in range(9)] == [step * m for step in range(9)]
    assert same.schedule_boundaries is batches.boundaries


def test_a_boundary_that_leaves_less_than_half_a_larger_batch_does_not_enlarge_it():
    """With 10 examples and m = 2, a boundary at 80 % leaves 2, less than half of 6; one at 60 % leaves 4, one batch of 6."""
    assert BatchSchedule(10, 2, 1, (0.8,), 3).phases == ((0, 0, 2),)
    assert BatchSchedule(10, 2, 1, (0.6,), 3).phases == ((0, 0, 2), (3, 6, 6))
    assert BatchSchedule(10, 2, 1, (0.6,), 3).total_steps == 4
