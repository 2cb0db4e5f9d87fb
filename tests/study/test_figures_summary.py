"""Tests Figs. 15 and 16, which compare studies and mark provisional results."""

import io
import math
from pathlib import Path

import asked
import numpy as np
import pytest
from drawn import bars, cell, curves, foot, missing, placed, results, table, tick_texts

from smallbatch_jax.config.experiment import InputError
from smallbatch_jax.study import figures
from smallbatch_jax.study.analysis import CONVERGENCE_RULE
from smallbatch_jax.study.figures.labels import paper_labels
from smallbatch_jax.study.study import Study


def study(*cells, name="exp", num_classes=10, workdir="runs/exp", **fields):
    """Returns a study with the given cells, regardless of its experiment's grid; cells without an ended seed have no rows."""
    chosen, cells = asked.experiment(name=name, **fields), table(*cells).assign(experiment=name)
    rows = results(cells[cells["finished"] + cells["diverged"] > 0])
    return Study(Path(workdir), chosen, rows, cells, num_classes, (50, 20))


def network(model, norm, augment=False, warmup=0.0, dataset="cifar10", **more):
    names = {"model__name": model, "model__norm": norm, "dataset__name": dataset, "dataset__augment": augment}
    return study(cell(2, 0.5, 0.5), **names, schedule__warmup_fraction=warmup, **more)


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        (("resnet50", "batch", True, 0.0, "imagenet2012"), "ResNet-50, BN, Aug"),
        (("alexnet", "none"), "AlexNet, noBN, noAug"),
        (("alexnet", "batch_conv_only"), "AlexNet, BN conv only, noAug"),
        (("resnet8", "none"), "ResNet-8, noBN, noAug"),
        (("resnet20", "group"), "ResNet-20, GN, noAug"),
        (("resnet32", "batch", True), "ResNet-32, BN, Aug"),
        (("resnet32", "batch_renorm", True, 0.05), "ResNet-32, BRN, Aug, WU"),
        (("own:$Net$", "none"), r"\$Net\$, noBN, noAug"),
    ],
)
def test_studies_are_labelled_as_in_the_paper(arguments, label):
    assert paper_labels([network(*arguments)]) == [label]


def test_labels_name_the_dataset_or_the_experiment_only_where_they_must():
    bn, other = network("resnet32", "batch", name="fig07"), network("alexnet", "none", name="fig01")
    longer, hundred = network("resnet32", "batch", name="fig18"), network("resnet32", "batch", dataset="cifar100")
    assert paper_labels([bn, other]) == ["ResNet-32, BN, noAug", "AlexNet, noBN, noAug"]
    assert paper_labels([bn, other, longer])[::2] == ["ResNet-32, BN, noAug (fig07)", "ResNet-32, BN, noAug (fig18)"]
    assert paper_labels([bn, hundred]) == ["CIFAR-10, ResNet-32, BN, noAug", "CIFAR-100, ResNet-32, BN, noAug"]
    folder = network("alexnet", "none", dataset="folder", dataset__data_dir="/data/wine")
    beer = network("alexnet", "none", dataset="folder", dataset__data_dir="/data/beer/")
    assert paper_labels([folder, other]) == ["wine, AlexNet, noBN, noAug", "CIFAR-10, AlexNet, noBN, noAug"]
    assert paper_labels([folder, beer]) == ["wine, AlexNet, noBN, noAug", "beer, AlexNet, noBN, noAug"]


@pytest.fixture
def alexnet():
    """Returns a study: m = 2 is done with its best at 0.5, m = 4 provisional, m = 8 without a finished run, m = 16 done."""
    cells = [
        cell(2, 0.25, 0.7, std=0.05, finished=2),
        cell(2, 0.5, 0.8, std=0.02, finished=2),
        cell(4, 0.25, 0.6, finished=1),
        missing(4, 0.5, pending=2),
        cell(8, 0.25, math.nan, finished=0, diverged=2),
        missing(8, 0.5, pending=2),
        cell(16, 0.25, 0.3, finished=2),
    ]
    return study(*cells, name="fig01", dataset__name="cifar10")


@pytest.fixture
def resnet():
    """Returns a study of m = 2 and 16 only; at m = 16 one seed of the best cell diverged."""
    names = {"name": "fig08", "model__name": "resnet32", "model__norm": "batch", "dataset__name": "cifar10"}
    return study(cell(2, 0.5, 0.9), cell(16, 0.5, 0.5, diverged=1), cell(16, 1.0, 0.4), **names)


