"""Tests that no source of this repository can run code from a data file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


MODULES = {"pickle", "_pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "jsonpickle", "yaml", "runpy", "imp"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"read_pickle", "to_pickle", "unsafe_load", "exec_module"}
ARRAY_FILES = {"load", "save", "savez", "savez_compressed", "read_array", "write_array"}
NUMPY = {"np", "numpy", "jnp", "npy", "format"}


def offences(source):
    """Yields the names in a Python source that could run code from a data file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES or {alias.name for alias in node.names} & (MODULES | ATTRIBUTES):
                yield f"from {node.module}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            base = ast.unparse(node.func.value).split(".")[-1]
            safe = any(
                k.arg == "allow_pickle" and isinstance(k.value, ast.Constant) and k.value.value is False for k in node.keywords
            )
            if (base in NUMPY and node.func.attr in ARRAY_FILES and not safe) or (base == "torch" and node.func.attr == "load"):
                yield f"{base}.{node.func.attr}"


SOURCES = sorted(path for folder in ("smallbatch_jax", "experiments", "configs") for path in (ROOT / folder).rglob("*.py"))


# processes.py pickles messages between the processes of a run, in memory only.
# A config file is the user's own code, as in ml_collections.
ALLOWED = {"smallbatch_jax/program/processes.py": ["pickle"], "experiments/command.py": ["runpy"]}


def test_no_source_can_unpickle_or_evaluate_a_file():
    assert len(SOURCES) > 40
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text())) for path in SOURCES}
    assert {path: offending for path, offending in found.items() if offending} == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, joblib as j",
        "from dill import loads",
        "from pandas import read_pickle",
        "def f():\n    import marshal",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=chosen)",
        "npy.read_array(file)",
        "np.lib.format.read_array(file)",
        "pd.read_pickle(path)",
        "torch.load(path)",
        "from yaml import load",
        "eval(text)",
        "exec(compile(text, name, 'exec'))",
    ],
)
def test_the_search_finds(line):
    assert list(offences(line))
