"""Tests each claim on stored results: when it holds, which of its checks fail, and which data it lacks."""

import dataclasses
import functools

import pytest
from claimed import CLAIMS, LOST, exact, failing, fig04, fig13, fig14, studies, study, texts, verdict

from smallbatch_jax.study import claims

# A peak at the second base_lr, which only m = 4 and 16 reach.
PEAK = {4: [0.5, 0.6, LOST], 16: [0.5, 0.55, LOST], 32: [0.5, 0.4, LOST], 64: [LOST, LOST, LOST]}
PEAK_CIFAR100 = {2: [0.5, 0.55, LOST], 4: [0.5, 0.6, LOST], 8: [0.5, 0.58, LOST], 16: [0.5, 0.4, LOST]}
# m = 2 and 8 converge at every base_lr, m = 16 is best.
IMAGENET = {2: [0.5, 0.6, 0.5], 8: [0.5, 0.65, 0.5], 16: [0.6, 0.7, LOST], 64: [0.69, LOST, 0.3], 128: [0.6, LOST, LOST]}
NARROW = {2: [0.5, 0.5, 0.5], 8: [0.5, 0.5, LOST], 32: [0.5, LOST, LOST]}
WIDE = {2: [0.5, 0.5, LOST], 8: [0.5, 0.5, LOST], 32: [0.5, 0.5, LOST]}
SMALLEST = {2: 0.6, 8: 0.58, 32: 0.55, 64: 0.5, 128: 0.4}
FIG15 = ("fig01", "fig02", "fig03", "fig05", "fig06", "fig07", "fig08", "fig10")
FIG16 = ("fig01", "fig02", "fig03", "fig05", "fig06", "fig07", "fig08", "fig09", "fig10", "fig11")

