"""Tests what is made a workdir, what is refused, and what a killed owner left behind."""

import json
import os
from pathlib import Path

import pytest
import tiny

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.store import results, workdir


def open_(path):
    return workdir.open_workdir(path, tiny.grid(), {})


def test_what_a_killed_writer_left_half_written_is_removed_by_the_next_owner(tmp_path):
    with workdir.open_workdir(tmp_path / "w", tiny.grid(), {"num_classes": 3}) as folder:
        pass
    left = [folder / name for name in (".experiment.json.x.tmp", "results/.m.csv.x.tmp", "figures/.heat_map.png.x.tmp")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
        os.utime(path, (0, 0))
    left[2].with_name(".runs.png.x.tmp").write_text("being written")
    with workdir.open_workdir(folder, tiny.grid(), {"num_classes": 3}):
        assert not any(path.exists() for path in left)
        assert (folder / "figures/.runs.png.x.tmp").exists()


def test_a_folder_that_is_no_workdir_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="is not a workdir"):
        results.load(tmp_path)
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(InputError, match=r"experiment.json is damaged"):
        results.load(tmp_path)
    (tmp_path / "experiment.json").write_text(json.dumps({"format": 999}))
    with pytest.raises(InputError, match="has format 999"):
        results.load(tmp_path)


def test_logs_do_not_bring_back_a_workdir_that_was_removed_and_alone_count_as_none(tmp_path):
    gone = tmp_path / "gone"
    for log in (lambda: results.Timings(gone).add("segment", 1.5), lambda: workdir.record_provenance(gone, "finish")):
        with pytest.raises(InputError, match=r"gone/.* cannot be written: No such file or directory\."):
            log()
    assert not gone.exists()
    gone.mkdir()
    results.Timings(gone).add("segment", 1.5)
    workdir.record_provenance(gone, "finish")
    with open_(gone):
        assert (gone / "experiment.json").exists()


def test_a_folder_of_something_else_is_never_made_a_workdir(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds 'thesis.tex' but no experiment"), open_(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/none"])
def test_a_workdir_that_cannot_be_written_is_refused_in_one_line(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--workdir: .*(is a file|cannot be written)"), open_(tmp_path / path):
        pass


def test_a_workdir_without_permission_is_refused_in_one_line(forbidden):
    """An ordinary user is refused in root's folders and in one without permission."""
    for path in (Path("/root/runs/w"), forbidden / "w"):
        with pytest.raises(InputError, match=r"^--workdir: .* cannot be (read|written): Permission denied\.$"), open_(path):
            pass
