"""Tests the HTML report of studies: what it contains, and that it needs no other files."""

import base64
import dataclasses
import gzip
import html
import json
import math
import re
from functools import cache

import pandas as pd
import plotly.graph_objects as go
import pytest
import tiny
from claimed import LOST, LRS, fig13, study
from pages import Parts, data_of, store
from shell import ROOT

from smallbatch_jax.config.experiment import Dataset, InputError
from smallbatch_jax.store import results, workdir
from smallbatch_jax.study import analysis, claims, report
from smallbatch_jax.study.answer import answer
from smallbatch_jax.study.report import charts, sections
from smallbatch_jax.study.study import load

STORED = ROOT / "notebooks/results/cifar10_subset/fig02"


@cache
def stored():
    return load(STORED)


@cache
def parts_of_stored():
    return Parts(report.page([stored()]))


def curves_of(parts, identity="study0"):
    return json.loads(gzip.decompress(base64.b64decode(parts.script("data-curves", identity))))


def test_the_page_holds_the_answer_and_says_how_it_was_found():
    text = parts_of_stored().text
    assert answer(stored()).sentence in text
    cells = analysis.final_accuracy(results.load(STORED)).dropna(subset="test_accuracy")
    best = cells.sort_values(["test_accuracy", "base_lr"], ascending=[False, True]).iloc[0]
    where = f"m = {best['batch_size']}, η̃ = {analysis.format_base_lr(best['base_lr'])}"
    assert f"{where}: {100 * best['test_accuracy']:.1f} %" in text