HOLDS = {
    "C1": {"fig01": {2: 0.5, 8: 0.49, 16: 0.4, 64: 0.3}},
    "C2": {"fig02": {2: 0.5, 8: 0.4, 32: 0.3}, "fig03": {1: 0.4, 4: 0.5, 16: 0.4}},
    "C3": {"resnet32_nobn": {2: 0.74, 4: 0.6, 8: 0.5, 16: LOST, 32: 0.1}},
    "C4": {"fig04": fig04({2: 0.3, 4: 0.60, 64: 0.57, 128: 0.5})},
    "C5": {
        "fig01": {2: 0.4, 4: 0.5, 8: 0.5, 128: 0.3, 256: 0.2},
        "fig05": {2: 0.41, 4: 0.45, 8: 0.60, 128: 0.4, 256: 0.3},
        "fig06": {2: 0.41, 4: 0.61, 8: 0.45, 128: 0.4, 256: 0.3},
    },
    "C6": {"fig07": PEAK, "fig08": PEAK, "fig09": PEAK_CIFAR100},
    "C7": {
        "fig10": {2: 0.80, 4: 0.90, 16: 0.89, 128: 0.885},
        "fig08": {2: 0.79, 4: 0.89, 16: 0.88, 128: 0.86},
        "fig11": {2: 0.50, 8: 0.60, 32: 0.58, 128: 0.50},
        "fig09": {2: 0.49, 8: 0.59, 32: 0.57, 128: 0.49},
    },
    "C8": {"fig12": IMAGENET},
    "C9": {
        "fig13_cifar100": fig13("cifar100", {2: {2: 0.7}, 16: {4: 0.6}, 32: {8: 0.56, 16: 0.55}, 64: {4: 0.5}}),
        "fig13_cifar10": fig13("cifar10", {2: {2: 0.9}, 16: {4: 0.8}, 32: {32: 0.7}, 64: {16: 0.65}, 128: {8: 0.6}}),
    },
    "C10": {"fig14": fig14({16: {16: 0.76}, 32: {16: 0.75}, 256: {64: 0.74, 128: 0.73}, 2048: {32: 0.7, 256: LOST}})},
    "C11": dict.fromkeys(FIG15, SMALLEST),
    "C12": dict.fromkeys(FIG16, NARROW),
    "C13": {
        "fig17": {2: 0.50, 16: 0.60, 128: 0.40, 256: 0.30},
        "fig08": {2: 0.52, 16: 0.61, 128: 0.45, 256: 0.35},
        "fig18": {2: 0.53, 16: 0.62, 128: 0.50, 256: 0.40},
    },
}
FAILS = [  # claim, replaced studies, indices of the checks that fail
    ("C1", {"fig01": {2: 0.4, 8: 0.49, 16: 0.5}}, {0}),
    ("C2", {"fig02": {2: 0.5, 8: 0.6}}, {0}),
    ("C2", {"fig03": {1: 0.6, 4: 0.5, 16: 0.4}}, {1}),
    ("C3", {"resnet32_nobn": {2: 0.74, 4: 0.6, 8: 0.5, 16: 0.5, 32: LOST}}, {0}),
    ("C3", {"resnet32_nobn": {2: 0.74, 4: 0.6, 8: LOST, 16: LOST}}, {1}),
    ("C3", {"resnet32_nobn": {2: 0.729, 4: 0.6, 8: 0.5, 16: LOST}}, {2}),
    ("C3", {"resnet32_nobn": {2: 0.791, 4: 0.6, 8: 0.5, 16: LOST}}, {2}),
    ("C4", {"fig04": fig04({4: 0.60, 64: 0.53, 128: 0.5})}, {0}),
    ("C4", {"fig04": fig04({2: 0.3, 4: 0.6, 64: LOST, 128: 0.2})}, {0, 1}),
    ("C4", {"fig04": fig04({4: 0.60, 64: 0.57, 128: 0.4, 256: 0.59})}, {1}),
    ("C5", {"fig05": {2: 0.41, 4: 0.45, 8: 0.60, 128: 0.61, 256: 0.3}}, {0}),
    ("C5", {"fig06": {2: 0.41, 4: 0.60, 8: 0.45, 128: 0.61, 256: 0.3}}, {1}),
    ("C5", {"fig06": {2: 0.41, 4: 0.63, 8: 0.45, 128: 0.4, 256: 0.3}}, {2}),
    ("C5", {"fig05": {2: 0.3, 4: 0.45, 8: 0.60, 128: 0.2, 256: 0.3}}, {3}),
    ("C5", {"fig06": {2: 0.3, 4: 0.61, 8: 0.45, 128: 0.2, 256: 0.3}}, {4}),
    *(("C6", {name: PEAK | {16: [0.5, 0.65, LOST]}}, {i}) for i, name in enumerate(("fig07", "fig08"))),
    ("C6", {"fig09": PEAK_CIFAR100 | {2: [0.5, 0.65, LOST]}}, {2}),
    *(("C6", {name: PEAK | {32: [0.5, 0.54, LOST]}}, {i}) for i, name in enumerate(("fig07", "fig08"), 3)),
    ("C6", {"fig09": PEAK_CIFAR100 | {16: [0.5, 0.54, LOST]}}, {5}),
    ("C6", {"fig09": PEAK_CIFAR100 | {16: [0.5, 0.4, 0.54]}}, {5}),
    ("C7", {"fig10": {2: 0.80, 4: 0.90, 16: 0.91, 128: 0.90}}, {0}),
    ("C7", {"fig10": {2: 0.80, 4: 0.90, 16: 0.89, 128: 0.87}}, {1}),
    ("C7", {"fig11": {2: 0.50, 8: 0.60, 32: 0.61, 128: 0.5}}, {2}),
    ("C7", {"fig11": {2: 0.50, 8: 0.60, 32: 0.59, 128: 0.59}}, {3}),
    ("C7", {"fig08": {2: 0.81, 4: 0.91, 16: 0.90, 128: 0.89}}, {4}),
    ("C7", {"fig09": {2: 0.51, 8: 0.61, 32: 0.59, 128: 0.50}}, {5}),
    ("C8", {"fig12": IMAGENET | {128: [0.71, LOST, LOST]}}, {0}),
    ("C8", {"fig12": IMAGENET | {4: [0.71, 0.5, 0.5]}}, {0}),
    ("C8", {"fig12": IMAGENET | {8: [0.5, 0.65, LOST]}}, {1}),
    ("C8", {"fig12": IMAGENET | {2: [0.3, 0.6, 0.5]}}, {1}),  # finishes, but below halfway from chance to the best
    ("C9", {"fig13_cifar100": fig13("cifar100", {2: {2: 0.7}, 16: {16: 0.6}, 32: {8: 0.56}, 64: {8: 0.5}})}, {0, 1}),
    ("C9", {"fig13_cifar100": fig13("cifar100", {2: {2: 0.7}, 16: {2: 0.6}, 32: {8: 0.56}, 64: {8: 0.5}})}, {1}),
    ("C9", {"fig13_cifar10": fig13("cifar10", {2: {2: 0.9}, 16: {4: 0.8}, 32: {32: 0.7}, 64: {16: 0.65}})}, {2}),
    ("C9", {"fig13_cifar100": fig13("cifar100", {2: {2: 0.4}, 16: {4: 0.6}, 32: {8: 0.56}, 64: {4: 0.5}})}, {3}),
    ("C9", {"fig13_cifar10": fig13("cifar10", {2: {2: 0.6}, 16: {4: 0.8}, 32: {8: 0.7}})}, {4}),
    ("C10", {"fig14": fig14({16: {16: 0.76}, 32: {8: 0.75}, 256: {64: 0.74}})}, {0}),
    ("C10", {"fig14": fig14({16: {16: 0.76}, 32: {16: 0.75}, 256: {64: 0.74, 128: 0.745}})}, {0}),
    ("C10", {"fig14": fig14({16: {16: 0.7}, 32: {16: 0.71}, 256: {64: 0.74}})}, {1}),
    ("C11", {"fig01": SMALLEST | {64: 0.61}}, {0}),
    ("C11", {"fig03": SMALLEST | {2: 0.5, 8: 0.55}}, {10}),
    ("C12", {"fig01": WIDE}, {0}),
    ("C13", {"fig17": {2: 0.7, 16: 0.7, 128: 0.42, 256: 0.32}}, {0, 2}),
    ("C13", {"fig08": {2: 0.6, 16: 0.7, 128: 0.5, 256: 0.4}}, {1}),
    ("C13", {"fig17": {2: 0.4, 16: 0.5, 128: 0.44, 256: 0.34}}, {3}),
    ("C13", {"fig18": {2: 0.53, 16: 0.62, 128: 0.64, 256: 0.4}}, {4}),
]
SAME_CHECKS = [  # the same for the other figures of claims about all figures
    *(("C11", {name: SMALLEST | {64: 0.61}}, {i}) for i, name in enumerate(FIG15) if i > 0),
    *(("C11", {name: SMALLEST | {2: 0.5, 8: 0.55}}, {i}) for i, name in enumerate(FIG15[:2], 8)),
    *(("C12", {name: WIDE}, {i}) for i, name in enumerate(FIG16) if i > 0),
]
# Studies that each claim needs, for claims that may be judged in part; the others need all of theirs.
NEEDS = {"C3": ("resnet32_nobn",), "C6": (), "C7": (), "C9": (), "C11": (), "C12": (), "C13": ("fig17", "fig18")}


