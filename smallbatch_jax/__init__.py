"""Which batch size and learning rate should I train with? Masters & Luschi (2018) in JAX.

Public modules load on first use, so that `import smallbatch_jax` and every command's --help stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smallbatch_jax import data as data
    from smallbatch_jax import models as models
    from smallbatch_jax import optim as optim
    from smallbatch_jax import study as study
    from smallbatch_jax.config import experiment as experiment
    from smallbatch_jax.program import lanes as lanes
    from smallbatch_jax.program import train as train
    from smallbatch_jax.runner import grid
    from smallbatch_jax.runner.sweep import sweep as sweep
    from smallbatch_jax.search_grid import search as search
    from smallbatch_jax.store import results as results
    from smallbatch_jax.store.parameters import load_parameters as load_parameters
    from smallbatch_jax.study import analysis as analysis
    from smallbatch_jax.study import claims as claims
    from smallbatch_jax.study import cost as cost
    from smallbatch_jax.study import figures as figures
    from smallbatch_jax.study import recommendation as recommendation
    from smallbatch_jax.study import report as report

    driver = grid

__version__ = "0.1.0"
_PUBLIC = {
    "analysis": "study.analysis",
    "claims": "study.claims",
    "cost": "study.cost",
    "data": "data",
    "driver": "runner.grid",
    "experiment": "config.experiment",
    "figures": "study.figures",
    "lanes": "program.lanes",
    "models": "models",
    "optim": "optim",
    "recommendation": "study.recommendation",
    "report": "study.report",
    "results": "store.results",
    "study": "study",
    "train": "program.train",
}
_FUNCTIONS = {"load_parameters": "store.parameters", "search": "search_grid", "sweep": "runner.sweep"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return importlib.import_module(f"smallbatch_jax.{_PUBLIC[name]}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"smallbatch_jax.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'smallbatch_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_FUNCTIONS])
