"""The claims: what Masters & Luschi (2018) say in words of their experiments, and the checks that make up each.

A new claim is an entry of CLAIMS; a new kind of check is a function in checks.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from smallbatch_jax.study.claims import checks
from smallbatch_jax.study.claims.checks import AS_STATED, MOST, SIMILAR
from smallbatch_jax.study.claims.margins import Finding
from smallbatch_jax.study.claims.tables import Sizes


class Check(NamedTuple):
    """One check of a claim; `judge` takes the studies of `figures`, and raises NotEnoughData if their grids do not allow it."""

    figures: tuple[str, ...]
    judge: Callable[..., Finding]


class Claim(NamedTuple):
    """A claim of the paper in its own words.

    With `one_of`, groups of figures, it is judged as soon as a check about a figure of each group can be; otherwise, as soon as
    all its checks can be.
    """

    id: str  # "C1"
    where: str  # section and figures of the paper
    sentence: str  # quoted from there
    checks: tuple[Check, ...]
    one_of: tuple[tuple[str, ...], ...] = ()


def _check(judge: Callable[..., Finding], *figures: str, **given: Any) -> Check:
    return Check(figures, functools.partial(judge, **given))


WITHOUT_BN = ("fig01", "fig02", "fig03")
CIFAR10_WITH_BN = ("fig05", "fig06", "fig07", "fig08", "fig10")
CIFAR = (*WITHOUT_BN, *CIFAR10_WITH_BN[:4], "fig09", "fig10", "fig11")

CLAIMS = (
    Claim(
        "C1",
        "§3.2, Fig. 1",
        "… for the reduced AlexNet model, the best test accuracy is obtained for batch sizes m = 8 or smaller …",
        (_check(checks.best_is_at, "fig01", sizes=Sizes(1, 8)),),
    ),
    Claim(
        "C2",
        "§3.2, Figs. 2–3",
        "… for the ResNet models the best accuracy is obtained for batch sizes m = 4 and m = 2.",
        tuple(_check(checks.best_is_at, name, sizes=Sizes(2, 4)) for name in ("fig02", "fig03")),
    ),
    Claim(
        "C3",
        "§3.2",
        "… ResNet-32 without BN, for which all the CIFAR-10 experiments with base learning rate η̃ from 2^-12 to 2^0 and "
        "batch size from m = 16 to m = 2048 failed to converge, and learning was successful only for the cases of batch "
        "size m = 2, m = 4 and m = 8, with a best test performance of 76%.",
        (
            _check(checks.none_converges, "resnet32_nobn", sizes=Sizes(16)),
            _check(checks.each_converges, "resnet32_nobn", sizes=Sizes(2, 8)),
            _check(checks.has_accuracy, "resnet32_nobn", accuracy=0.76, tolerance=AS_STATED, images=50_000, epochs=82),
        ),
        one_of=(("resnet32_nobn",),),
    ),
    Claim(
        "C4",
        "§3.3, Fig. 4",
        "… we observe similar convergence for some of the curves corresponding to the same value of η̃ with batch sizes in "
        "the range 4 ≤ m ≤ 64, but with degraded training performance for larger batch sizes.",
        (
            _check(checks.curves_are_similar, "fig04", base_lr=2**-8, sizes=Sizes(4, 64)),
            _check(checks.curves_are_lower, "fig04", base_lr=2**-8, sizes=~Sizes(1, 64), than=Sizes(4, 64)),
        ),
    ),
    Claim(
        "C5",
        "§3.3, Figs. 1, 5–6",
        "… the use of BN provides a consistent improvement in test accuracy for a wide range of batch sizes, compared to "
        "the results without BN presented in Figure 1. … the best final performance is still obtained for batch sizes "
        "between m = 8 and m = 64, compared with best batch sizes between m = 4 and m = 32 for the case where BN is applied "
        "to only the convolutional layers (Figure 6). Both cases yield similar generalization performance.",
        (
            _check(checks.best_is_at, "fig05", sizes=Sizes(8, 64)),
            _check(checks.best_is_at, "fig06", sizes=Sizes(4, 32)),
            _check(checks.are_similar, "fig05", "fig06"),
            _check(checks.is_better, "fig05", "fig01"),
            _check(checks.is_better, "fig06", "fig01"),
        ),
    ),
    Claim(
        "C6",
        "§3.3, Figs. 7–9",
        "All results show a significant performance degradation for increasing values of the batch size, with the best "
        "results obtained for batch sizes m = 4 or m = 8. … a clear optimum value of base learning rate, which is only "
        "achievable for batch sizes m = 16 or smaller for CIFAR-10, and m = 8 or smaller for CIFAR-100.",
        (
            *(_check(checks.best_is_at, name, sizes=Sizes(4, 8)) for name in ("fig07", "fig08", "fig09")),
            *(_check(checks.best_base_lr_is_out_of_reach, name, sizes=~Sizes(1, 16)) for name in ("fig07", "fig08")),
            _check(checks.best_base_lr_is_out_of_reach, "fig09", sizes=~Sizes(1, 8)),
        ),
        one_of=(("fig07", "fig08", "fig09"),),
    ),
    Claim(
        "C7",
        "§3.4, Figs. 8–11",
        "… the use of the gradual warm-up strategy proposed in Goyal et al. (2017) generally improves the training "
        "performance. … For the CIFAR-10 results (Figure 10), the best test accuracy corresponds to batch sizes m = 4 and "
        "m = 8, although quite good results are maintained out to m = 128, while for CIFAR-100 (Figure 11) the best test "
        "performance is obtained for batch sizes between m = 4 and m = 16, with a steeper degradation for larger batch "
        "sizes.",
        (
            _check(checks.best_is_at, "fig10", sizes=Sizes(4, 8)),
            _check(checks.best_is_at, "fig10", sizes=Sizes(128, 128), tolerance=SIMILAR),
            _check(checks.best_is_at, "fig11", sizes=Sizes(4, 16)),
            _check(checks.falls_off_more, "fig11", "fig10", batch_size=128),
            _check(checks.improves_on, "fig10", "fig08"),
            _check(checks.improves_on, "fig11", "fig09"),
        ),
        one_of=(("fig10", "fig11"),),
    ),
    Claim(
        "C8",
        "§3.5, Fig. 12",
        "The best validation accuracy is obtained with batch sizes between m = 16 and m = 64. … Batch sizes m = 16 and m = 32 "
        "achieve the best performance over a continuous range of base learning rates, while the performance with larger batch "
        "sizes degrades … On the other hand, smaller batch sizes have shown stable and consistent convergence over the full "
        "range of learning rates.",
        (
            _check(checks.best_is_at, "fig12", sizes=Sizes(16, 64)),
            # smaller than the m = 16 and 32 of the sentence before
            _check(checks.every_base_lr_converges, "fig12", sizes=Sizes(1, 8)),
        ),
    ),
    Claim(
        "C9",
        "§3.6, Fig. 13",
        "The results reported in Figure 13 show a general performance improvement by reducing the overall batch size for "
        "the SGD weight updates … for the CIFAR-100 results, the best test accuracy for a given overall batch size is "
        "consistently obtained when even smaller batches are used for BN. … For example, a BN batch size m = 4 or m = 8 "
        "appears to give best results for all SGD batch sizes tested.",
        (
            _check(checks.best_bn_batch_is, "fig13_cifar100", sizes=~Sizes(1, 8)),
            # "consistently" is said of CIFAR-100 only
            _check(checks.best_bn_batch_is, "fig13_cifar100", bn_sizes=Sizes(4, 8), sizes=Sizes(16)),
            _check(checks.best_bn_batch_is, "fig13_cifar10", bn_sizes=Sizes(4, 8), sizes=Sizes(16), share=MOST),
            *(_check(checks.accuracy_falls, name) for name in ("fig13_cifar100", "fig13_cifar10")),
        ),
        one_of=(("fig13_cifar100", "fig13_cifar10"),),
    ),
    Claim(
        "C10",
        "§3.6, Fig. 14",
        "The results presented in Figure 14 show that the performance with BN generally improves by reducing the overall batch "
        "size for the SGD weight updates. … The plots also indicate that the best performance is obtained when smaller batches "
        "are used for BN in the range between 16 and 64, for all SGD batch sizes tested.",
        (
            _check(checks.best_bn_batch_is, "fig14", bn_sizes=Sizes(16, 64), sizes=Sizes(16)),
            _check(checks.accuracy_falls, "fig14"),
        ),
    ),
    Claim(
        "C11",
        "§4, Fig. 15; §5",
        "The curves show that the best test performance is always achieved with a batch size below m = 32. In the cases "
        "without BN, the performance is seen to continue to improve down to batch size m = 2. … In all cases the best "
        "results have been obtained with batch sizes m = 32 or smaller …",
        (
            # m = 32 itself is included: §4 says "below m = 32", §5 "m = 32 or smaller"
            *(_check(checks.best_is_at, name, sizes=Sizes(1, 32)) for name in (*WITHOUT_BN, *CIFAR10_WITH_BN)),
            *(_check(checks.accuracy_falls, name, sizes=Sizes(1, 32)) for name in WITHOUT_BN),
        ),
        one_of=(WITHOUT_BN, CIFAR10_WITH_BN),
    ),
    Claim(
        "C12",
        "§4, Fig. 16",
        "The results show that increasing the batch size progressively reduces the range of learning rates that provide "
        "stable convergence.",
        tuple(_check(checks.range_narrows, name) for name in CIFAR),
        one_of=(CIFAR,),
    ),
    Claim(
        "C13",
        "App. A, Figs. 8, 17–18",
        "The collected results show a consistent performance improvement for increasing training length. … for the base "
        "learning rates corresponding to the best test accuracy, the benefits of longer training are important mainly for "
        "large batch sizes … Even increasing the training length, and therefore the total computational cost, the "
        "performance of large batch training remains inferior compared to the small batch performance.",
        (
            _check(checks.improves_on, "fig18", "fig17"),
            _check(checks.improves_on, "fig18", "fig08"),
            _check(checks.improves_on, "fig08", "fig17"),
            _check(checks.gains_more, "fig18", "fig17", sizes=Sizes(128), than=Sizes(1, 16)),
            _check(checks.best_is_at, "fig18", sizes=Sizes(1, 16), than=Sizes(128)),
        ),
        one_of=(("fig17",), ("fig18",)),  # half and double the length; Fig. 8 lies between
    ),
)