def needed(claim):
    """Returns (claim, study) for each study; of more than four, which are examined alike, all but the ends are slow."""
    names = list(HOLDS[claim])
    few = names if len(names) <= 4 else (names[0], names[-1])
    return [pytest.param(claim, name, marks=[] if name in few else pytest.mark.slow) for name in names]


NEEDED = [case for claim in HOLDS for case in needed(claim)]


@functools.cache
def holding(claim):
    """Returns the studies for which a claim holds."""
    return studies(HOLDS[claim])


def without(claim, name):
    """Returns the answer when one of the studies for which a claim holds is missing or incomplete."""
    return "lacks data" if name in NEEDS.get(claim, HOLDS[claim]) else "holds"


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_holds_where_all_its_parts_do(claim):
    found = verdict(claim, holding(claim))
    assert found.answer == "holds"
    assert len(found.findings) == len(CLAIMS[claim].checks)
    assert found.margin > 2 or claim == "C12"


@pytest.mark.parametrize(
    ("claim", "instead", "parts"), [*FAILS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SAME_CHECKS)]
)
@pytest.mark.long
def test_a_claim_does_not_hold_where_one_part_fails(claim, instead, parts):
    tables = holding(claim) | instead
    assert failing(claim, tables) == parts
    assert verdict(claim, tables).answer == "does not hold"


def test_every_part_was_seen_to_fail():
    seen = {(claim, part) for claim, _, parts in [*FAILS, *SAME_CHECKS] for part in parts}
    assert seen == {(claim.id, i) for claim in claims.CLAIMS for i in range(len(claim.checks))}


@pytest.mark.parametrize(("claim", "name"), NEEDED)
@pytest.mark.long
def test_a_run_that_has_not_ended_leaves_a_claim_open(claim, name):
    whole = holding(claim)[name]
    cells = whole.cells.copy()
    cells.loc[0, ["finished", "diverged", "pending"]] = (0, 0, 1)
    tables = holding(claim) | {name: dataclasses.replace(whole, cells=cells)}
    assert texts(claim, tables, "lacks data") == [f"{name}: 1 of {len(cells)} runs have not ended"]
    assert verdict(claim, tables).answer == without(claim, name)


