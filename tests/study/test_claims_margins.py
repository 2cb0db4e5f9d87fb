"""Tests margins in standard errors: under noise, at the edges of a grid, and on the stored tables."""

import dataclasses
import functools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from claimed import LOST, chosen_rates, exact, study, verdict

from smallbatch_jax.study import claims
from smallbatch_jax.study.claims import checks
from smallbatch_jax.study.claims.margins import Finding, Side, alike, at_share, compared, measured, ratio
from smallbatch_jax.study.claims.tables import Sizes
from smallbatch_jax.study.study import load_all

RESULTS = Path(__file__).parents[2] / "notebooks" / "results"
SMALL = Sizes(1, 8)
RATES = tuple(2.0**k for k in range(-10, -4))
SIZES = (2, 8, 32, 128, 512)
IMAGES = 2000
DRAWS = 200


def test_a_margin_is_a_difference_over_the_errors_of_both_sides():
    """Errors of 3 and 4 points combine to 5: a difference of 12 points is 2.4 errors, and one of 9 is inconclusive."""
    assert compared("", Side(0.60, 0.03), Side(0.48, 0.04)) == ("holds", "", pytest.approx(2.4))
    assert compared("", Side(0.48, 0.03), Side(0.60, 0.04)) == ("does not hold", "", pytest.approx(-2.4))
    assert compared("", Side(0.60, 0.03), Side(0.51, 0.04)) == ("cannot tell", "", pytest.approx(1.8))
    assert compared("", Side(0.48, 0.03), Side(0.60, 0.04), tolerance=0.24) == ("holds", "", pytest.approx(2.4))


def test_sides_are_alike_if_their_difference_is_within_the_tolerance_by_two_errors():
    assert [alike("", Side(0.5, 0.003), Side(0.5 + gap, 0.004), 0.02).margin for gap in (0.0, 0.02, -0.03)] == pytest.approx(
        [4, 0, -2]
    )


def test_without_an_error_any_difference_tells_and_without_a_known_one_none():
    assert [ratio(gain, 0.0) for gain in (0.1, 0.0, -0.1, 1e-12)] == [math.inf, 0, -math.inf, 0]
    assert measured("", math.nan) == ("cannot tell", "", pytest.approx(math.nan, nan_ok=True))


@pytest.mark.parametrize(("wins", "loses", "margins"), [(True, False, (3, -1, -3)), (False, True, (3, 1, -3))])
def test_what_an_edge_of_the_grid_may_reverse_cannot_be_told(wins, loses, margins):
    told = [measured("", margin, wins, loses).verdict for margin in margins]
    assert told == (["holds", "cannot tell", "cannot tell"] if wins else ["cannot tell", "cannot tell", "does not hold"])


def test_a_margin_is_shown_with_its_sign_and_never_rounded_up():
    shown = [
        Finding(*found).shown for found in (("holds", "", 3.19), ("cannot tell", "", -1.99), ("holds", ""), ("lacks data", ""))
    ]
    assert shown == ["holds, +3.1 standard errors", "cannot tell, -1.9 standard errors", "holds, by count", "lacks data"]
    edge = Finding("cannot tell", "", 5.0).shown
    assert edge == "cannot tell, +5.0 standard errors, but an edge of the grid may reverse it"


def test_a_share_of_the_batch_sizes_has_the_margin_of_a_partial_conjunction():
    """All of three hold by the weakest margin; that one of three fails by −3 has p = 3 · 0.00135 by chance."""
    assert at_share([5, 3, 4]) == pytest.approx(3)
    assert at_share([5, -3, 4]) == pytest.approx(-2.65, abs=0.01)
    assert at_share([5, -3, 4, 3], 0.5) == pytest.approx(3.73, abs=0.01)  # the second largest margin, p = 3 · 0.0000317
    assert at_share([-0.1, 0.1, 5]) == 0
    assert at_share([50.0, -60.0]) == -60
    assert math.isnan(at_share([5, math.nan]))


