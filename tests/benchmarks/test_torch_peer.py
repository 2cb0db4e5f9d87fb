"""The training step in PyTorch that the benchmark compares with; all but the first test need PyTorch."""

import math
import multiprocessing
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.models import create_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch_peer

SHAPE = (32, 32, 3)


def peer(model="resnet8", norm="batch", image_shape=SHAPE):
    step = torch_peer.Step(model, norm, 10, image_shape, 4, augment=True, weight_decay=5e-4)
    return torch_peer.peer(step, accelerator=False)


@pytest.mark.parametrize(
    ("model", "norm", "says"), [("resnet10", "batch", "no model 'resnet10'"), ("alexnet", "group", "no norm 'group'")]
)
def test_a_model_that_is_not_written_in_pytorch_is_refused(model, norm, says):
    with pytest.raises(InputError, match=rf"^--peer: has {says}; it accepts "):
        peer(model, norm)


@pytest.mark.slow
def test_each_way_has_a_speed_and_none_goes_on_afterwards(monkeypatch):
    monkeypatch.setattr(torch_peer.os, "sched_getaffinity", lambda pid: {0, 1})
    with peer() as measure:
        speeds = measure(0.3)
        assert len(multiprocessing.active_children()) == 3
    assert list(speeds) == ["1 process x 2 threads", "2 processes x 1 thread"]
    assert all(1 < speed < math.inf for speed in speeds.values())
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_process_that_fails_is_reported_and_none_goes_on():
    with pytest.raises(InputError, match=r"^--peer: a PyTorch process ended: \S*Error: [^\n]*$"), peer(image_shape=(32, 32)):
        pass
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_process_that_is_killed_is_reported():
    with pytest.raises(InputError, match=r"^--peer: a PyTorch process ended: it was killed$"), peer() as measure:  # noqa: PT012
        multiprocessing.active_children()[0].kill()
        measure(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPE, (19, 14, 1)])
@pytest.mark.parametrize(
    ("model", "norm"), [("alexnet", "none"), ("alexnet", "batch"), ("resnet8", "batch"), ("resnet8", "none")]
)
def test_the_models_have_our_parameters_and_take_our_images(model, norm, shape):
    import torch

    ours = jax.eval_shape(create_model(model, 10, norm).init, jax.random.key(0), jnp.zeros((2, *shape)))["params"]
    theirs = torch_peer.build_model(model, norm, 10, shape)
    assert sum(p.numel() for p in theirs.parameters()) == sum(math.prod(p.shape) for p in jax.tree.leaves(ours))
    assert theirs(torch.zeros(2, shape[2], *shape[:2])).shape == (2, 10)


@pytest.mark.slow
def test_a_crop_is_a_window_of_the_padded_image_or_of_its_mirror_image():
    import torch

    images = torch.randint(0, 256, (3, 6, 5, 2), dtype=torch.uint8)
    crops = torch_peer._crops(torch, images, torch.tensor([7.2, 9.0]))
    assert crops.shape == (6, 9, 9, 6, 5, 2)
    assert (crops[:3, 4, 4] == images).all()
    assert (crops[3:, 4, 4] == images.flip(2)).all()
    assert (crops[:3, 0, 8, 4:, :1] == images[:, :2, 4:]).all()
    assert (crops[:, 0, 8, :4] == torch.tensor([7, 9])).all()
