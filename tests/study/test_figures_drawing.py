"""Tests which files drawing an experiment writes, and that they are reproducible."""

import matplotlib
import pandas as pd
import pytest
from drawn import cell, missing, results, table

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.study import figures

STEMS = ("accuracy_vs_batch_size", "accuracy_vs_base_lr", "heat_map", "convergence")
FILES = [f"{stem}.{kind}" for stem in STEMS for kind in ("png", "pdf")]


@pytest.fixture
def cells():
    """Returns cells of m = 2, both finished, and of m = 4, one diverged and one running."""
    lost = cell(4, 0.25, float("nan"), finished=0, diverged=2)
    return table(cell(2, 0.125, 0.6, finished=2), cell(2, 0.25, 0.7), missing(4, 0.125), lost)


def test_draw_writes_eight_files(cells, tmp_path):
    paths = figures.draw(results(cells), tmp_path)
    assert [path.name for path in paths] == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


@pytest.mark.long
def test_figures_carry_no_date_and_depend_on_no_settings_or_order(cells, tmp_path, monkeypatch):
    """The files do not depend on a user's matplotlibrc, the date or the order of the rows."""
    df = results(cells[:1])
    plain = figures.draw(df, tmp_path / "plain")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 50, "axes.linewidth": 5}):
        before = dict(matplotlib.rcParams)
        styled = figures.draw(df.sample(frac=1, random_state=0), tmp_path / "styled")
        assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in styled] == [path.read_bytes() for path in plain]
    assert b"CreationDate" not in plain[1].read_bytes()


@pytest.fixture
def unwritten(monkeypatch):
    """Makes figures without writing them, which takes most of the time; their paths are still returned."""
    monkeypatch.setattr(figures.style, "write", lambda figure, stem: [stem.with_suffix(".png"), stem.with_suffix(".pdf")])


@pytest.mark.usefixtures("unwritten")
def test_a_notebook_shows_a_figure_that_is_the_value_of_a_cell(cells):
    """IPython shows figures that pyplot does not know through `_repr_png_`, which does not depend on settings."""
    plain = figures.heat_map(cells)._repr_png_()
    assert plain.startswith(b"\x89PNG\r\n")
    with matplotlib.rc_context({"savefig.dpi": 50, "savefig.transparent": True}):
        assert figures.heat_map(cells)._repr_png_() == plain


@pytest.mark.usefixtures("unwritten")
def test_experiments_go_into_folders_of_their_own(cells, tmp_path):
    one = results(cells[:2])
    two = pd.concat([one, one.assign(experiment="other")])
    paths = figures.draw(two, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [f"{e}/{f}" for e in ("exp", "other") for f in FILES]


def test_no_rows_are_refused_before_anything_is_written(cells, tmp_path):
    with pytest.raises(InputError, match="no rows") as error:
        figures.draw(results(cells).iloc[:0], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_experiment_name_cannot_leave_the_folder(cells, tmp_path):
    two = pd.concat([results(cells).assign(experiment="up/../.."), results(cells)])
    with pytest.raises(InputError, match=r"experiment: got .* accepts text that can name a folder"):
        figures.draw(two, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    ("rates", "bn_batch_sizes", "stems"),
    [
        ({2: [0.5, 0.25], 4: [0.5]}, None, STEMS),
        ({2: [0.5], 4: [0.5]}, None, ("accuracy_vs_batch_size", "convergence")),  # Fig. 4
        ({4: [0.5], 8: [0.25]}, (2, 4), ("accuracy_vs_bn_batch_size", "convergence")),  # Fig. 13
        ({4: [0.5], 8: [0.5]}, (2, 4), ("accuracy_vs_batch_size", "accuracy_vs_bn_batch_size", "convergence")),
        ({4: [0.5], 8: [0.25]}, None, ("accuracy_vs_batch_size", "convergence")),
        ({4: [0.5, 0.25]}, (2, 4), (*STEMS[:3], "accuracy_vs_bn_batch_size", "convergence")),
    ],
)
def test_only_figures_that_a_grid_gives_rise_to_are_drawn(rates, bn_batch_sizes, stems, tmp_path):
    """A single base_lr needs no axis, and where each m has its own base_lr, curves at one base_lr would be points."""
    rows = [cell(m, x, 0.5, bn_batch_size=b) for m in rates for x in rates[m] for b in bn_batch_sizes or (m,)]
    drawn = figures.draw(results(table(*rows)), tmp_path)
    assert tuple(path.stem for path in drawn[::2]) == stems


def test_a_folder_that_cannot_be_written_is_one_line(cells, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: Not a directory") as error:
        figures.draw(results(cells[:1]), tmp_path / "file" / "figures")
    assert "\n" not in str(error.value)