def test_the_page_loads_nothing_and_is_small():
    parts = parts_of_stored()
    for tag, attrs in parts.elements:
        assert tag not in ("link", "img", "iframe", "base")
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
    policy = next(a["content"] for t, a in parts.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert len(report.page([stored()]).encode()) < 6_000_000


@pytest.mark.long
def test_every_chart_is_one_that_plotly_accepts_and_has_its_place():
    parts = parts_of_stored()
    data = data_of(parts)
    places = {attrs["data-chart"] for _, attrs in parts.elements if "data-chart" in attrs}
    assert places == {f"study0-{name}" for name in ("map", "sizes", "accuracy", "loss", "examples", "rates")}
    for chart in data["scaling"].values():
        go.Figure(chart)
    for map_ in data["maps"]:
        go.Figure(map_["chart"])
        go.Figure(map_["sizes"])
    for cell in curves_of(parts):
        for what in ("accuracy", "loss"):
            go.Figure({"data": cell[what], "layout": data[what]["layout"]})


def test_every_cell_is_in_the_map_once_with_its_accuracy():
    data, cells = data_of(parts_of_stored()), stored().cells
    (map_,) = data["maps"]
    assert sorted(map_["cells"]) == list(range(len(cells)))
    coloured, *flat = map_["chart"]["data"]
    for cell, (x, y) in zip(map_["cells"], map_["places"], strict=True):
        assert {trace["customdata"][y][x] for trace in map_["chart"]["data"]} == {cell}
        accuracy = cells["test_accuracy"].iloc[cell]
        shown = coloured["z"][y][x]
        assert shown is None if math.isnan(accuracy) else shown == pytest.approx(100 * accuracy, abs=0.005)
        assert [trace["z"][y][x] is not None for trace in flat] == [math.isnan(accuracy)]  # all of its seeds diverged
        chosen = data["cells"][cell]
        assert (int(chosen["batch_size"]), float(chosen["base_lr"])) == tuple(cells[["batch_size", "base_lr"]].iloc[cell])


def test_a_label_tells_the_fate_of_every_seed():
    found = study("fig08", {4: [[0.9, LOST, None, 0.8]]}, lrs=LRS[:1], seeds=(0, 1, 2, 3), epochs=2)
    rows = found.rows.copy()
    rows.loc[rows["seed"] == 3, "status"] = "running"
    (label,) = charts.cell_labels(dataclasses.replace(found, rows=rows))
    assert label.startswith("<b>m = 4, η̃ = 2^-9</b><br>η = η̃·m = 0.0078125<br>test accuracy 85.0 ± 7.1 %")
    assert "seed 0: finished, 2 epochs, 90.0 % after the last<br>seed 1: diverged in epoch " in label
    assert label.endswith("seed 3: running, 2 of 2 epochs, 80.0 % after the last<br>1 seed not begun")


def test_the_curves_of_a_cell_are_its_rows():
    found = stored()
    best = answer(found).best
    cell = curves_of(parts_of_stored())[data_of(parts_of_stored())["best"]]
    rows = found.rows[(found.rows[analysis.CELL] == best[analysis.CELL]).all(axis=1)]
    test, train = cell["accuracy"]
    assert (test["name"], train["name"]) == ("test, seed 0", "train, seed 0")
    assert test["y"] == pytest.approx((100 * rows["test_accuracy"]).tolist(), abs=0.005)
    assert train["y"] == pytest.approx((100 * rows["train_accuracy"]).tolist(), abs=0.005)
    assert cell["loss"][0]["y"] == pytest.approx(rows["test_loss"].tolist(), rel=0.01)
    assert (test["x0"], test["dx"]) == (1, 1)


def test_a_diverged_run_is_said_to_be():
    lost = stored().cells.index[stored().cells["finished"] == 0][0]
    cell = curves_of(parts_of_stored())[stored().cells.index.get_loc(lost)]
    assert cell["accuracy"][0]["name"] == "test, seed 0 (diverged)"
    assert cell["accuracy"][0]["y"][-1] is None


def test_bn_batch_sizes_have_maps_of_their_own():
    one_rate = data_of(Parts(report.page([fig13("cifar10", {8: {4: 0.7}, 16: {}})])))
    assert [map_["chart"]["layout"]["xaxis"]["title"]["text"] for map_ in one_rate["maps"]] == ["BN batch size"]
    parts = Parts(report.page([study("x", {4: {}, 8: {}}, bn=(2, 4))]))
    assert "BN batch size = mBN batch size 2BN batch size 4" in parts.text  # the options of a select element
    counts = pd.Series([cell for map_ in data_of(parts)["maps"] for cell in map_["cells"]]).value_counts()
    assert sorted(counts.index) == list(range(12))  # every cell is in a map, and those of m = b = 4 are in two


def test_several_studies_are_compared_and_judged():
    holds = {4: [0.5, 0.6, LOST], 16: [0.5, 0.55, LOST], 32: [0.5, 0.4, LOST], 64: [LOST, LOST, LOST]}
    studies = [study("fig01", {2: 0.8, 16: 0.5}), study("fig02", holds)]
    parts = Parts(report.page(studies))
    compared = json.loads(parts.script("data-comparison", None))
    assert [trace["name"] for trace in go.Figure(compared).data] == [
        "AlexNet, noBN, noAug (fig01)",
        "AlexNet, noBN, noAug (fig02)",
    ]
    verdicts = claims.judge({found.name: found for found in studies})
    hold, fail, untold = (sum(found.answer == answer for found in verdicts) for answer in claims.VERDICTS[:3])
    assert fail == 0
    assert untold
    assert f"{hold + untold} claims can be judged here: holding {hold}, not holding 0, within the noise {untold}." in parts.text
    assert "+14.8 standard errors, but an edge of the grid may reverse it" in parts.text
    assert data_of(parts, "study1")["maps"]


def test_studies_are_compared_at_ordinary_batch_norm_where_they_have_it():
    varied = study("x", {4: [0.5, 0.6, 0.5], 8: [0.4, 0.5, 0.4]}, bn=(2, 4))  # m = 8 with BN batch sizes 2 and 4
    (curve,) = charts.best_by_batch_size({"x": varied}).data
    assert curve.name == "x (BN batch size = m)"
    assert list(curve.x) == [4]


def test_a_study_that_is_about_no_claim_has_no_claims():
    assert "claims" not in Parts(report.page([study("mine", {2: 0.8})])).text


def test_a_study_without_a_row_yet_has_a_page():
    parts = Parts(report.page([study("fig08", {4: [None] * 3, 8: [None] * 3})], refresh_seconds=5))
    assert "So far (0 of 6 runs ended): none of them has finished." in parts.text
    assert dict(parts.elements)["body"]["data-refresh"] == "5"
    assert curves_of(parts)[0]["accuracy"] == []


def test_a_search_without_a_row_yet_has_a_page(tmp_path):
    with workdir.open_workdir(tmp_path, tiny.grid(search={"budget": 1e3}), {"num_classes": 3, "examples": [50, 20]}):
        parts = Parts(report.page([load(tmp_path)]))
    assert "So far (0 of 3 runs ended): none of them has finished." in parts.text


@pytest.mark.parametrize("line", [{"device": "cpu"}, {"versions": [1]}, {"command": 3}])
def test_damaged_provenance_is_left_out(tmp_path, line):
    workdir.record_provenance(tmp_path, "start", **line)
    assert dict(sections.provenance(tmp_path))["started"] == "1 time"


def test_text_of_a_users_cannot_break_out_of_its_place():
    bad = "</script><b>&'\""
    found = study("x", {4: 0.5})
    experiment = dataclasses.replace(found.experiment, dataset=Dataset("folder", data_dir=f"/data/{bad}"))
    page = report.page([dataclasses.replace(found, experiment=experiment)])
    assert "</script><b>" not in page
    assert json.dumps(bad)[1:-1] in Parts(page).text  # unchanged in the shown config
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page))


