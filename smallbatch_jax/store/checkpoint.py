"""Atomic Orbax checkpoints of a program's lanes; keeps the last two and skips damaged ones.

One process writes and reads them, however many train: it gathers all lanes and sends the others what it reads. The number of
processes and devices may therefore change between starts. (This is Orbax's older interface; the newer one always involves all
processes.)
"""

import dataclasses
import gc
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax import checkpoint as ocp

from smallbatch_jax.config.experiment import Experiment, InputError, Run, differences
from smallbatch_jax.store.files import WriteError
from smallbatch_jax.store.workdir import parse_stored

FORMAT = 2
KEEP = 2
FAILURE_SECONDS = 0.3  # wait after a failure, while Orbax's threads still report it
PyTree = Any


class Checkpoints:
    """The checkpoints of one program of an experiment, in a folder of their own."""

    def __init__(self, folder: Path, experiment: Experiment):
        self._folder, self._experiment = folder, experiment

    def _manager(self) -> ocp.CheckpointManager:
        self._folder.mkdir(parents=True, exist_ok=True)
        options: Any = ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            max_to_keep=KEEP,
            multiprocessing_options=this_process_alone("checkpoints"),
        )
        return ocp.CheckpointManager(self._folder.resolve(), options=options)

    def save(self, lanes: PyTree, runs: list[Run | None]) -> None:
        """Saves the stacked lanes and the run in each; returns once they are on the disk.

        Raises:
          WriteError: if they cannot be written; earlier checkpoints are unharmed.
        """
        lanes = jax.tree.map(np.asarray, lanes)
        description: Any = {
            "format": FORMAT,
            "experiment": self._experiment.to_dict(),
            "runs": [None if run is None else dataclasses.asdict(run) for run in runs],
            "arrays": _arrays(lanes),
            "checksum": crc32(jax.tree.leaves(lanes)),
        }
        description["seal"] = _seal(description)
        try:
            with quietly(), self._manager() as manager:
                latest = manager.latest_step()
                content = ocp.args.StandardSave(lanes)  # pyright: ignore[reportCallIssue]
                manager.save(0 if latest is None else latest + 1, args=content, custom_metadata=description, force=True)
        except Exception as error:  # Orbax passes on whatever its storage raises
            raise WriteError(self._folder, reason(error)) from error

    def restore(self, template: PyTree) -> tuple[PyTree, list[Run | None]] | None:
        """Returns the lanes saved last, as NumPy arrays stacked by lane, and the run in each; None if nothing was saved.

        The number of lanes may differ from that of `template`, whose leaves give the other axes and the dtypes. A checkpoint
        that is damaged or of another format is moved aside with a warning, and the previous one is used.

        Raises:
          InputError: if they belong to another experiment or model.
        """
        if not self._folder.is_dir():
            return None
        with quietly():
            with self._manager() as manager:
                steps = sorted(manager.all_steps(), reverse=True)
            for step in steps:
                try:
                    return self._load(step, template)
                except InputError:
                    raise
                except Exception as error:  # whatever reading a damaged file raises
                    warnings.warn(f"damaged checkpoint put aside in {self._put_aside(step)}: {reason(error)}", stacklevel=2)
                    gc.collect()
        return None

    def _load(self, step: int, template: PyTree) -> tuple[PyTree, list[Run | None]]:
        with self._manager() as manager:  # one that has met damage reads no other checkpoint
            description: Any = manager.metadata(step).custom_metadata
            if _seal(description) != description["seal"]:
                raise ValueError("its description does not match its checksum")
            self._require_same(description, template)
            runs = [None if run is None else Run.from_json(run) for run in description["runs"]]
            here = SingleDeviceSharding(jax.local_devices()[0])
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(runs), *x.shape[1:]), x.dtype, sharding=here), template)
            content = ocp.args.StandardRestore(abstract)  # pyright: ignore[reportCallIssue]
            lanes = jax.tree.map(np.asarray, manager.restore(step, args=content))
        if crc32(jax.tree.leaves(lanes)) != description["checksum"]:
            raise ValueError("its arrays do not match their checksum")
        return lanes, runs

    def _require_same(self, description: Any, template: PyTree) -> None:
        """Raises InputError, naming the difference, for another experiment or model, and ValueError for another format."""
        if description["format"] != FORMAT:
            raise ValueError(f"it has format {description['format']}, this version reads {FORMAT}; its runs begin again")
        found = differences(parse_stored(description["experiment"]), self._experiment)
        there, here = description["arrays"], _arrays(template)
        found += [
            f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ][:1]
        if found:
            raise InputError(f"checkpoints: {self._folder} is of another experiment or model: {'; '.join(found)}.")

    def _put_aside(self, step: int) -> Path:
        aside = self._folder.with_name(f"{self._folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        return (self._folder / str(step)).rename(aside / str(step))

    def delete(self) -> None:
        """Removes the checkpoints of a completed program."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _arrays(lanes: PyTree) -> dict[str, str]:
    """Returns the dtype and shape of each array by its name, without the lane axis."""
    leaves = jax.tree_util.tree_leaves_with_path(lanes)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape[1:])}" for path, leaf in leaves}


def _seal(description: dict[str, Any]) -> int:
    """Returns the checksum of a description; it covers the arrays' checksum too, which is one of its fields."""
    unsealed = {name: value for name, value in description.items() if name != "seal"}
    return crc32([np.frombuffer(json.dumps(unsealed, sort_keys=True).encode(), np.uint8)])


def this_process_alone(prefix: str) -> ocp.options.MultiprocessingOptions:
    """Returns options by which Orbax waits for no other process; `prefix` separates its barriers from those of other uses."""
    alone = {jax.process_index()} if jax.process_count() > 1 else None
    return ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes=alone, barrier_sync_key_prefix=prefix
    )


def crc32(arrays: Iterable[np.ndarray]) -> int:
    """Returns the CRC-32 of the arrays' bytes, in order."""
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, checksum)
    return checksum


@contextmanager
def quietly() -> Iterator[None]:
    """Silences Orbax's threads and tasks, each of which reports a failure at length; we report it in one line."""
    before = sys.excepthook, sys.unraisablehook, threading.excepthook
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    logging.disable(logging.CRITICAL)
    try:
        yield
    except Exception:
        gc.collect()  # an abandoned task reports when it is freed
        time.sleep(FAILURE_SECONDS)
        raise
    finally:
        logging.disable(logging.NOTSET)
        sys.excepthook, sys.unraisablehook, threading.excepthook = before


def reason(error: Exception) -> str:
    """Returns the system's error message if Orbax's message names its code, otherwise the start of Orbax's message."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code.group(1))) if code else (str(error).strip() or type(error).__name__).split("\n")[0][:200]
