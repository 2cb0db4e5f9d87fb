"""Batches that grow where the learning rate is reduced: the updates, exact resume from any point, and what is refused."""

import dataclasses
import itertools
import signal
import time
from contextlib import closing
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
import photos
import pytest
import tiny
from asked import changed, refusal
from flax import linen as nn
from shell import refused, run

import smallbatch_jax as sbj
from smallbatch_jax.config.experiment import InputError, Optimizer, Schedule, from_config
from smallbatch_jax.data import order
from smallbatch_jax.program.train import Program
from smallbatch_jax.runner import compiler, scheduler
from smallbatch_jax.runner.grid import Interrupted, train_grid
from smallbatch_jax.runner.input import input_pipeline
from smallbatch_jax.runner.jobs import Job, Setup
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, rows):
        return nn.Dense(3)(nn.tanh(nn.Dense(8)(rows)))


def table():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 260)
    rows = (np.eye(3, 5)[labels] * 3 + rng.normal(0, 1, (260, 5))).astype(np.float32)
    return sbj.data.Dataset(rows[:200], labels[:200], rows[200:], labels[200:], 3)


@pytest.mark.long
def test_a_run_is_a_plain_optax_loop_over_batches_of_growing_size():
    """Three epochs of 200 examples take 45 updates of 4, 15 of 16 from 30 % on and 3 of 64 from 70 % on: 612 examples.

    Momentum has the same half-life in examples at every size, and the warm-up takes 10 % of the examples.
    """
    data, base_lr, momentum, decay, seed = table(), 2**-7, 0.9, 1e-3, 3
    schedule = Schedule((0.3, 0.7), 0.25, warmup_fraction=0.1, batch_growth=4)
    optimizer = Optimizer("momentum", momentum=momentum, beta_rule="half_life", beta_batch_size=4)
    frame = sbj.sweep(
        *(Mlp(), data, [4], [base_lr], 3, [seed]),
        **{"schedule": schedule, "optimizer": optimizer, "weight_decay": decay, "progress": NoProgress()},
    )
    sizes = [4] * 45 + [16] * 15 + [64] * 3
    stream = np.concatenate([order.epoch_permutation(seed, epoch, 200) for epoch in range(4)])
    model = Mlp()
    params = model.init(jax.random.fold_in(jax.random.key(seed), 0), data.train_images[:1])
    velocity = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def loss(params, rows, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, rows), labels).mean()

    @jax.jit
    def step(params, velocity, momentum, learning_rate, rows, labels):
        value, grads = jax.value_and_grad(loss)(params, rows, labels)
        transform = optax.chain(optax.add_decayed_weights(decay), optax.trace(momentum), optax.scale(-learning_rate))
        state: Any = transform.init(params)
        updates, state = transform.update(grads, (state[0], optax.TraceState(velocity), state[2]), params)
        return optax.apply_updates(params, updates), state[1].trace, value

    position, losses, tested = 0, [], {}
    for k, m in enumerate(sizes):
        multiplier = 0.25 ** ((m >= 16) + (m >= 64)) * (1 / 32 + 31 / 32 * k / 15 if k < 15 else 1)
        batch = stream[position : position + m]
        examples = data.train_images[batch], data.train_labels[batch]
        params, velocity, value = step(params, velocity, momentum ** (m / 4), base_lr * m * multiplier, *examples)
        losses += [float(value)] * m
        position += m
        tested[k + 1] = (position, loss(params, data.test_images, data.test_labels))
    assert list(frame.step) == [46, 59, 63]
    ends = [0, *(tested[step][0] for step in frame.step)]
    assert ends == [0, 196, 404, 612]
    means = [np.mean(losses[first:end]) for first, end in itertools.pairwise(ends)]
    np.testing.assert_allclose(frame.train_loss, means, rtol=1e-6)
    np.testing.assert_allclose(frame.test_loss, [tested[step][1] for step in frame.step], rtol=1e-6)


GROWING = Schedule((0.1, 0.5), 0.5, batch_growth=2)  # of 50 examples and 3 epochs: 4 updates of 4, 8 of 8, 4 of 16
RUNS = {"base_lrs": (2**-9, 2**-6), "schedule": GROWING.__dict__, "segment_seconds": 1e-9}


