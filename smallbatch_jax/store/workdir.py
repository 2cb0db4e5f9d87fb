"""The folder of one experiment: the experiment, its owner, and the provenance of its results."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smallbatch_jax.config import fields
from smallbatch_jax.config.experiment import OWN, Experiment, InputError, differences
from smallbatch_jax.store.files import append_line, remove_abandoned, write_atomically

FORMAT = 1
LOGS = ("lock", "provenance.jsonl", "timings.csv")  # a folder that holds nothing else counts as empty


@contextmanager
def open_workdir(path: Path, experiment: Experiment, facts: dict[str, Any]) -> Iterator[Path]:
    """Makes or resumes the workdir of an experiment, and owns it until the block ends.

    `facts` about the data are stored beside the experiment, for readers that do not have the data.

    Raises:
      InputError: if it holds another experiment (with the fields that differ), belongs to a process that is still
        running, or cannot be written. Nothing is written then.
    """
    refuse_difference(path, experiment, facts)
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path / "lock", "a+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise InputError(f"--workdir: {path} belongs to {lock.read().strip() or 'another process'}.") from None
            refuse_difference(path, experiment, facts)  # nobody else can change it now
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        except OSError as error:
            raise InputError(f"--workdir: {path} cannot be written: {error.strerror}.") from None
        content = {"format": FORMAT, "experiment": experiment.to_dict(), "facts": facts}
        write_atomically(path / "experiment.json", json.dumps(content, indent=1) + "\n")
        for folder in (path, path / "results", path / "figures"):
            remove_abandoned(folder)
        yield path


def refuse_difference(path: Path, experiment: Experiment, facts: Mapping[str, Any] | None = None) -> None:
    """Refuses a folder that holds anything but this experiment; a missing or empty one is accepted, and one with `LOGS` alone.

    Only facts present in both are compared.

    Raises:
      InputError: with the fields that differ.
    """
    try:
        names = [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise InputError(f"--workdir: {path} is a file; give a folder.") from None
    except OSError as error:
        raise InputError(f"--workdir: {path} cannot be read: {error.strerror}.") from None
    if "experiment.json" not in names:
        if foreign := sorted(name for name in names if name not in LOGS and not name.startswith(".experiment.json.")):
            lack = f"holds {foreign[0]!r} but no experiment"
            raise InputError(f"--workdir: {path} {lack}; give a new or empty folder, or a workdir.")
        return
    stored, known = read_workdir(path)
    found = differences(stored, experiment)
    if stored.model.name != experiment.model.name and stored.model.name.startswith(OWN) and "model" not in known:
        hint = " (an earlier version made this workdir and named own models in another way)"
        found = [phrase + hint * phrase.startswith("model.name ") for phrase in found]
    found = found or _differing_facts(known, facts or {})
    if found:
        raise InputError(f"--workdir: {path} holds a different experiment: {'; '.join(found)}. Use another folder.")


def _differing_facts(known: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Returns the differences between two datasets or own models of the same name."""
    found = [
        f"the dataset has {name} {known[name]} there and {facts[name]} here"
        for name in ("num_classes", "examples", "digest")
        if name in known and name in facts and known[name] != facts[name]
    ]
    another = "model has the same name but other fields or code ({} differs)"
    for name, text in (("model", another), ("own", "{} is another function of the same name")):
        if name in known and name in facts and (place := _model_difference(known[name], facts[name])):
            found.append(text.format(place if name == "model" else place.rpartition(" ")[2]))
    return found


def _model_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Returns the first entry in which two fingerprints (`models.identity`) differ by more than their tolerance, or None."""
    if there["tolerance"] != here["tolerance"]:
        return "precision"
    old, new = dict(there["values"]), dict(here["values"])
    kinds = {name.partition(" ")[0] for name in old}  # earlier versions stored fewer
    new = {name: pair for name, pair in new.items() if name.partition(" ")[0] in kinds}
    if old.keys() != new.keys():
        return next(name for name in (*old, *new) if name not in old or name not in new)
    # Gradients may cancel to zero, e.g. that of a bias before batch norm, so the largest one sets the scale for all.
    steepest = max((abs(norm) for name, (norm, _) in new.items() if name.startswith("gradient")), default=0.0)
    for name, values in new.items():
        scale = steepest if name.startswith("gradient") else max(abs(old[name][0]), abs(values[0]))
        tolerance = here["tolerance"] * scale if scale < math.inf else 0.0  # else only equal values pass
        if not np.allclose(old[name], values, rtol=0.0, atol=tolerance, equal_nan=True):
            return name
    return None


def read_workdir(path: Path) -> tuple[Experiment, dict[str, Any]]:
    """Returns the experiment of a workdir, and the facts about its data: num_classes, examples [training, test], digest."""
    try:
        content = json.loads((path / "experiment.json").read_text())
        if content["format"] != FORMAT:
            raise InputError(f"--workdir: {path} has format {content['format']}, this version reads {FORMAT}.")
        facts = dict(content["facts"])
        # Without a fingerprint, only the digest in its name identifies an own model, so it stays.
        read = parse_stored if "model" in facts else partial(fields.parse, Experiment)
        return read(content["experiment"]), facts
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"--workdir: {path} is not a workdir, it has no experiment.json.") from None
    except OSError as error:
        raise InputError(f"--workdir: {path}/experiment.json cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"--workdir: {path}/experiment.json is damaged: {error}.") from None


def parse_stored(stored: Mapping[str, Any]) -> Experiment:
    """Returns a stored experiment, without the digest of fields that earlier versions had in the name of an own model."""
    name = re.sub(rf"^({OWN}.+)-[0-9a-f]{{12}}$", r"\1", stored["model"]["name"])
    return fields.parse(Experiment, {**stored, "model": {**stored["model"], "name": name}})


def record_provenance(path: Path, event: str, **facts: Any) -> None:
    """Appends one line to WORKDIR/provenance.jsonl: time, machine and versions."""
    line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
    append_line(path / "provenance.jsonl", json.dumps(line))


def read_provenance(path: Path) -> list[dict[str, Any]]:
    """Returns the undamaged lines of WORKDIR/provenance.jsonl, oldest first; empty if there is no such file."""
    found = []
    with suppress(OSError):
        for line in (path / "provenance.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def is_finished(path: Path) -> bool:
    """Returns whether the last command that trained into a workdir completed."""
    return [line.get("event") for line in read_provenance(path)][-1:] == ["finish"]


def surroundings() -> dict[str, Any]:
    """Returns versions, machine and commit of this process."""
    packages = ("smallbatch_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "host": socket.gethostname(),
        "machine": platform.platform(),
        "command": sys.argv,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The git commit of this code, followed by + if tracked files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commands = (["ls-files", "--error-unmatch", __file__], ["describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"])
    try:
        tracked, commit = (subprocess.run([*git, *c], capture_output=True, text=True, timeout=10) for c in commands)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if tracked.returncode or commit.returncode else commit.stdout.strip()
