"""Final parameters of finished runs, kept on request: WORKDIR/parameters/RUN, a folder that Orbax writes whole or not at all.

Processes that train programs of one workdir take turns, by a lock on WORKDIR/parameters/lock.
"""

import dataclasses
import fcntl
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from orbax import checkpoint as ocp

from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.config.fields import cut, expanded_path
from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.store.checkpoint import crc32, quietly, reason, this_process_alone
from smallbatch_jax.store.files import WriteError, writing
from smallbatch_jax.store.workdir import read_workdir

MOST_CHARACTERS = 1000  # maximum length of the list of stored runs in an error
PyTree = Any


class Kept(NamedTuple):
    """A run whose parameters are stored."""

    folder: Path
    run: Run
    value: float  # median of the metric over its last epochs (§3.1)
    metric: Metric  # metric that chose the runs, by default test accuracy
    checksum: int


def best_first(kept: Iterable[Kept]) -> list[Kept]:
    """Sorts by the metric, best first; ties by the smallest batch size, BN batch size, base learning rate and seed."""
    return sorted(kept, key=lambda one: (math.isnan(one.value), one.metric.gain(0.0, one.value), one.run))


class Parameters:
    """Writer of WORKDIR/parameters, according to `keep_parameters`; a workdir of None stores nothing."""

    def __init__(self, workdir: Path | None, keep: str | None, metric: Metric = ACCURACY):
        self._folder, self._keep, self._metric = workdir and workdir / "parameters", keep, metric
        if self._folder and keep:
            others = {one.metric.column for one in _stored(self._folder, metric)} - {metric.column}
            if others:
                raise InputError(
                    f"select: the runs in {self._folder} were chosen by {others.pop()}; use that, or remove the folder."
                )

    def save(self, name: str, run: Run, value: float, variables: PyTree) -> None:
        """Stores a finished run as parameters/`name`, unless only the best is kept and this is not the best of its batch size.

        Args:
          name: the run's name, unique in its grid.
          run: a run that did not diverge; parameters stored by an earlier start are replaced.
          value: the median of the metric over its last epochs.
          variables: {"params": …, "batch_stats": …}.

        Raises:
          WriteError, InputError: if they cannot be written; those of other runs are unharmed.
        """
        if self._folder is None or self._keep is None:
            return
        variables = jax.tree.map(np.asarray, variables)
        new = Kept(self._folder / name, run, value, self._metric, _checksum(variables))
        with writing(self._folder), quietly():
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder, "a"):
                for abandoned in (*self._folder.glob(".*"), *self._folder.glob("*.orbax-checkpoint-tmp*")):
                    shutil.rmtree(abandoned, ignore_errors=True)
                stored = _stored(self._folder, self._metric) if self._keep == "best" else []
                rivals = [kept for kept in stored if kept.run != run and kept.run.batch_size == run.batch_size]
                first = best_first([new, *rivals])[0]
                if new.folder.exists():
                    _remove(new.folder)
                if first is new:
                    _write(new, variables)
                for rival in rivals:
                    if rival is not first:
                        _remove(rival.folder)


def _write(new: Kept, variables: PyTree) -> None:
    described = {"run": dataclasses.asdict(new.run), "value": new.value, "metric": [*new.metric], "checksum": new.checksum}
    content = ocp.args.StandardSave(variables)  # pyright: ignore[reportCallIssue]
    try:
        with _checkpointer() as orbax:
            orbax.save(new.folder.resolve(), args=content, custom_metadata=described)
    except Exception as error:  # Orbax passes on whatever its storage raises
        raise WriteError(new.folder, reason(error)) from error