def train(workdir, progress=None, model=tiny.TinyModel, **fields):
    train_grid(tiny.grid(**(RUNS | fields)), workdir, tiny.dataset(), progress or NoProgress(), lambda b: model(b))
    return results.load(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed") / "w")


def test_rows_of_growing_batches_are_under_the_batch_size_that_they_begin_with(undisturbed, tmp_path):
    assert set(undisturbed.batch_size) == set(undisturbed.bn_batch_size) == {4}
    assert set(undisturbed.status) == {"finished"}
    assert list(undisturbed.step.unique()) == [8, 13, 16]
    timings = results.load_timings
    frame = train(tmp_path / "w", base_lrs=(2**-9,))
    pd.testing.assert_frame_equal(frame, undisturbed[undisturbed.base_lr == 2**-9].reset_index(drop=True), check_exact=True)
    segments = timings(tmp_path / "w").query("phase == 'segment'")
    assert (segments.steps.sum(), segments.images.sum()) == (16, 144)
    assert set(segments.batch_size) == {4}


class Stop(NoProgress):
    """Sends this process SIGINT once `examples` are trained or the progress line contains `doing`."""

    def __init__(self, examples=np.inf, doing="nothing"):
        self.examples, self.doing = examples, doing

    def show(self, status, doing):
        if status.trained >= self.examples or self.doing in doing:
            self.examples, self.doing = np.inf, "nothing"
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def saved(monkeypatch):
    """Returns a list that collects the steps of the runs in each checkpoint."""
    found, save = [], scheduler.Checkpoints.save

    def spy(self, lanes, runs):
        found.append({int(step) for step, run in zip(lanes.train.step, runs, strict=True) if run})
        save(self, lanes, runs)

    monkeypatch.setattr(scheduler.Checkpoints, "save", spy)
    monkeypatch.setattr(scheduler.Pace, "FIRST_IMAGES", 4)
    return found


@pytest.mark.parametrize(("examples", "steps"), [(16, 3), (32, 4), (33, 6), (160, 12)])
@pytest.mark.long
def test_a_stopped_run_goes_on_bit_for_bit_before_at_and_after_a_boundary(undisturbed, saved, tmp_path, examples, steps):
    """The batches of two runs grow after 4 and after 12 updates, both within an epoch."""
    with pytest.raises(Interrupted):
        train(tmp_path / "w", Stop(examples))
    assert saved == [{steps}]
    pd.testing.assert_frame_equal(train(tmp_path / "w"), undisturbed, check_exact=True)


def test_nothing_is_lost_where_it_is_stopped_while_the_next_program_compiles(undisturbed, saved, tmp_path, monkeypatch):
    compile_job = Job.compile
    monkeypatch.setattr(compiler, "SLOW_SECONDS", 0)
    monkeypatch.setattr(Job, "compile", lambda self, *args: time.sleep(self.batch_size == 8) or compile_job(self, *args))
    with pytest.raises(Interrupted):
        train(tmp_path / "w", Stop(doing="compiling m = 4, grown to 8 takes"))
    assert saved == [{4}]
    pd.testing.assert_frame_equal(train(tmp_path / "w"), undisturbed, check_exact=True)


def job_of(**fields):
    experiment = tiny.grid(**fields)
    (shape,) = experiment.grid.shapes()
    return Job(Setup(experiment, tiny.dataset(), lambda b: tiny.TinyModel(b)), *shape)


def arguments(job):
    with closing(input_pipeline(tiny.dataset(), job.experiment)) as pipeline:
        return job.arguments(pipeline)


def test_without_growth_the_program_is_the_one_of_one_batch_size():
    job = job_of()
    assert job.phases == [job]
    program = arguments(job)["program"]
    assert program == Program(4, 38, (0.5, 0.75), 0.1, optimizer=program.optimizer, task=program.task)


def test_a_phase_is_the_program_of_its_batch_size():
    """A BN batch that is the whole batch grows with it, any other stays; a beta keeps its half-life in examples."""
    optimizer = {"name": "momentum", "momentum": 0.9, "beta_rule": "half_life", "beta_batch_size": 4}
    for b, models, last in ((4, [None, None, None], 16), (2, [2, 2, 2], 2)):
        job = job_of(schedule=GROWING.__dict__, bn_batch_sizes=(b,), optimizer=optimizer)
        assert [(phase.batch_size, phase.steps) for phase in job.phases] == [
            (4, range(4)),
            (8, range(4, 12)),
            (16, range(12, 16)),
        ]
        assert [arguments(phase)["model"].bn_batch_size for phase in job.phases] == models
        assert job.phases[-1].bn_batch_size == last
        betas = [phase.settings([None]).scalars["momentum"] for phase in job.phases]
        np.testing.assert_allclose(np.concatenate(betas), [0.9, 0.9**2, 0.9**4], rtol=1e-6)
        for phase in job.phases:  # augmentation is drawn for the epoch of an example's position
            program = arguments(phase)["program"]
            first = program.position_of_step_0 + phase.steps.start * program.batch_size
            assert first == job.batches.examples(phase.steps.start)


@pytest.mark.long
def test_streamed_batches_grow_as_those_in_memory_do(tmp_path):
    root = photos.write(tmp_path / "photos")
    chosen = tiny.grid(base_lrs=(2**-8,), epochs=2, schedule={"boundaries": (0.5,), "batch_growth": 4})
    chosen = dataclasses.replace(chosen, dataset=dataclasses.replace(chosen.dataset, workers=0))
    for name, dataset in (("streamed", photos.load(root)), ("memory", photos.in_memory(root))):
        train_grid(chosen, tmp_path / name, dataset, NoProgress(), lambda b: tiny.PlainModel())
    found = results.load(tmp_path / "streamed")
    assert list(found.step) == [13, 16]
    pd.testing.assert_frame_equal(found, results.load(tmp_path / "memory"), rtol=1e-5)


REFUSED = {
    "grow to more than 2147483647": {"schedule__boundaries": tuple(k / 99 for k in range(99))},
    "batches grow at 0.5 of training, within the warm-up of 0.6": {"grid__warmup_fractions": (0.6,)},
}


@pytest.mark.parametrize("says", REFUSED)
def test_batches_that_cannot_grow_are_refused(says):
    line = refusal(from_config, changed(schedule__batch_growth=1000, **REFUSED[says]))
    assert line.startswith("schedule.batch_growth: 1000 ")
    assert says in line


def test_a_rule_must_leave_a_beta_at_every_size_that_the_batch_grows_to():
    optimizer = {
        "optimizer__name": "adamw",
        "optimizer__beta_rule": "sde",
        "optimizer__beta_batch_size": 8,
        "optimizer__beta1": 0.9,
    }
    config = {"grid__batch_sizes": (8,), **optimizer}
    from_config(changed(**config, schedule__batch_growth=2))
    line = refusal(from_config, changed(**config, schedule__batch_growth=4))
    assert line.startswith("optimizer.beta_rule: 'sde' makes beta1 -0.6 at batch size 128")


def test_a_batch_that_would_outgrow_the_training_set_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"^schedule\.batch_growth: 4 makes batch size 4 grow to 64, larger than .* of 50 "):
        train(tmp_path / "w", schedule={"batch_growth": 4})
    assert not (tmp_path / "w").exists()


def test_devices_share_a_batch_at_every_size_that_it_grows_to():
    """A BN group of 6 spans three shards of 2 examples but no whole number of shards of 4."""
    model = {"model__name": "alexnet", "model__norm": "batch"}
    for growth, shared in ((1, True), (2, False), (3, True)):
        found = from_config(changed(**model, schedule__batch_growth=growth, schedule__boundaries=(0.5,)))
        assert found.can_share(6, 6, 3)
        assert found.can_share(12, 6, 6) == shared


def test_plan_lists_steps_and_images_of_growing_batches_and_predicts_no_time():
    line = ["--config=configs/quickstart.py", "--config.schedule.batch_growth=10", "--config.grid.batch_sizes=(8,)"]
    done = run("plan.py", *line, "--probe_seconds=0")
    assert "     8         8    13            759         144,456\n" in done.stdout
    refused(run("plan.py", *line), "schedule.batch_growth: got 10, but its time cannot be predicted; use 1 or")