def flat(name, table, seed, rates=RATES, images=IMAGES, **options):
    """Returns a study whose accuracies are binomial draws around those of `table`, by batch size and base_lr."""
    found = base(name, tuple(table), rates, **options)
    rng = np.random.default_rng(seed)
    cells = found.cells.copy()
    true = [table[m] for m in cells["batch_size"]]
    true = [t[rates.index(r)] if isinstance(t, tuple) else t for t, r in zip(true, cells["base_lr"], strict=True)]
    cells["test_accuracy"] = rng.binomial(images, true) / images
    return dataclasses.replace(found, cells=cells, examples=(5000, images))


@functools.cache
def base(name, batch_sizes, rates, **options):
    return study(name, {m: [0.5] * len(rates) for m in batch_sizes}, rates, **options)


def plateau(height):
    """Returns accuracies over RATES with the best at every rate except the two at the edges."""
    return (height - 0.3, *[height] * (len(RATES) - 2), height - 0.3)


LEVEL = {m: plateau(0.5) for m in SIZES} | {512: plateau(0.4)}
PEAKED = dict.fromkeys(SIZES, (0.2, 0.5, 0.5, 0.5, 0.5, 0.2)) | {2: (0.2, 0.4, 0.4, 0.8, 0.4, 0.2)}


@functools.cache
def bn_base(name):
    return chosen_rates(name, {m: {} for m in (8, 16, 32, 64, 128)}, (2, 4, 8, 16, 32, 64))


def bn_level(name, seed):
    """Returns a study in which every BN batch size is equally good, so that the best is random."""
    found = bn_base(name)
    cells = found.cells.assign(test_accuracy=np.random.default_rng(seed).binomial(IMAGES, 0.5, len(found.cells)) / IMAGES)
    return dataclasses.replace(found, cells=cells, examples=(5000, IMAGES))


def curves(low, seed):
    """Returns a one-epoch study whose training accuracy is `low` at m = 4 and 0.5 at the others."""
    found = base("fig04", (4, 16, 64, 128), (2**-8,))
    true = found.rows["batch_size"].map(lambda m: low if m == 4 else 0.5)
    accuracy = np.random.default_rng(seed).binomial(5000, true) / 5000
    return dataclasses.replace(found, rows=found.rows.assign(train_accuracy=accuracy))


NULLS = {  # draws of a check without a true answer: the difference is zero or exactly the tolerance
    "best": lambda i: checks.best_is_at(flat("fig01", LEVEL, i), SMALL),
    "tolerance": lambda i: checks.best_is_at(flat("fig01", LEVEL | {128: plateau(0.48)}, i), Sizes(128, 128), tolerance=0.02),
    "falls": lambda i: checks.accuracy_falls(flat("fig01", LEVEL, i), Sizes(1, 32)),
    "similar": lambda i: checks.are_similar(
        flat("a", LEVEL, i, images=10**4), flat("b", {m: plateau(0.48) for m in SIZES}, i + DRAWS, images=10**4)
    ),
    "better": lambda i: checks.is_better(flat("a", LEVEL, i), flat("b", LEVEL, i + DRAWS)),
    "improves": lambda i: checks.improves_on(flat("a", LEVEL, i), flat("b", LEVEL, i + DRAWS)),
    "gains": lambda i: checks.gains_more(flat("a", LEVEL, i), flat("b", LEVEL, i + DRAWS), Sizes(128), SMALL),
    "reach": lambda i: checks.best_base_lr_is_out_of_reach(flat("fig08", PEAKED, i), ~Sizes(1, 16)),
    "bn": lambda i: checks.best_bn_batch_is(bn_level("fig13_cifar10", i), Sizes(16), 0.5, Sizes(4, 8)),
    "all bn": lambda i: checks.best_bn_batch_is(bn_level("fig13_cifar100", i), Sizes(16), 1.0, Sizes(4, 8)),
    "curves": lambda i: checks.curves_are_similar(curves(0.45, i), 2**-8, Sizes(4, 64)),
    "lower": lambda i: checks.curves_are_lower(curves(0.5, i), 2**-8, ~Sizes(1, 64), Sizes(4, 64)),
}
FAST = ("best", "falls", "curves")
TRUTHS = {  # the same with a true difference of at least five standard errors
    "best": (lambda i: checks.best_is_at(flat("fig01", LEVEL | {2: plateau(0.6)}, i), SMALL), "holds"),
    "falls": (
        lambda i: checks.accuracy_falls(flat("a", {m: plateau(0.8 - 0.05 * k) for k, m in enumerate(SIZES)}, i)),
        "holds",
    ),
    "better": (
        lambda i: checks.is_better(flat("a", LEVEL, i), flat("b", {m: plateau(0.6) for m in SIZES}, i)),
        "does not hold",
    ),
    "reach": (
        lambda i: checks.best_base_lr_is_out_of_reach(flat("fig08", dict.fromkeys(SIZES, PEAKED[2]), i), ~SMALL),
        "does not hold",
    ),
    "curves": (lambda i: checks.curves_are_similar(curves(0.5, i), 2**-8, Sizes(4, 64)), "holds"),
}