ALEXNET, RESNET = "AlexNet, noBN, noAug", "ResNet-32, BN, noAug"


def test_best_accuracy_has_one_curve_per_study(alexnet, resnet):
    """A line breaks where nothing has finished, and continues across a batch size that is not planned."""
    figure = figures.best_accuracy([alexnet, resnet])
    drawn = curves(figure)
    assert list(drawn) == [ALEXNET, RESNET]
    np.testing.assert_array_equal(drawn[ALEXNET], [[2, 4, 8, 16], [80, 60, math.nan, 30]])
    np.testing.assert_array_equal(drawn[RESNET], [[2, 16], [90, 50]])
    assert bars(figure) == {2: (78, 82)}
    axes = figure.axes[0]
    assert axes.get_title() == "CIFAR-10: best test accuracy"
    assert axes.get_xscale() == "log"
    assert tick_texts(axes.xaxis) == ["2", "4", "8", "16"]


def test_best_accuracy_on_imagenet_is_the_papers_top_1_validation_accuracy(resnet):
    imagenet = network("resnet50", "batch", True, name="fig12", dataset="imagenet2012")
    axes = figures.best_accuracy([imagenet]).axes[0]
    assert axes.get_title() == "ImageNet: best top-1 validation accuracy"
    assert axes.get_ylabel() == "top-1 validation accuracy (%)"
    figure = figures.best_accuracy([imagenet, resnet])
    assert list(curves(figure)) == ["ImageNet, ResNet-50, BN, Aug", f"CIFAR-10, {RESNET}"]
    assert (figure.axes[0].get_title(), figure.axes[0].get_ylabel()) == ("best test accuracy", "test accuracy (%)")


@pytest.mark.parametrize(
    ("dataset", "metric"), [("imagenet2012", "top-1 validation"), ("cifar100", "test"), ("own:imagenet2012", "test")]
)
def test_the_figures_of_a_study_call_the_accuracy_what_the_paper_calls_it(dataset, metric, monkeypatch):
    """A grid like that of Fig. 12 and one like that of Fig. 14 are drawn like Figs. 7–9 and 13."""
    drawn = {}
    monkeypatch.setattr(figures.style, "write", lambda figure, stem: [drawn.setdefault(stem, figure) and stem])
    grid = [cell(m, lr, 0.7, std=0.01, finished=2) for m in (16, 32) for lr in (0.25, 0.5)]
    bn = [cell(m, m / 64, 0.7, bn_batch_size=b) for m in (16, 32) for b in (8, 16)]
    names = {"dataset__name": dataset, "model__name": "resnet50", "model__norm": "batch"}
    studies = [study(*cells, name=name, workdir=name, **names) for name, cells in (("fig12", grid), ("fig14", bn))]
    for each in studies:
        figures.draw_studies([each])
    labels = {path.as_posix().replace("/figures/", " "): figure.axes[-1].get_ylabel() for path, figure in drawn.items()}
    curves_of = [f"fig12 {stem}" for stem in ("accuracy_vs_batch_size", "accuracy_vs_base_lr", "heat_map")]
    assert labels == dict.fromkeys([*curves_of, "fig14 accuracy_vs_bn_batch_size"], f"{metric} accuracy (%)") | {
        f"{name} convergence": "" for name in ("fig12", "fig14")
    }
    convergence = drawn[Path("fig12/figures/convergence")]
    assert [axes.get_title() for axes in convergence.axes] == ["training", metric]
    assert convergence.axes[0].get_ylabel() == "accuracy (%)"
    assert convergence.get_suptitle() == r"fig12, $\tilde{\eta} = 2^{-2}$"
    assert bars(drawn[Path("fig12/figures/accuracy_vs_base_lr")]) == {0.25: (69, 71), 0.5: (69, 71)}


def test_best_accuracy_is_hollow_while_runs_of_its_batch_size_are_pending(alexnet, resnet):
    figure = figures.best_accuracy([alexnet, resnet])
    np.testing.assert_allclose(placed(figure, markerfacecolor="white"), [[4, 60], [16, 50]])
    np.testing.assert_allclose(placed(figure, marker="x"), [[16, 50]])
    labels = [ALEXNET, RESNET, "some seeds of the best diverged", "provisional (runs pending)"]
    assert foot(figure) == ("4 of 17 runs not finished", labels)