@pytest.mark.parametrize(("claim", "name"), NEEDED)
@pytest.mark.long
def test_a_missing_study_leaves_a_claim_open_and_is_named_once(claim, name):
    tables = {k: v for k, v in holding(claim).items() if k != name}
    assert texts(claim, tables, "lacks data") == [f"{name} is not among the workdirs"]
    found = verdict(claim, tables)
    assert found.answer == without(claim, name)
    assert found.shown == "lacks data" or found.shown.endswith(", in part")


@pytest.mark.parametrize(
    ("claim", "names", "answer"),
    [
        ("C6", ("fig09",), "holds"),
        ("C7", ("fig10",), "holds"),
        ("C9", ("fig13_cifar10",), "holds"),
        ("C11", ("fig02", "fig10"), "holds"),
        ("C11", ("fig01", "fig02"), "lacks data"),
        ("C11", ("fig05",), "lacks data"),
        ("C12", ("fig09",), "holds"),
        ("C12", (), "lacks data"),
        ("C13", ("fig17", "fig18"), "holds"),
    ],
)
def test_a_claim_about_several_figures_takes_those_that_are_there(claim, names, answer):
    found = verdict(claim, {name: holding(claim)[name] for name in names})
    assert found.answer == answer
    missing = [name for name in HOLDS[claim] if name not in names]
    assert all(name in found.findings[-1].text for name in missing)


def test_a_part_that_fails_decides_whatever_else_is_missing():
    assert verdict("C2", {"fig02": {2: 0.5, 8: 0.6}}).answer == "does not hold"
    assert verdict("C2", {"fig02": {2: 0.5, 8: 0.4, 32: 0.3}}).answer == "lacks data"


