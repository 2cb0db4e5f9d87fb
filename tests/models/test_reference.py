"""The models agree with independent ones in PyTorch: logits, gradients and running statistics, layer by layer.

tests/models/reference/torch_models.py made the fixtures; this test needs no PyTorch.
"""

import functools
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from smallbatch_jax.models import create_model
from smallbatch_jax.models.resnet50 import BottleneckResNet

FOLDER = Path(__file__).parent / "reference"
FIXTURES = np.load(FOLDER / "models.npz", allow_pickle=False)
CASES = sorted({name.rsplit("|", 1)[0] for name in FIXTURES if name.endswith("|logits")})
BY_DEFAULT = ["alexnet|none|4|None|32", "alexnet|batch|8|4|16", "resnet8|none|4|None|32", "resnet8|batch|6|2|32"]
BLOCKS = [f"stage{stage}_block{block}" for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(1, count + 1)]
# Relative tolerances of forward values and of gradients. Rounding may flip one of ResNet-50's millions of ReLUs, and one in
# its last block is 2 % of a gradient (3.7 % was seen).
TOLERANCES, RESNET50_TOLERANCES = (1e-4, 1e-4), (1e-4, 5e-2)
# Rounding alone is off by 1.1e-4 there: with sequential sums, as in code that is compiled quickly, on any processor, and with
# vectorised sums on some.
OF_VECTORS, OF_VECTORS_TOLERANCES = "alexnet|batch|8|4|16", (1e-4, 2e-4)
START = {"mean": 0.0, "var": 1.0, "updates": 1500.0}  # running statistics before the step, as in the reference


@functools.cache
def draw():
    """Returns the generator of the fixtures' weights, without its module's import of torch, which may not be installed."""
    source = (FOLDER / "torch_models.py").read_text()
    module = types.ModuleType("reference_draw")
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    body = source[source.index("def draw(") : source.index("class Reference")]
    exec(compile("import zlib\nimport numpy as np\n" + body, str(FOLDER / "torch_models.py"), "exec"), module.__dict__)
    return module.draw


def weights(params):
    """Returns the reference's weights in our tree, drawn by name."""

    def leaf(path, like):
        name = "/".join(part.key for part in path)
        if "norm/" in name:
            scale, offset = 0.2, 1.0 if name.endswith("/scale") else 0.0
        elif name.endswith("/bias"):
            scale, offset = 0.1, 0.0
        else:
            scale, offset = (2 / np.prod(like.shape[:-1])) ** 0.5, 0.0
        factor = np.float32(0.1 if "_conv3_norm/" in name else 1.0)
        return (draw()(name, like.shape, scale) + np.float32(offset)) * factor

    return jax.tree_util.tree_map_with_path(leaf, params)


def compute(case, monkeypatch):
    """Returns our model's logits and loss, and by name its gradients, running statistics and ResNet-50 block outputs."""
    name, norm, batch, bn_batch, size = case.split("|")
    model = create_model(name, 10, norm, None if bn_batch == "None" else int(bn_batch), platform="cpu")
    images = draw()(f"images {case}", (int(batch), int(size), int(size), 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = weights(shapes["params"])
    stats = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(x.shape, START[path[-1].key], np.float32), dict(shapes).get("batch_stats", {})
    )

    block = BottleneckResNet.block

    @jax.jit
    def losses(params):
        def loss(params):
            blocks = []
            monkeypatch.setattr(BottleneckResNet, "block", lambda *args: blocks.append(block(*args)) or blocks[-1])
            logits, mutated = model.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
            labels = np.arange(int(batch)) % 10
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, mutated, blocks)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logits, mutated, blocks)), grads = losses(params)
    outputs = dict(zip(BLOCKS, map(np.asarray, blocks), strict=True)) if blocks else {}
    return logits, loss, by_name(grads), by_name(mutated.get("batch_stats", {})), outputs


def by_name(tree):
    return {"/".join(p.key for p in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("case", [c if c in BY_DEFAULT else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_model_equals_its_pytorch_reference(case, monkeypatch):
    of_network = RESNET50_TOLERANCES if case.startswith("resnet50") else TOLERANCES
    forward, backward = OF_VECTORS_TOLERANCES if case == OF_VECTORS else of_network
    logits, loss, grads, stats, blocks = compute(case, monkeypatch)
    for name, output in blocks.items():
        assert_summary(case, name, output, forward)
    close(logits, FIXTURES[f"{case}|logits"], "logits", forward)
    close(loss, FIXTURES[f"{case}|loss"], "loss", forward)
    stored = {n.rsplit("|", 1)[1]: FIXTURES[n] for n in FIXTURES if n.startswith(f"{case}|stat|")}
    assert sorted([*grads, *stats, *blocks]) == sorted([*FIXTURES[f"{case}|names"], *stored])
    for name, values in stats.items():
        if name in stored:
            close(values, stored[name], name, forward)
        else:
            assert_summary(case, name, values, forward)
    for name, grad in grads.items():
        assert_summary(case, name, grad, backward)


def assert_summary(case, name, found, tolerance):
    """Compares an array's norm, and its product with a random vector, which is about as large and as exact."""
    names, norms, products = (FIXTURES[f"{case}|{part}"] for part in ("names", "norms", "products"))
    norm, product = norms[names == name].item(), products[names == name].item()
    found = found.astype(np.float64)
    assert abs(np.linalg.norm(found) - norm) <= tolerance * norm, name
    assert abs((found * draw()(f"probe {name}", found.shape)).sum() - product) <= tolerance * norm, name


def close(found, expected, name, tolerance):
    """Requires a small error in norm, relative to the expected norm."""
    error = np.linalg.norm(np.asarray(found, np.float64) - expected)
    assert error <= tolerance * np.linalg.norm(expected), f"{name}: off by {error / np.linalg.norm(expected):.1e}"


def test_the_fixtures_were_made_without_this_package():
    assert "smallbatch_jax" not in (FOLDER / "torch_models.py").read_text()
    # In a process of its own: where the `peer` extra is installed, other tests import PyTorch into this one.
    code = "import sys; sys.path.append('..'); import test_reference; test_reference.draw(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