@pytest.mark.parametrize("check", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in NULLS])
@pytest.mark.long
def test_where_nothing_is_true_a_verdict_is_rare(check):
    """Either verdict may occur in 5 % of draws, twice the tail beyond two standard errors (2.3 %)."""
    told = Counter(NULLS[check](i).verdict for i in range(DRAWS))
    assert told["holds"] <= 0.05 * DRAWS, told
    assert told["does not hold"] <= 0.05 * DRAWS, told


@pytest.mark.parametrize("check", TRUTHS)
def test_a_large_difference_is_told(check):
    draw, answer = TRUTHS[check]
    assert {draw(i).verdict for i in range(10)} == {answer}


@pytest.mark.parametrize(
    ("table", "shown"),
    [
        # m = 16 is best at its largest or smallest base_lr: it may be better than m = 8 at one that was not tried.
        ({8: [0.4, 0.5, 0.4], 16: [0.2, 0.3, 0.4], 32: [0.2, 0.3, 0.2]}, "cannot tell"),
        ({8: [0.4, 0.5, 0.4], 16: [0.4, 0.3, 0.2], 32: [0.2, 0.3, 0.2]}, "cannot tell"),
        ({8: [0.4, 0.5, 0.4], 16: [0.3, 0.4, LOST], 32: [0.2, 0.3, 0.2]}, "holds"),  # diverges at the next larger base_lr
        ({8: [0.4, 0.4, 0.5], 16: [0.2, 0.4, 0.3], 32: [0.2, 0.3, 0.2]}, "holds"),  # at an edge, but better than the others
        ({8: [0.4, 0.5, 0.4], 16: [0.2, 0.4, 0.3], 32: [0.2, 0.3, 0.4]}, "cannot tell"),  # m = 32 as good as m = 16
        ({8: [0.4, 0.5, 0.4], 16: [0.2, 0.4, 0.3], 32: [0.2, 0.3, 0.35]}, "holds"),  # m = 32 worse than m = 16
        ({2: [0.1, 0.2, 0.1], 8: [0.2, 0.3, 0.4], 16: [0.4, 0.5, 0.4]}, "cannot tell"),
        ({2: [0.1, 0.2, 0.1], 8: [0.2, 0.4, 0.3], 16: [0.4, 0.4, 0.5]}, "does not hold"),
        # The losing side may be better at a batch size beyond those tried; the paper has none below 2.
        ({8: [0.4, 0.5, 0.4], 16: [0.2, 0.4, 0.3]}, "cannot tell"),
        ({8: [0.2, 0.4, 0.3], 16: [0.4, 0.5, 0.4]}, "cannot tell"),
        ({2: [0.2, 0.4, 0.3], 16: [0.4, 0.5, 0.4]}, "does not hold"),
    ],
)
def test_an_edge_of_the_grid_leaves_open_what_it_may_reverse(table, shown):
    found = verdict("C1", {"fig01": table})
    assert found.answer == shown
    assert abs(found.margin) > 2
    assert ("an edge of the grid may reverse it" in found.shown) is (shown == "cannot tell")


