"""Tests which cells and seeds give the accuracy of a batch size, a curve and a range of base_lrs in claims."""

import math

import pytest
from claimed import LOST, LRS, chosen_rates, exact, fig04, study, texts, verdict


def test_seeds_are_averaged_before_batch_sizes_are_compared():
    """m = 2 has the best single seed but the lower mean."""
    table = {2: [[0.6, 0.2, 0.4], LOST, LOST], 16: [LOST, [0.5, 0.5, 0.48], LOST]}
    found = verdict("C1", {"fig01": exact("fig01", table, seeds=(0, 1, 2))}).findings[0]
    assert found.margin == pytest.approx((0.4 - 1.48 / 3) / math.hypot(0.2, 0.02 / math.sqrt(3)) * math.sqrt(3))


def test_the_full_range_of_base_learning_rates_is_that_of_each_batch_size_over_its_seeds():
    """m = 4 converges at two of three base_lrs, because one of its seeds diverged at the last."""
    table = {4: [[0.5, 0.5], [0.6, 0.6], [0.5, LOST]], 16: [[0.7, 0.7], [0.7, 0.7], LOST], 128: [[0.6, 0.6], LOST, LOST]}
    assert "fig12: converging base_lrs 2 at m = 4, of 3" in texts("C8", {"fig12": two_seeds(table)}, "does not hold")
    mended = table | {4: [[0.5, 0.5], [0.6, 0.55], [0.5, 0.5]], 2: [[0.5, 0.5]] * 3}
    assert "fig12: converging base_lrs 3, 3 at m = 2, 4, of 3, 3" in texts("C8", {"fig12": two_seeds(mended)}, "holds")


def two_seeds(table):
    return exact("fig12", table, seeds=(0, 1))


def test_the_best_base_lr_of_each_batch_size_counts():
    table = {2: [0.3, 0.5, 0.1], 16: [0.2, 0.4, LOST], 64: [0.1, 0.2, LOST]}
    assert texts("C1", {"fig01": table}, "holds") == [
        "fig01: m up to 8 (tried: 2) reach 50.00 % at m = 2 (base_lr 2^-8, m the smallest tried); "
        "the others 40.00 % at m = 16 (base_lr 2^-8)"
    ]


def test_ordinary_batch_norm_counts_where_it_was_trained():
    """m = 16 reaches 90 % with BN over 2 examples and 30 % with BN over all 16; m = 32 has BN over 2 and 16 only."""
    table = {2: {2: 0.5}, 16: {2: 0.9, 16: 0.3}, 32: {2: 0.45}, 64: {2: 0.2}}
    assert verdict("C1", {"fig01": chosen_rates("fig01", table, (2, 16))}).answer == "holds"
    assert verdict("C1", {"fig01": chosen_rates("fig01", table | {32: {2: 0.51}}, (2, 16))}).answer == "does not hold"
    lost = chosen_rates("fig01", {2: {2: LOST}, 16: {2: 0.9, 16: LOST}}, (2, 16))
    assert texts("C1", {"fig01": lost}, "lacks data") == ["no run of fig01 with BN over the whole batch finished"]


def test_a_convergence_curve_counts_by_its_mean_over_epochs_and_seeds():
    """The means are 0.5, 0.5 and 0.275 although m = 128 ends highest, because a diverged seed counts as 0."""
    table = {4: [[(0.4, 0.6), (0.5, 0.5)]], 64: [[(0.3, 0.6), (0.5, 0.6)]], 128: [[(0.2, 0.9), LOST]]}
    curves = fig04(table, epochs=2, seeds=(0, 1))
    assert [finding.text for finding in verdict("C4", {"fig04": curves}).findings] == [
        "fig04, base_lr 2^-8: training accuracy, mean over epochs, 50.00 %, 50.00 % at m = 4, 64 (5 points allowed)",
        "fig04, base_lr 2^-8: training accuracy, mean over epochs, 27.50 % at m = 128; lowest of m from 4 to 64 50.00 %",
    ]


def test_a_convergence_curve_is_taken_at_one_base_lr():
    table = {4: [0.9, 0.6], 64: [0.1, 0.6], 128: [0.9, 0.5]}
    assert verdict("C4", {"fig04": fig04(table, (2**-9, 2**-8))}).answer == "holds"


@pytest.mark.parametrize(
    ("counts", "answer"),
    [
        ((3, 2, 1), "holds"),
        ((2, 3, 1), "holds"),
        ((3, 1, 3, 0), "cannot tell"),  # m = 2 converges at the largest base_lr tried, so its limit is unknown
        ((2, 0, 2, 0), "does not hold"),
        ((2, 1, 2), "does not hold"),
        ((1, 2, 2), "does not hold"),
    ],
)
def test_a_range_may_widen_by_one_rate_on_its_way_down(counts, answer):
    table = {2**k: [0.5] * n + [LOST] * (3 - n) for k, n in enumerate(counts, 1)}
    assert verdict("C12", {"fig01": table}).answer == answer


def test_an_accuracy_within_the_noise_of_chance_does_not_converge():
    """The best accuracy, 12 % of 1,000 images, is 1.9 standard errors above chance."""
    table = {m: [0.11, 0.12, LOST] for m in (2, 8, 16)}
    assert texts("C12", {"fig01": study("fig01", table)}, "lacks data")[0] == "fig01: no base_lr converges at any batch size"


def test_two_studies_are_compared_at_the_base_lrs_that_both_have():
    """At the three base_lrs of both, warm-up gains 1 point; 2^-6, best without warm-up, was not tried with it."""
    table = {m: [0.3, 0.5, 0.4] for m in (4, 16, 128)}
    more = exact("fig08", {m: [0.3, 0.49, 0.4, 0.6, 0.3] for m in table}, (*LRS, 2**-6, 2**-5))
    told = next(text for text in texts("C7", {"fig10": table, "fig08": more}, "holds") if text.startswith("fig10 over fig08"))
    assert told.startswith("fig10 over fig08: +1.00 ± 0.0")
    apart = exact("fig08", {m: [0.5, 0.6] for m in table}, (2**-6, 2**-5))
    assert "fig10 and fig08 share no base_lr" in texts("C7", {"fig10": table, "fig08": apart}, "lacks data")


def test_where_every_run_diverged_no_base_lr_converges():
    """Like `cifar10_5000/resnet32_nobn`: no convergence from m = 16 on holds, learning at m = 2 … 8 does not."""
    found = verdict("C3", {"resnet32_nobn": dict.fromkeys((2, 8, 32), LOST)})
    assert [(finding.verdict, finding.text) for finding in found.findings[:2]] == [
        ("holds", "resnet32_nobn: converging base_lrs 0 at m = 32"),
        ("does not hold", "resnet32_nobn: converging base_lrs 0, 0 at m = 2, 8"),
    ]
    assert found.answer == "does not hold"