@pytest.mark.parametrize(
    ("claim", "name", "instead", "lack"),
    [
        ("C1", "fig01", {2: 0.5, 8: 0.4}, "fig01 has no batch size above 8"),
        ("C1", "fig01", {16: 0.5, 32: 0.4}, "fig01 has no batch size up to 8"),
        ("C1", "fig01", {2: LOST, 16: LOST}, "no run of fig01 finished"),
        ("C2", "fig02", {2: 0.5, 4: 0.4}, "fig02 has no batch size below 2 or above 4"),
        ("C2", "fig02", {8: 0.5, 16: 0.4}, "fig02 has no batch size from 2 to 4"),
        ("C3", "resnet32_nobn", {2: 0.74, 8: 0.4}, "resnet32_nobn has no batch size from 16 on"),
        (
            "C3",
            "resnet32_nobn",
            study("resnet32_nobn", {2: 0.7, 16: LOST}),
            "the paper's 76 % is of 50,000 images and 82 epochs",
        ),
        ("C4", "fig04", fig04({4: 0.6, 64: 0.6, 128: 0.5}, (2**-9,)), "fig04 has no finished run at base_lr 2^-8"),
        ("C4", "fig04", fig04({2: 0.6, 64: 0.6, 128: 0.5}), "fig04 has 1 batch size from 4 to 64, 2 are needed"),
        ("C4", "fig04", fig04({4: 0.6, 64: 0.6}), "fig04 has no batch size above 64"),
        ("C5", "fig01", {16: 0.4, 128: 0.3}, "fig05 and fig01 share 1 batch size, 2 are needed"),
        ("C6", "fig09", {4: [0.5, 0.6, 0.4], 2: [0.5, 0.5, 0.5]}, "finished at no batch size above 8"),
        ("C6", "fig07", exact("fig07", {4: 0.6, 32: 0.5}, lrs=(0.5,)), "fig07 has batch sizes of one base_lr"),
        ("C7", "fig10", {4: 0.9, 16: 0.89, 64: 0.88}, "fig10 has no batch size = 128"),
        ("C7", "fig08", study("fig08", {4: 0.5}), "fig10 and fig08 differ in their model or number of training images"),
        ("C7", "fig08", {4: LOST, 16: LOST, 256: 0.5}, "fig10 and fig08 share finished runs at no batch size"),
        ("C8", "fig12", {2: [0.5, 0.6, 0.5], 8: [0.5, 0.5, 0.5]}, "fig12 has no batch size from 16 to 64"),
        ("C8", "fig12", {16: [0.5, 0.6, 0.5], 64: [0.5, 0.5, 0.5]}, "fig12 has no batch size below 16 or above 64"),
        ("C8", "fig12", {16: [0.5, 0.6, 0.5], 128: [0.5, 0.5, 0.5]}, "fig12 has no batch size up to 8"),
        ("C8", "fig12", study("fig12", {8: 0.5, 16: 0.6}, lrs=(0.5,)), "fig12 has batch sizes of one base_lr"),
        (
            "C9",
            "fig13_cifar10",
            fig13("cifar10", {2: {2: 0.9}, 4: {2: 0.8}, 8: {2: 0.7}}),
            "fig13_cifar10 has BN batches from 4 to 8 and others at no batch size from 16 on",
        ),
        (
            "C9",
            "fig13_cifar100",
            study("fig13_cifar100", {16: {2: 0.9}, 32: {4: 0.8}, 64: {4: 0.7}}, lrs=(0.5,), bn=(2, 4)),
            "fig13_cifar100 has BN batches below m and others at no batch size above 8",
        ),
        (
            "C9",
            "fig13_cifar10",
            fig13("cifar10", {16: {4: 0.5}, 32: {8: 0.4}}),
            "fig13_cifar10 has 2 batch sizes, 3 are needed",
        ),
        (
            "C10",
            "fig14",
            study("fig14", {16: {2: 0.7}, 32: {4: 0.6}, 64: {8: 0.5}}, lrs=(0.5,), bn=(2, 4, 8)),
            "fig14 has BN batches from 16 to 64 and others at no batch size from 16 on",
        ),
        ("C10", "fig14", fig14({16: {16: 0.7}, 32: {16: 0.6}}), "fig14 has 2 batch sizes, 3 are needed"),
        ("C11", "fig01", {2: 0.6, 32: 0.5, 64: 0.4}, "fig01 has 2 batch sizes up to 32, 3 are needed"),
        ("C12", "fig05", {2: [0.5, 0.5, 0.5], 8: [0.5, LOST, LOST]}, "fig05 has 2 batch sizes, 3 are needed"),
        ("C12", "fig05", {2: 0.1, 8: 0.1, 16: 0.1}, "fig05: no base_lr converges at any batch size"),
        ("C12", "fig05", study("fig05", {2: 0.5, 8: 0.4, 16: LOST}, lrs=(0.5,)), "fig05 has batch sizes of one base_lr"),
        ("C13", "fig08", {4: 0.5, 32: 0.4}, "fig18 and fig08 share finished runs at no batch size"),
        ("C13", "fig17", {2: 0.5, 16: 0.6, 128: LOST}, "fig18 and fig17 share finished runs at no batch size from 128 on"),
    ],
)
@pytest.mark.long
def test_a_grid_that_lacks_what_is_compared_leaves_a_claim_open(claim, name, instead, lack):
    tables = holding(claim) | {name: instead}
    assert any(text.endswith(lack) for text in texts(claim, tables, "lacks data"))
    assert claim in NEEDS or failing(claim, tables) or verdict(claim, tables).answer == "lacks data"


def test_a_batch_size_of_which_every_run_diverged_is_as_good_as_a_guess():
    assert verdict("C1", {"fig01": {2: 0.2, 16: LOST}}).answer == "holds"
    assert verdict("C1", {"fig01": {2: 0.1, 16: LOST}}).answer == "cannot tell"
    assert texts("C1", {"fig01": {2: LOST, 16: 0.2}}, "does not hold") == [
        "fig01: m up to 8 (tried: 2) reach nothing (every run at m = 2 diverged); "
        "the others 20.00 % at m = 16 (base_lr 2^-8, m the largest tried)"
    ]
    assert failing("C7", holding("C7") | {"fig10": {2: 0.8, 4: 0.9, 16: 0.89, 128: LOST}}) == {1, 3}


def test_an_sgd_batch_of_which_every_run_diverged_has_no_best_bn_batch_but_falls():
    lost = dict.fromkeys((2, 4, 8, 16, 32, 64), LOST)
    table = {2: {2: 0.7}, 16: {4: 0.6}, 32: {4: 0.5}, 64: lost}
    tables = holding("C9") | {"fig13_cifar100": fig13("cifar100", table)}
    assert verdict("C9", tables).answer == "holds"
    assert texts("C9", tables, "holds")[0] == (
        "fig13_cifar100: the best BN batch is below m at 2 of 2 batch sizes (4, 4 at m = 16, 32)"
    )
    risen = {2: lost, 16: {4: 0.5}, 32: {4: 0.6}}
    assert failing("C9", holding("C9") | {"fig13_cifar100": fig13("cifar100", risen)}) == {3}