@pytest.mark.parametrize(("lowest", "shown"), [(2**-12, "holds"), (2**-11, "cannot tell")])
def test_an_edge_where_the_papers_grid_ends_too_leaves_nothing_open(lowest, shown):
    """At m = 16 the smallest η̃ tried is best, which leaves a claim open unless it is 2^-12, where the paper's grid begins."""
    table = {8: [0.3, 0.5, 0.4], 16: [0.4, 0.3, 0.2], 32: [0.3, 0.2, LOST]}
    found = verdict("C1", {"fig01": exact("fig01", table, (lowest, 2**-9, 2**-8))})
    assert found.answer == shown
    assert "the smallest tried" in found.findings[0].text


def test_the_edges_are_said():
    table = {8: [0.4, 0.4, 0.5], 16: [0.4, 0.3, 0.2], 32: [0.2, 0.3, 0.4], 64: [0.1, 0.2, 0.1]}
    assert verdict("C1", {"fig01": table}).findings[0].text == (
        "fig01: m up to 8 (tried: 8) reach 50.00 % at m = 8 (base_lr 2^-7, the largest tried, m the smallest tried); "
        "the others 40.00 % at m = 16 (base_lr 2^-9, the smallest tried), as good at an edge of the base_lrs at m = 32"
    )


def test_rates_chosen_from_other_results_are_at_no_edge():
    table = {2: {2: 0.5}, 16: {16: 0.4}, 64: {16: 0.3}}
    assert verdict("C1", {"fig01": chosen_rates("fig01", table, (2, 16))}).answer == "holds"
    assert verdict("C1", {"fig01": exact("fig01", {2: 0.5, 16: 0.4, 64: 0.3}, (0.5,))}).answer == "cannot tell"


PAIR = {m: [0.3, 0.5, 0.3] for m in (2, 8, 32, 128)}
HIGH = {m: [0.3, 0.3, 0.6] for m in PAIR}  # best at the largest base_lr tried
ABOVE = {m: [0.3, 0.7, 0.3] for m in PAIR}
LATE = {128: [0.3, 0.7, 0.3]}


@pytest.mark.parametrize(
    ("check", "options", "tables", "answer"),
    [
        (checks.improves_on, {}, (HIGH, PAIR), "holds"),
        (checks.improves_on, {}, (PAIR, ABOVE), "does not hold"),
        (checks.improves_on, {}, (HIGH, ABOVE), "cannot tell"),
        (checks.improves_on, {}, (ABOVE, HIGH), "cannot tell"),
        (checks.is_better, {}, (HIGH, PAIR), "holds"),
        (checks.is_better, {}, (ABOVE, HIGH), "cannot tell"),
        (checks.are_similar, {}, (PAIR, PAIR), "holds"),
        (checks.are_similar, {}, ({m: [0.3, 0.6, 0.3] for m in PAIR}, HIGH), "cannot tell"),
        (checks.accuracy_falls, {}, ({2: [0.3, 0.3, 0.6], 8: [0.3, 0.5, 0.3], 32: [0.3, 0.4, 0.3]},), "holds"),
        (checks.accuracy_falls, {}, ({2: [0.3, 0.6, 0.3], 8: [0.3, 0.5, 0.3], 32: [0.3, 0.3, 0.4]},), "cannot tell"),
        (checks.accuracy_falls, {}, ({2: [0.3, 0.3, 0.4], 8: [0.3, 0.5, 0.3], 32: [0.3, 0.6, 0.3]},), "cannot tell"),
        (checks.gains_more, {"sizes": Sizes(128), "than": SMALL}, (PAIR | LATE, PAIR), "holds"),
        (checks.gains_more, {"sizes": Sizes(128), "than": SMALL}, (PAIR | LATE, PAIR | {128: HIGH[128]}), "cannot tell"),
        (checks.best_base_lr_is_out_of_reach, {"sizes": ~SMALL}, (PAIR | {2: HIGH[2]},), "cannot tell"),
    ],
)
def test_every_comparison_knows_lower_bounds(check, options, tables, answer):
    found = check(*(exact(f"fig0{i}", table) for i, table in enumerate(tables, 1)), **options)
    assert found.verdict == answer