def test_best_accuracy_names_a_study_of_which_nothing_has_finished(resnet):
    figure = figures.best_accuracy([study(missing(2, 0.5), name="fig01", dataset__name="cifar10"), resnet])
    assert list(curves(figure)) == [RESNET]
    assert foot(figure)[1][0] == f"{ALEXNET} (none yet)"


@pytest.mark.parametrize("draw", [figures.best_accuracy, figures.convergent_base_lrs])
def test_no_studies_are_refused_in_one_line(draw):
    with pytest.raises(ValueError, match=r"^studies: got none, accepts one or more\.$"):
        draw([])


def test_best_accuracy_leaves_out_bn_batch_sizes_other_than_m():
    varied = study(cell(4, 0.5, 0.9, bn_batch_size=2), cell(4, 0.5, 0.6))
    figure = figures.best_accuracy([varied])
    np.testing.assert_allclose(curves(figure)[ALEXNET][1], [60])
    assert foot(figure)[1] == [f"{ALEXNET} (BN batch size = $m$)"]


def test_many_studies_have_looks_of_their_own():
    many = [network("alexnet", "none", name=f"fig{i:02}") for i in range(1, 12)]
    lines = [line for line in figures.best_accuracy(many).axes[0].get_lines() if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 11


@pytest.fixture
def ranges():
    """Returns a study that converges at m = 2 except at 0.25, at m = 4 up to 0.25 so far, never at m = 8, not yet at m = 16."""
    nan = math.nan
    by_size = {2: [0.8, 0.1, 0.9], 4: [0.8, 0.7, None], 8: [0.1, nan, nan], 16: [nan, None, None]}
    cells = []
    for m, accuracies in by_size.items():
        for base_lr, accuracy in zip((0.125, 0.25, 0.5), accuracies, strict=True):
            lost = accuracy is not None and math.isnan(accuracy)
            cells.append(
                missing(m, base_lr) if accuracy is None else cell(m, base_lr, accuracy, finished=not lost, diverged=int(lost))
            )
    return study(*cells, dataset__name="cifar10")


def bar_colors(figure):
    """Returns the colour of each kind of bar in the figure, by label."""
    return {c.get_label(): tuple(c.get_color()[0]) for c in figure.axes[0].collections if len(c.get_segments())}


def test_ranges_are_bars_from_the_lowest_to_the_highest_converging_base_lr(ranges):
    figure = figures.convergent_base_lrs([ranges])
    axes = figure.axes[0]
    assert bars(figure) == {2: (0.125, 0.5), 4: (0.125, 0.25)}
    np.testing.assert_array_equal(placed(figure, marker="o", markerfacecolor="#08519C"), [[2, 0.125], [2, 0.5]])
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert tick_texts(axes.yaxis) == ["$2^{-3}$", "$2^{-2}$", "$2^{-1}$"]
    assert axes.get_title() == ALEXNET
    assert " ".join(foot(figure)[0].split()) == f"{CONVERGENCE_RULE} 3 of 12 runs not finished"


def test_ranges_are_lighter_and_hollow_while_runs_are_pending(ranges):
    figure = figures.convergent_base_lrs([ranges])
    np.testing.assert_array_equal(placed(figure, marker="o", markerfacecolor="white"), [[4, 0.125], [4, 0.25]])
    colors = bar_colors(figure)
    assert sum(colors["provisional (runs pending)"]) > sum(colors["converging"])


def test_batch_sizes_without_a_range_are_marked_below_the_grid(ranges):
    figure = figures.convergent_base_lrs([ranges])
    np.testing.assert_array_equal(placed(figure, marker="x"), [[8, 0.0625]])
    np.testing.assert_array_equal(placed(figure, marker="."), [[16, 0.0625]])
    marks = ["converging", "provisional (runs pending)", "none converges", "none yet", "limits of the grid"]
    assert foot(figure)[1] == marks


def test_limits_of_the_grid_are_those_of_each_study_and_batch_size(ranges):
    """A bar that ends at the highest base_lr of its grid touches the line; each m may have a grid of its own."""
    own = study(cell(2, 0.25, 0.9), cell(2, 0.5, 0.9), cell(16, 1.0, 0.9), cell(16, 2.0, 0.8), name="own")

    def limits(panel):
        lines = {line.get_label(): line for line in figure.axes[panel].get_lines()}
        return [lines[label].get_ydata()[1:-1].tolist() for label in ("_min", "_max")]

    figure = figures.convergent_base_lrs([ranges, own])
    assert limits(0) == [[0.125] * 4, [0.5] * 4]
    assert limits(1) == [[0.25, 1.0], [0.5, 2.0]]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


@pytest.mark.parametrize(("num_classes", "converging"), [(10, {2: (0.25, 0.5)}), (2, {2: (0.25, 0.25)})])
def test_convergence_is_judged_by_the_studys_own_chance(num_classes, converging):
    """Halfway from chance 0.1 to 0.6 is 0.35, and from 0.5 to 0.6 it is 0.55."""
    one = study(cell(2, 0.25, 0.6), cell(2, 0.5, 0.5), num_classes=num_classes)
    assert bars(figures.convergent_base_lrs([one])) == converging


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (5, (2, 3)), (10, (4, 3))])
def test_each_study_has_a_panel(count, shape, ranges):
    figure = figures.convergent_base_lrs([ranges] * count)
    assert len(figure.axes) == shape[0] * shape[1]
    assert sum(axes.get_visible() for axes in figure.axes) == count
    assert figure.axes[0].get_gridspec().get_geometry() == shape


