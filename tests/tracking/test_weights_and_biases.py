"""Tests that W&B's own files hold each stored row once, however the process ended."""

import json
import math
import struct
import sys
import time

import pandas as pd
import pytest
from tracked import TAGS, assert_all_shown, row, show, train

from smallbatch_jax.config.experiment import InputError, Run
from smallbatch_jax.store import results
from smallbatch_jax.tracking.trackers import name_of


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Returns the workdir and rows of a grid that was trained without interruption."""
    workdir = tmp_path_factory.mktemp("watched") / "w"
    return workdir, train(workdir)


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Yields the wandb module in offline mode, without the user's settings and caches."""
    import wandb as found

    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    yield found
    found.teardown()


def logged(workdir):
    """Returns the content of W&B's own files by run name: (epoch, values) of each history line, and the final summary."""
    from wandb.proto.wandb_internal_pb2 import Record

    shown = {}
    for file in (workdir / "wandb").glob("offline-run-*/*.wandb"):
        name, history, summary = "", [], {}
        for record in ended(lambda file=file: [Record.FromString(data) for data in leveldb_records(file.read_bytes())]):
            name = record.run.display_name or name
            if record.history.item:
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.append((values.pop("_step"), {k: v for k, v in values.items() if not k.startswith("_")}))
            summary |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.summary.update}
        assert name not in shown, "two files hold one run"
        shown[name] = history, summary
    return shown


def ended(read):
    """Waits for the end of a session and returns its records; W&B writes them in another process, milliseconds later."""
    deadline = time.monotonic() + 10
    while True:
        records = read()
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.01)


def leveldb_records(content):
    """Yields the records of a file in LevelDB's log format, after W&B's own header of seven bytes."""
    at, data = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last fragment of one
            yield data
            data = b""


@pytest.mark.long
def test_wandb_offline_holds_every_row_of_every_run_once(wandb, tmp_path, capfd):
    frame = train(tmp_path / "w", wandb="small-batch", tensorboard=False)
    shown = logged(tmp_path / "w")
    assert len(shown) == 6
    for (m, b, base_lr, seed), rows in frame.groupby(list(results.RUN_COLUMNS)):
        history, summary = shown[name_of(Run(m, b, base_lr, seed))]
        due = [(r["epoch"], {t: float(r[c]) for t, c in TAGS.items() if math.isfinite(r[c])}) for _, r in rows.iterrows()]
        assert history == due
        assert summary["final/diverged"] == (rows["status"].iloc[0] == "diverged")
    assert "".join(capfd.readouterr()) == ""


def test_wandb_goes_on_in_the_same_runs_without_a_row_twice(wandb, tmp_path):
    fields = {"wandb": "p", "tensorboard": False, "epochs": 3}
    show(tmp_path, row(1), row(2), *(row(e, seed=1) for e in (1, 2, 3)), **fields)
    before = logged(tmp_path)
    for session in (tmp_path / "wandb").glob("offline-run-*"):
        (session / "seen").touch()
    show(tmp_path, row(3), row(1, seed=2), **fields)
    shown = {name: [epoch for epoch, _ in history] for name, (history, _) in logged(tmp_path).items()}
    names = [f"m00004_lr2^-7_seed{seed}" for seed in (0, 1, 2)]
    assert shown == dict(zip(names, ([1, 2, 3], [1, 2, 3], [1]), strict=True))
    assert set(before) == set(names[:2])
    assert len(list((tmp_path / "wandb").glob("offline-run-*/seen"))) == 1  # only the complete run's session was not replaced


class Resumed:
    """A fake W&B run of which the server already has the first `epochs` epochs."""

    def __init__(self, epochs):
        self.step, self.epochs, self.summary, self.ended = epochs + 1, [], {}, None

    def log(self, values, step, commit):
        self.epochs.append(step)

    def finish(self, exit_code=0):
        self.ended = exit_code


def test_of_a_run_that_wandbs_server_has_only_the_rest_is_logged(wandb, tmp_path, monkeypatch):
    there = Resumed(2)
    monkeypatch.setattr(wandb, "init", lambda **asked: there)
    show(tmp_path, *(row(e) for e in range(1, 6)), wandb="p")
    assert (there.epochs, there.ended) == ([3, 4, 5], 1)


def test_a_failure_of_wandb_is_one_line_and_the_grid_goes_on(wandb, watched, tmp_path, monkeypatch, capsys):
    def fail(**asked):
        raise wandb.errors.CommError("no\nnetwork")

    monkeypatch.setattr(wandb, "init", fail)
    pd.testing.assert_frame_equal(train(tmp_path / "w", wandb="p"), watched[1], check_exact=True)
    assert capsys.readouterr().err == "warning: wandb gets no further results; training continues: CommError: no network\n"
    assert_all_shown(tmp_path / "w")


def test_wandb_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r'^wandb: needs wandb, which is not installed; run pip install -e "\.\[wandb\]"\.$'):
        train(tmp_path / "w", wandb="p")
    assert not (tmp_path / "w").exists()


def test_a_project_that_wandb_does_not_take_is_refused_before_anything_is_written(wandb, tmp_path):
    with pytest.raises(InputError, match=r"^wandb: .*a/b"):
        train(tmp_path / "w", wandb="a/b")
    assert not (tmp_path / "w").exists()