def load_parameters(
    workdir: str | os.PathLike[str],
    batch_size: int | None = None,
    base_lr: float | None = None,
    bn_batch_size: int | None = None,
    seed: int | None = None,
    **scalars: float,
) -> dict[str, PyTree]:
    """Returns the final parameters of the best run that `keep_parameters` kept in a workdir.

    Args:
      workdir: folder of a sweep with `keep_parameters`.
      batch_size: m of the run. For this and the next three, None matches any; of several runs the best is taken.
      base_lr: its η̃.
      bn_batch_size: its BN batch size.
      seed: its seed.
      **scalars: its values on the grid's further axes, such as weight_decay.

    Returns:
      {"params": …, "batch_stats": …}, as a linen module's `apply` takes them, of NumPy arrays in nested dicts (and lists, where
      the model has sequences): other trees come back as dicts too, and need a template of the model to be rebuilt. The
      parameters of a pair of functions are in `variables["params"]["params"]`; those of nnx and Equinox are named by their path
      in the module, such as "layers.0.weight". batch_stats are the running averages, also where a run was evaluated by precise
      statistics; {} without batch norm.

    Raises:
      InputError: if the folder is not a workdir, or holds no such run; the message lists those it holds.
    """
    path = Path(expanded_path("workdir", workdir))
    experiment, _ = read_workdir(path)
    folder = path / "parameters"
    given = {"batch_size": batch_size, "base_lr": base_lr, "bn_batch_size": bn_batch_size, "seed": seed} | scalars
    asked = {name: value for name, value in given.items() if value is not None}
    with ExitStack() as stack:
        stack.enter_context(quietly())
        with suppress(OSError):  # a copy that nobody writes to may have no lock
            stack.enter_context(_locked(folder, "r"))
        stored = _stored(folder, experiment.metric)
        for kept in best_first(kept for kept in stored if asked.items() <= kept.run.to_dict().items()):
            try:
                return _read(kept)
            except Exception as error:  # whatever reading a damaged file raises
                _warn(kept.folder, error)
    if not stored:
        raise InputError(f"workdir: {folder} holds no parameters; a sweep with keep_parameters='best' or 'all' keeps some.")
    wanted = ", ".join(f"{name} {value}" for name, value in asked.items()) or "undamaged parameters"
    names = cut(", ".join(sorted(kept.folder.name for kept in stored)), MOST_CHARACTERS)
    raise InputError(f"workdir: {folder} holds no run with {wanted}; it holds {names}.")


def _read(kept: Kept) -> dict[str, PyTree]:
    with _checkpointer() as orbax:
        content = ocp.args.StandardRestore()  # pyright: ignore[reportCallIssue]
        variables = jax.tree.map(np.asarray, orbax.restore(kept.folder.resolve(), args=content))
    if _checksum(variables) != kept.checksum:
        raise ValueError("its arrays do not match their checksum")
    return variables


def _stored(folder: Path, metric: Metric) -> list[Kept]:
    """Returns the runs whose parameters are stored; a warning names a folder that is damaged.

    `metric` applies to folders of earlier versions, which do not store it.
    """
    found = []
    for path in sorted(folder.glob("m*")):
        if ".orbax-checkpoint-tmp" not in path.name:  # Orbax was writing it when killed
            try:
                with _checkpointer() as orbax:
                    described: Any = orbax.metadata(path.resolve()).custom_metadata
                chosen = Metric(*described.get("metric", metric))
                run, value = Run.from_json(described["run"]), float(described["value"])
                found.append(Kept(path, run, value, chosen, described["checksum"]))
            except Exception as error:  # whatever reading a damaged file raises
                _warn(path, error)
    return found


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(f"{path} left out, it is damaged: {reason(error)}", stacklevel=4)


def _remove(folder: Path) -> None:
    """Removes parameters so that a kill midway leaves no folder that looks complete."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}")), ignore_errors=True)


def _checkpointer() -> ocp.Checkpointer:
    options = this_process_alone("parameters")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


@contextmanager
def _locked(folder: Path, mode: Literal["a", "r"]) -> Iterator[None]:
    """Holds the lock of the folder, exclusive for writing ("a") or shared for reading ("r")."""
    with open(folder / "lock", mode) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if mode == "a" else fcntl.LOCK_SH)
        yield


def _checksum(variables: PyTree) -> int:
    """Returns the sum of the arrays' checksums: Orbax restores some other trees as dicts, which changes the order."""
    return sum(crc32([leaf]) for leaf in jax.tree.leaves(variables))
