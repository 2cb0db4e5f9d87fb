"""`diagnostics` adds columns to the results beside the metrics; without it nothing changes."""

import jax
import numpy as np
import photos
import pytest
import tiny
from asked import experiment, refusal
from pictures import error_line

import smallbatch_jax as sbj
from smallbatch_jax.config.experiment import differences
from smallbatch_jax.program import device_data, lanes, segment
from smallbatch_jax.program.train import Program
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.progress import NoProgress
from smallbatch_jax.store import results
from smallbatch_jax.store.workdir import read_workdir

NAMES = ("noise_scale", "sharpness")
COLUMNS = ["train_noise_scale", "train_noise_scale_error", "train_sharpness"]
RATES = (2**-9, 2**-7, 2**-5)


def train(workdir, names=NAMES, **fields):
    """Trains `tiny.PlainModel` into a workdir and returns its rows; the highest rate diverges."""
    chosen = tiny.grid(diagnostics=names, **{"base_lrs": (*RATES[:2], 1e30), **fields})
    train_grid(chosen, workdir, tiny.dataset(), NoProgress(), lambda _: tiny.PlainModel())
    return results.load(workdir)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnostics") / "w"
    train(folder)
    return folder


def test_every_epoch_has_them_and_the_last_row_of_a_diverged_run_has_nan(workdir):
    frame = results.load(workdir)
    assert list(frame.columns[-5:-2]) == COLUMNS
    lost = frame["status"] == "diverged"
    assert lost.sum() == 1
    assert frame.loc[lost, COLUMNS].isna().all(axis=None)
    assert np.isfinite(frame.loc[~lost, COLUMNS]).all(axis=None)
    assert frame.loc[~lost, "train_sharpness"].nunique() == 6


def test_without_them_the_columns_and_the_rows_are_those_of_before(workdir, tmp_path):
    plain = train(tmp_path / "plain", ())
    header = (tmp_path / "plain" / "results" / "m00004_b00004.csv").read_text().splitlines()[0]
    assert header == ",".join(results._FIXED)
    assert results.load(workdir).drop(columns=COLUMNS).equals(plain)


@pytest.mark.long
def test_a_workdir_resumes_bit_for_bit(workdir, tmp_path):
    """A run whose rows were cut off after the first epoch trains again to the same rows, in a grid that has grown."""
    first = train(tmp_path / "w", base_lrs=RATES[:1])
    path = tmp_path / "w" / "results" / "m00004_b00004.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert train(tmp_path / "w").equals(results.load(workdir))
    assert first.equals(results.load(workdir).query(f"base_lr == {RATES[0]}").reset_index(drop=True))


def test_a_program_without_them_is_made_of_the_same_operations_as_before(monkeypatch):
    mesh = lanes.lane_mesh(jax.devices()[:1])
    arguments = tiny.PlainModel(), Program(4, 26), device_data.to_device(tiny.dataset(), mesh), mesh, 2, 13, "float32"

    def text(mapping):
        return lanes.trace_lanes(*arguments, mapping)[0].lower().as_text()

    ours = {mapping: text(mapping) for mapping in ("map", "vmap")}
    monkeypatch.setattr(segment, "make_diagnose", lambda *_: lambda state, data: {})
    assert ours == {mapping: text(mapping) for mapping in ours}


@pytest.mark.parametrize("model", [pytest.param(tiny.PlainModel, marks=pytest.mark.slow), tiny.TinyModel])
@pytest.mark.long
def test_lanes_in_turn_and_side_by_side_have_the_same(model):
    mesh = lanes.lane_mesh(jax.devices()[:1])
    data, program = device_data.to_device(tiny.dataset(), mesh), Program(4, 26, diagnostics=NAMES)
    found = {}
    for mapping in ("map", "vmap"):
        compiled = lanes.compile_lanes(model(), program, data, mesh, 2, 13, mapping=mapping)
        initial = lanes.initialiser(model(), tiny.dataset().example)
        state = compiled.start(compiled.empty(), {lane: initial(lane) for lane in range(2)})
        setting = lanes.Setting(*(np.full(2, v, d) for v, d in ((2**-9, "f4"), (0, "i4"), (0, "f4"), (0, "f4"))))
        indices = np.arange(2 * 13 * 4, dtype=np.int32).reshape(2, 13, 4) % 50
        _, report = compiled.run(state, setting, lanes.Segment(indices, np.array([13, 13], np.int32), np.ones(2, bool)))
        found[mapping] = {name: np.asarray(value) for name, value in report.diagnosed.items()}
    for name in COLUMNS:
        np.testing.assert_allclose(found["map"][name], found["vmap"][name], rtol=1e-3)
        assert found["map"][name][0] != found["map"][name][1]


def test_they_belong_to_the_results_of_a_workdir(workdir):
    stored, _ = read_workdir(workdir)
    assert stored.diagnostics == NAMES
    assert differences(experiment(), experiment(diagnostics=NAMES[:1])) == ["diagnostics is () there and ('noise_scale',) here"]


def test_sweep_takes_them_as_an_option_and_refuses_others_and_streamed_images(tmp_path):
    options = {"batch_sizes": (4,), "base_lrs": (2**-9,), "epochs": 1, "progress": NoProgress()}
    frame = sbj.sweep(tiny.PlainModel(), tiny.dataset(), **options, diagnostics=("sharpness",))
    assert frame["train_sharpness"].notna().all()
    assert "train_noise_scale" not in frame
    assert refusal(lambda: experiment(diagnostics=("flatness",))).startswith("diagnostics: unknown diagnostic 'flatness'")
    photographs = photos.load(photos.write(tmp_path, 6, 6))
    line = error_line(sbj.sweep, "resnet8", photographs, **options, diagnostics=NAMES[:1])
    assert line.startswith("diagnostics: ('noise_scale',) read training images again at every evaluation")


def test_a_metric_of_a_callers_own_cannot_have_the_name_of_a_column():
    line = refusal(lambda: experiment(diagnostics=NAMES, metrics=("own:sharpness",)))
    assert line.startswith("metrics: 'sharpness' cannot name a metric of your own")
