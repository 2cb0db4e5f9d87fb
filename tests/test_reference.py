"""The models compute what independent ones in PyTorch do: logits, gradients and running statistics, layer by layer.

tests/reference/torch_models.py made the fixtures; this test needs no PyTorch.
"""

import functools
import importlib.util
import sys
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from smallbatch_jax.models import create_model

FOLDER = Path(__file__).parent / "reference"
FIXTURES = np.load(FOLDER / "models.npz", allow_pickle=False)
CASES = sorted({name.rsplit("|", 1)[0] for name in FIXTURES if name.endswith("|logits")})
TOLERANCE = 1e-4
START = {"mean": 0.0, "var": 1.0, "updates": 1500.0}  # running statistics before the step, as in the reference


@functools.cache
def draw():
    """The generator of weights that the fixtures were made with; its module imports torch, which need not be there."""
    source = (FOLDER / "torch_models.py").read_text()
    module = types.ModuleType("reference_draw")
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    body = source[source.index("def draw(") : source.index("class Reference")]
    exec(compile("import zlib\nimport numpy as np\n" + body, str(FOLDER / "torch_models.py"), "exec"), module.__dict__)
    return module.draw


def weights(params):
    """The reference's weights in our tree, drawn by name."""

    def leaf(path, like):
        name = "/".join(part.key for part in path)
        if "norm/" in name:
            scale, offset = 0.2, 1.0 if name.endswith("/scale") else 0.0
        elif name.endswith("/bias"):
            scale, offset = 0.1, 0.0
        else:
            scale, offset = (2 / np.prod(like.shape[:-1])) ** 0.5, 0.0
        return draw()(name, like.shape, scale) + np.float32(offset)

    return jax.tree_util.tree_map_with_path(leaf, params)


def compute(case):
    """(logits, loss, gradients by name, running statistics by name) of our model."""
    name, norm, batch, bn_batch, size = case.split("|")
    model = create_model(name, 10, norm, None if bn_batch == "None" else int(bn_batch))
    images = draw()(f"images {case}", (int(batch), int(size), int(size), 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = weights(shapes["params"])
    stats = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(x.shape, START[path[-1].key], np.float32), dict(shapes).get("batch_stats", {})
    )

    @jax.jit
    def losses(params):
        def loss(params):
            logits, mutated = model.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
            labels = np.arange(int(batch)) % 10
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, mutated)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logits, mutated)), grads = losses(params)
    return logits, loss, by_name(grads), by_name(mutated.get("batch_stats", {}))


def by_name(tree):
    return {"/".join(p.key for p in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("case", CASES)
def test_model_equals_its_pytorch_reference(case):
    logits, loss, grads, stats = compute(case)
    close(logits, FIXTURES[f"{case}|logits"], "logits")
    close(loss, FIXTURES[f"{case}|loss"], "loss")
    assert sorted(grads) == list(FIXTURES[f"{case}|names"])
    for name, norm, product in zip(*(FIXTURES[f"{case}|{k}"] for k in ("names", "norms", "products")), strict=True):
        grad = grads[str(name)].astype(np.float64)
        probe = draw()(f"probe {name}", grad.shape)
        assert abs(np.linalg.norm(grad) - norm) <= TOLERANCE * norm, name
        # A product with a random vector is about the gradient's norm, and as exact.
        assert abs((grad * probe).sum() - product) <= TOLERANCE * norm, name
    stored = {n.rsplit("|", 1)[1]: FIXTURES[n] for n in FIXTURES if n.startswith(f"{case}|stat|")}
    assert sorted(stats) == sorted(stored)
    for name, expected in stored.items():
        close(stats[name], expected, name)


def close(found, expected, name):
    """Relative in norm."""
    error = np.linalg.norm(np.asarray(found, np.float64) - expected)
    assert error <= TOLERANCE * np.linalg.norm(expected), f"{name}: off by {error / np.linalg.norm(expected):.1e}"


def test_the_fixtures_were_made_without_this_package():
    assert "smallbatch_jax" not in (FOLDER / "torch_models.py").read_text()
    assert "torch" not in sys.modules