def test_json_in_a_script_is_itself_and_ends_no_script():
    names = ["<script><!--&amp;", "η̃ = 2^-7"]
    text = Parts(report.page([study(name, {4: 0.5}) for name in names])).script("data-comparison", None)
    shown = [html.unescape(trace["name"]) for trace in json.loads(text)["data"]]
    assert shown == [f"AlexNet, noBN, noAug ({name})" for name in names]
    assert not set("<>&") & set(text)


def test_a_folder_is_no_place_for_a_page(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        report.write([study("x", {4: 0.5})], tmp_path)


SEGMENTS = [("segment", 3.0, 2, 2, 1, 75, 150), ("segment", 1.0, 4, 4, 1, 36, 144), ("compile", 5.0, 2, 2, 1, 0, 0, 2**20)]


@pytest.fixture
def timed(tmp_path):
    """Returns a study of m = 2 and 4 up to epoch 3, of about 50 images each: 20 ms per image at m = 2, about 7 at m = 4."""
    folder = store(tmp_path / "timed", [(m, epoch) for m in (2, 4) for epoch in (1, 2, 3)])
    for segment in SEGMENTS:
        results.Timings(folder).add(*segment)
    return load(folder)


def test_a_program_costs_what_its_timings_say(timed):
    parts = Parts(report.page([timed]))
    assert "2 programs trained 294 images in 4 s; compiling took 5 s" in parts.text
    (two, four) = sections.program_table(timed).rows
    assert [cell.shown for cell in two] == ["2", "1", "50", "3 s", "5 s", "1.0"]
    assert [cell.shown for cell in four] == ["4", "1", "144", "1 s", "0 s", "–"]


def test_accuracy_is_drawn_over_a_runs_own_time(timed):
    drawn = charts.cost_charts(timed)
    assert sorted(data_of(Parts(report.page([timed])))["costs"]) == ["target", "time"]
    two, four = drawn["time"].data
    assert list(two.x) == pytest.approx([1.0, 2.0, 3.0])
    assert list(four.x) == pytest.approx([48 / 144, 96 / 144, 1.0])
    assert list(two.y) == [90.0] * 3
    (points,) = drawn["target"].data
    assert (list(points.x), list(points.y)) == ([2, 4], pytest.approx([1.0, 48 / 144]))


def test_a_study_without_timings_has_no_cost():
    parts = parts_of_stored()
    assert "Cost" not in parts.text
    assert data_of(parts)["costs"] == {}
