"""Tests report.py: the page that it writes, bad input, and a page that follows a grid or a search."""

import re
import subprocess
import threading
import time

import pytest
from pages import Parts, store
from shell import command, run

from smallbatch_jax.store import workdir


def test_the_command_writes_the_page_and_says_the_answer(tmp_path):
    folder = store(tmp_path / "w", [(2, 1), (2, 2), (2, 3)])
    done = run("report.py", f"--workdir={folder}", f"--out={tmp_path}/new/page.html")
    sentence = "So far (1 of 2 runs ended): best at m = 2, η̃ = 2^-6: 90.0 %."
    assert done.stdout.splitlines() == [f"mine: {sentence}", f"report: {tmp_path}/new/page.html"], done.stderr
    page = Parts((tmp_path / "new/page.html").read_text())
    assert sentence in page.text
    assert "data-refresh" not in dict(page.elements)["body"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--workdir=W", "--out=OUT"], "--out: OUT is a folder"),
        (["--workdir=OUT"], "--workdir: OUT is not a workdir"),
        (["--workdir="], "--workdir: empty"),
        ([], "--workdir: not given"),
        (["--workdir=W", "--workdir=W"], "both hold 'mine'"),
    ],
)
def test_bad_input_takes_one_line(tmp_path, flags, says):
    (tmp_path / "out").mkdir()
    places = {"OUT": str(tmp_path / "out"), "W": str(store(tmp_path / "w", []))}
    done = run("report.py", *[re.sub("OUT|W$", lambda match: places[match[0]], flag) for flag in flags])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says.replace("OUT", places["OUT"]) in done.stderr
    assert done.stdout == ""


@pytest.mark.long
def test_a_watched_page_follows_until_all_runs_have_ended(tmp_path):
    folder, page = tmp_path / "w", tmp_path / "page.html"
    flags = f"--workdir={folder}", f"--out={page}", "--watch", "--every_seconds=1"
    line, options = command("report.py", *flags, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(line, **options) as watching:
        stopped = threading.Timer(60, watching.kill)
        stopped.start()
        assert watching.stdout.readline() == f"waiting for {folder}\n"
        store(folder, [(2, 1), (2, 2), (2, 3)])
        until(lambda: page.exists() and 'data-refresh="1"' in page.read_text())
        store(folder, [(4, 1), (4, 2), (4, 3)])
        assert watching.wait() == 0
        stopped.cancel()
    assert 'data-refresh="1"' not in page.read_text()
    assert "every other batch size is within the noise of it" in page.read_text()


@pytest.mark.long
def test_a_watched_search_ends_when_its_command_does(tmp_path):
    """The command of a search ends after its last row: until then the search may begin further runs."""
    rows = [(m, epoch) for m in (2, 4) for epoch in (1, 2, 3)]
    folder, page = store(tmp_path / "w", rows, search={"budget": 1e3}), tmp_path / "page.html"
    line, options = command("report.py", f"--workdir={folder}", f"--out={page}", "--watch", "--every_seconds=1")
    with subprocess.Popen(line, **options, stdout=subprocess.DEVNULL) as watching:
        stopped = threading.Timer(60, watching.kill)
        stopped.start()
        until(lambda: page.exists() and 'data-refresh="1"' in page.read_text())
        workdir.record_provenance(folder, "finish")
        assert watching.wait() == 0
        stopped.cancel()
    assert 'data-refresh="1"' not in page.read_text()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
