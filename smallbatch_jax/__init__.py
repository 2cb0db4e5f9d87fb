"""Which batch size and learning rate should I train with? Masters & Luschi (2018) in JAX.

The submodules load on first use, so that `import smallbatch_jax` and every command's --help stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smallbatch_jax import analysis as analysis
    from smallbatch_jax import claims as claims
    from smallbatch_jax import cost as cost
    from smallbatch_jax import data as data
    from smallbatch_jax import driver as driver
    from smallbatch_jax import experiment as experiment
    from smallbatch_jax import figures as figures
    from smallbatch_jax import lanes as lanes
    from smallbatch_jax import models as models
    from smallbatch_jax import optim as optim
    from smallbatch_jax import report as report
    from smallbatch_jax import results as results
    from smallbatch_jax import study as study
    from smallbatch_jax import train as train
    from smallbatch_jax.driver import sweep as sweep

__version__ = "0.1.0"
_SUBMODULES = (
    "analysis",
    "claims",
    "cost",
    "data",
    "driver",
    "experiment",
    "figures",
    "lanes",
    "models",
    "optim",
    "report",
    "results",
    "study",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"smallbatch_jax.{name}")
    if name == "sweep":
        return importlib.import_module("smallbatch_jax.driver").sweep
    raise AttributeError(f"module 'smallbatch_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, "sweep"])