def test_summaries_can_be_drawn_before_a_run_has_finished():
    early = study(missing(2, 0.5), missing(4, 0.5))
    best, range_ = figures.best_accuracy([early]), figures.convergent_base_lrs([early])
    assert [text.get_text() for text in best.axes[0].texts] == ["no run has finished"]
    assert len(placed(range_, marker=".")) == 2
    for figure in (best, range_):
        figure.savefig(io.BytesIO(), format="png")


@pytest.fixture
def drawn(monkeypatch):
    """Returns a dict to which every drawn figure is added by path; figures are not written, which takes most of the time."""
    made = {}
    monkeypatch.setattr(figures.style, "write", lambda figure, stem: made.update({stem.as_posix(): figure}) or [stem])
    return made


def test_several_studies_are_drawn_each_and_beside_each_other(drawn):
    two = [study(cell(2, 0.5, 0.5), name=name, workdir=f"runs/{name}") for name in ("a", "b")]
    own, both = ["accuracy_vs_batch_size", "convergence"], ["best_accuracy", "convergent_base_lrs"]

    def paths(studies, out_dir):
        drawn.clear()
        assert [path.as_posix() for path in figures.draw_studies(iter(studies), out_dir)] == list(drawn)
        return list(drawn)

    assert paths(two, "out") == [f"out/{name}/{stem}" for name in "ab" for stem in own] + [f"out/{stem}" for stem in both]
    at_home = [f"runs/{name}/figures/{stem}" for name in "ab" for stem in own]
    assert paths(two, None) == at_home + [f"runs/a/figures/{stem}" for stem in both]
    assert paths(two[:1], "out") == [f"out/{stem}" for stem in own]
    assert paths(two[1:], None) == [f"runs/b/figures/{stem}" for stem in own]


@pytest.mark.usefixtures("drawn")
def test_a_study_without_rows_is_drawn_beside_others_but_not_alone():
    empty = study(missing(2, 0.5), missing(4, 0.5), name="empty")
    for draw in (figures.draw_studies, figures.draw_summaries):
        with pytest.raises(InputError, match="no rows"):
            draw([empty], "out")
        assert draw([empty, study(cell(2, 0.5, 0.5))], "out")


def test_drawing_a_study_knows_what_has_not_begun(drawn):
    """A planned batch size without results still has a row in the heat map."""
    partial = study(cell(2, 0.25, 0.5), cell(2, 0.5, 0.6), missing(4, 0.25), missing(4, 0.5))
    figures.draw_studies([partial], "plan")
    figures.draw(partial.rows, "rows")
    assert tick_texts(drawn["plan/heat_map"].axes[0].yaxis) == ["2", "4"]
    assert tick_texts(drawn["rows/heat_map"].axes[0].yaxis) == ["2"]
    assert foot(drawn["plan/accuracy_vs_base_lr"])[0] == "2 of 4 cells not finished"
    assert foot(drawn["plan/convergence"])[0] == "1 of 2 runs not finished; no epoch yet: $m$ = 4"