def test_a_claim_has_the_margin_of_its_weakest_part_and_none_where_that_was_counted():
    found = verdict("C2", {"fig02": {2: 0.5, 8: 0.4, 32: 0.3}, "fig03": {2: 0.5, 8: 0.45, 32: 0.3}})
    assert found.margin == min(finding.margin for finding in found.findings) < found.findings[0].margin
    lost = verdict("C3", {"resnet32_nobn": {2: 0.6, 4: 0.6, 8: 0.5, 16: 0.5, 32: LOST}})
    assert lost.shown == "does not hold, by count"
    assert sum(finding.verdict == "does not hold" for finding in lost.findings) == 2


COARSE = {2: [0.2, 0.3, 0.4, 0.5, 0.2], 8: [0.2, 0.3, 0.4, 0.48, LOST], 32: [0.2, 0.3, 0.4, LOST, LOST]}
COARSE |= {128: [0.2, 0.3, LOST, LOST, LOST], 512: [0.2, LOST, LOST, LOST, LOST]}
NAMES = ("fig01", "fig02", "fig03", "fig05", "fig06", "fig07", "fig08", "fig10", "fig17", "fig18", "resnet32_nobn")


def test_a_reduced_grid_judges_every_claim_about_cifar_10():
    """The grid has m = 2, 8, … 512 and five base learning rates, on 5,000 images."""
    rates = tuple(2.0**k for k in range(-12, -2, 2))
    given = {name: study(name, COARSE, rates) for name in NAMES}
    given["fig04"] = study("fig04", {m: [0.5] for m in SIZES}, (2**-8,))
    given["fig13_cifar10"] = chosen_rates("fig13_cifar10", {m: {} for m in SIZES}, SIZES)
    found = claims.judge(given)
    assert [v.claim.id for v in found if v.answer == "lacks data"] == ["C8", "C10"]
    # The 76 % needs all 50,000 images, and some figures are of CIFAR-100.
    assert [v.claim.id for v in found if v.shown.endswith("in part")] == ["C3", "C6", "C7", "C9", "C12"]


STORED = {
    "cifar10_subset": {"C1": 1.1, "C6": -0.2, "C9": -0.5, "C11": 1.8, "C12": "holds"},
    "cifar10": {"C1": 3.8, "C6": 0.0, "C11": 3.8, "C12": "holds"},
    "digits": {"C6": 0.0, "C7": 0.1, "C12": "holds", "C13": 0.0},
    "cifar10_5000": {"C1": 7.4, "C2": 2.4, "C3": "does not hold", "C4": 1.1, "C5": -2.1, "C6": 0.0, "C7": -7.6, "C9": -1.5}
    | {"C11": 3.3, "C12": "does not hold", "C13": 0.2},
}


@pytest.mark.parametrize(("folder", "expected"), STORED.items())
def test_stored_tables_give_the_verdicts_that_the_docs_report(folder, expected):
    """With 2,000 test images or fewer only C12 (what converges) is decided; with 10,000 up to seven claims are."""
    found = claims.judge(load_all(sorted(RESULTS.joinpath(folder).iterdir())))
    told = {v.claim.id: v.answer if math.isnan(v.margin) else round(v.margin, 1) for v in found if v.answer != "lacks data"}
    assert told == expected
    apart = {v.claim.id for v in found if v.answer not in ("lacks data", "cannot tell")}
    whole = {"cifar10": {"C1", "C11", "C12"}, "cifar10_5000": {"C1", "C2", "C3", "C5", "C7", "C11", "C12"}}
    assert apart == whole.get(folder, {"C12"})


def test_the_verdicts_of_the_docs_are_those_of_the_stored_tables():
    text = RESULTS.parents[1].joinpath("docs", "results.md").read_text()
    written = {row[0]: f"{row[1]}, {row[2]}" for row in re.findall(r"^\| (C\d+): .+? \| (.+?) \| (.+?) \|", text, re.M)}
    found = claims.judge(load_all(sorted((RESULTS / "cifar10_5000").iterdir())))
    assert written.keys() == {v.claim.id for v in found if v.answer != "lacks data"}
    assert [v.shown for v in found if v.claim.id in written and not v.shown.startswith(written[v.claim.id])] == []
