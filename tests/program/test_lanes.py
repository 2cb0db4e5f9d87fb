"""A lane's result depends on its own run alone, and no scalar of a run compiles anything."""

import functools

import jax
import numpy as np
import pytest
import tiny

from smallbatch_jax.program import device_data as on_device
from smallbatch_jax.program import lanes
from smallbatch_jax.program import segment as on_lanes
from smallbatch_jax.program.train import Program, Setting

pytestmark = pytest.mark.usefixtures("optimized")

BATCH_SIZE = 4
STEPS = 13  # an epoch of 50 examples ends after 13 steps (12.5, rounded)


@functools.cache
def device_data():
    return on_device.to_device(tiny.dataset(), lanes.lane_mesh())


@functools.cache
def compiled(num_lanes=4, mapping="map", model=tiny.PlainModel):
    program = Program(BATCH_SIZE, total_steps=26)
    return lanes.compile_lanes(model(), program, device_data(), lanes.lane_mesh(), num_lanes, STEPS, mapping=mapping)


@functools.cache
def initial(model=tiny.PlainModel):
    return lanes.initialiser(model(), tiny.dataset().example)


def settings(base_lrs, seeds=0, weight_decay=0.0, warmup_fraction=0.0):
    n = len(base_lrs)
    full = [np.full(n, v, d) for v, d in ((seeds, np.int32), (weight_decay, np.float32), (warmup_fraction, np.float32))]
    return Setting(np.array(base_lrs, np.float32), *full)


def segment(seeds, steps, first=0, evaluate=True):
    """Returns a segment in which every lane takes its own number of steps of an epoch."""
    indices = np.zeros((len(seeds), STEPS, BATCH_SIZE), np.int32)
    for lane, (seed, count) in enumerate(zip(seeds, steps, strict=True)):
        indices[lane, :count] = tiny.batch_indices(seed, first, count, BATCH_SIZE, 50)
    return lanes.Segment(indices, np.array(steps, np.int32), np.full(len(seeds), evaluate))


def train(program, base_lrs, seeds=None, steps=None, model=tiny.PlainModel, segments=None):
    """Trains fresh lanes for all segments; returns (states, last report) as NumPy arrays, stacked by lane."""
    seeds = seeds or [0] * len(base_lrs)
    segments = segments or [segment(seeds, steps or [STEPS] * len(base_lrs))]
    state = program.start(program.empty(), {lane: initial(model)(seed) for lane, seed in enumerate(seeds)})
    report = None
    for s in segments:
        state, report = program.run(state, settings(base_lrs), s)
    return jax.tree.map(np.asarray, (state, report))


def assert_same_lane(a, i, b, j):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[i], y[j]), a, b)


@pytest.mark.parametrize("lane", range(4))
def test_a_lane_is_bit_for_bit_what_it_is_in_any_place_and_beside_any_neighbours(lane):
    rate, seed = 2**-7, 5
    base_lrs, seeds = [2**-4, 2**-9, 2**-6, 2**-8], [1, 2, 3, 4]
    base_lrs[lane], seeds[lane] = rate, seed
    alone = train(compiled(2), [rate, rate], [seed, seed])
    assert_same_lane(train(compiled(4), base_lrs, seeds), lane, alone, 0)


def test_a_lane_that_diverges_leaves_its_neighbours_bit_for_bit_as_they_were():
    calm = train(compiled(), [2**-7, 2**-8, 2**-7, 2**-9])
    beside = train(compiled(), [2**-7, 1e30, 2**-7, np.inf])
    assert list(beside[1].alive) == [True, False, True, False]
    for lane in (0, 2):
        assert_same_lane(calm, lane, beside, lane)


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_a_diverged_lane_takes_no_more_steps_and_reports_the_step_of_its_first_loss_that_is_not_finite(mapping):
    program = compiled(mapping=mapping)
    _, report = train(program, [1e30, 2**-8, 2**-8, 2**-8])
    first_loss = train(program, [2**-8] * 4, steps=[1] * 4)[1].loss_sum[0]
    assert report.step[0] in (1, 2)  # the first loss is taken before any update
    assert not np.isfinite(report.loss_sum[0])
    assert np.isfinite(first_loss)
    assert report.tested["test"].examples[0] == 0 < report.tested["test"].examples[1]
    again, later = train(program, [1e30, 2**-8, 2**-8, 2**-8], segments=[segment([0] * 4, [STEPS] * 4)] * 2)
    assert later.step[0] == report.step[0]
    assert not again.alive[0]


def test_side_by_side_lanes_agree_with_lanes_one_after_the_other():
    base_lrs, seeds, steps = [2**-9, 2**-8, 2**-7, 2**-6], [0, 0, 1, 2], [STEPS, 5, STEPS, 0]
    mapped, vmapped = (train(compiled(mapping=kind), base_lrs, seeds, steps) for kind in ("map", "vmap"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), mapped, vmapped)


def test_cutting_an_epoch_into_segments_changes_no_bit():
    base_lrs = [2**-7] * 4
    whole = train(compiled(), base_lrs)
    parts = [segment([0] * 4, [5] * 4, 0, False), segment([0] * 4, [8] * 4, 5, True)]
    in_parts = train(compiled(), base_lrs, segments=parts)
    jax.tree.map(np.testing.assert_array_equal, whole, in_parts)


def test_an_evaluation_covers_the_whole_test_set_once():
    state, report = train(compiled(), [2**-7] * 4)
    data = tiny.dataset()
    mean, deviation = data.channel_statistics()
    params = jax.tree.map(lambda x: x[0], state.train.params)
    logits = tiny.PlainModel().apply({"params": params}, (data.test_images - mean) / deviation)
    expected = -np.asarray(jax.nn.log_softmax(logits))[np.arange(20), data.test_labels].mean()  # pyright: ignore
    tested = report.tested["test"]
    assert tested.examples[0] == 20
    np.testing.assert_allclose(tested.sums["loss"][0] / 20, expected, rtol=1e-5)
    assert tested.sums["accuracy"][0] == (np.argmax(logits, -1) == data.test_labels).sum()  # pyright: ignore


def test_a_test_set_that_no_batch_divides_is_padded_with_images_that_do_not_count(monkeypatch):
    monkeypatch.setattr(on_device, "LARGEST_EVAL_BATCH", 7)
    data = on_device.to_device(tiny.dataset(num_test=20), lanes.lane_mesh())
    assert data.splits["test"].labels.shape == (3, 7)
    assert int(data.splits["test"].counts.sum()) == 20


def test_no_rate_seed_decay_or_warmup_compiles_anything():
    """After one segment, others with other settings request no compilation, as counted by JAX itself."""
    program = compiled()
    train(program, [2**-7] * 4)
    fresh = initial(tiny.PlainModel)
    requests = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: requests.append(name) if "backend_compile" in name else None
    )
    try:
        state = program.start(program.empty(), {0: fresh(7), 2: fresh(8)})
        for decay, warmup in ((0.0, 0.0), (1e-4, 0.05), (1.0, 0.5)):
            chosen = settings([0.1, 0.2, 0.3, 2**-12], seeds=9, weight_decay=decay, warmup_fraction=warmup)
            state, _ = program.run(state, chosen, segment([9] * 4, [STEPS] * 4))
        assert requests == []
        jax.jit(lambda x: x * 3 + 1)(np.float32(2))  # the listener does hear a compilation
        assert requests
    finally:
        jax.monitoring.clear_event_listeners()


def test_lanes_must_spread_evenly_over_the_devices():
    with pytest.raises(ValueError, match="3 is not a multiple of 2 devices"):
        compiled(3)


@functools.cache
def shared_by(devices, mapping):
    """Trains two lanes for two augmented epochs, each batch on `devices`; a step straddles both; 21 test images."""
    data = on_device.to_device(tiny.dataset(num_test=21), lanes.lane_mesh())
    program = Program(BATCH_SIZE, total_steps=26, axis_name="data" if devices > 1 else None, augment=True)
    mesh = lanes.lane_mesh(data_devices=devices)
    with pytest.MonkeyPatch.context() as patch:  # a random crop of so small an image is often all padding
        patch.setattr(on_lanes, "draw_crops", lambda seed, epochs, _: 40 + 81 * epochs)  # the second epoch is flipped
        compiled = lanes.compile_lanes(tiny.PlainModel(), program, data, mesh, 2, STEPS, mapping=mapping)
    return train(compiled, [2**-7, 1e30], segments=[segment([0, 0], [STEPS] * 2, first) for first in (0, STEPS)])


@pytest.mark.parametrize("mapping", ["vmap", pytest.param("map", marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_batch_shared_by_two_devices_trains_and_is_evaluated_as_on_one(mapping):
    """Parameters, sums, test loss and number correct agree, and the diverging lane diverges at the same step."""
    one, two = shared_by(1, mapping), shared_by(2, mapping)
    assert list(two[1].alive) == [True, False]
    assert_lanes_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(lambda a, b: assert_lanes_close(a[0], b[0]), one, two)
    assert two[1].step[1] == one[1].step[1]


def test_a_program_and_its_mesh_must_agree_on_sharing():
    mesh = lanes.lane_mesh(data_devices=2)
    with pytest.raises(ValueError, match="axis_name: None does not go with 2 devices that share a batch"):
        lanes.compile_lanes(tiny.PlainModel(), Program(BATCH_SIZE, 26), device_data(), mesh, 2, STEPS)
