"""Tests that every config follows the paper's protocol (§3.1) and says how to run it."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
from shell import run

from smallbatch_jax import data
from smallbatch_jax.config import experiment

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
FULL_GRID = {(2**k, 2.0**j) for k in range(1, 12) for j in range(-12, 1)}
# name: model, norm, dataset, augment, epochs, weight decay, warm-up (§3.1-3.4, Appendix A)
PAPER = {
    "fig01_alexnet": ("alexnet", "none", "cifar10", False, 82, 5e-4, 0.0),
    "fig02_resnet8": ("resnet8", "none", "cifar10", False, 82, 1e-4, 0.0),
    "fig03_resnet20": ("resnet20", "none", "cifar10", False, 82, 1e-4, 0.0),
    "resnet32_nobn": ("resnet32", "none", "cifar10", False, 82, 1e-4, 0.0),
    "fig05_alexnet_bn": ("alexnet", "batch", "cifar10", False, 82, 5e-4, 0.0),
    "fig06_alexnet_bn_conv": ("alexnet", "batch_conv_only", "cifar10", False, 82, 5e-4, 0.0),
    "fig07_resnet32": ("resnet32", "batch", "cifar10", False, 82, 1e-4, 0.0),
    "fig08_resnet32": ("resnet32", "batch", "cifar10", True, 82, 1e-4, 0.0),
    "fig09_resnet32_cifar100": ("resnet32", "batch", "cifar100", True, 164, 1e-4, 0.0),
    "fig10_warmup": ("resnet32", "batch", "cifar10", True, 82, 1e-4, 0.05),
    "fig11_warmup_cifar100": ("resnet32", "batch", "cifar100", True, 164, 1e-4, 0.05),
    "fig17_41_epochs": ("resnet32", "batch", "cifar10", True, 41, 1e-4, 0.0),
    "fig18_164_epochs": ("resnet32", "batch", "cifar10", True, 164, 1e-4, 0.0),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, experiment.from_config(module.get_config())


@pytest.mark.parametrize("name", PAPER)
def test_a_figure_is_the_papers_grid_of_143_runs(name):
    model, norm, dataset, augment, epochs, decay, warmup = PAPER[name]
    _, chosen = load(name)
    runs = chosen.runs()
    assert len(runs) == 143
    assert {(run.batch_size, run.base_lr) for run in runs} == FULL_GRID
    assert all(run.bn_batch_size == run.batch_size and run.seed == 0 for run in runs)
    assert (chosen.model.name, chosen.model.norm) == (model, norm)
    assert (chosen.dataset.name, chosen.dataset.augment) == (dataset, augment)
    assert (chosen.epochs, chosen.weight_decay, chosen.schedule.warmup_fraction) == (epochs, decay, warmup)
    assert (chosen.schedule.boundaries, chosen.schedule.factor) == ((0.5, 0.75), 0.1)


def test_a_reduced_figure_differs_in_depth_length_and_coarseness_alone():
    _, full = load("fig08_resnet32")
    _, chosen = load("reduced/fig08_resnet8")
    assert (chosen.model.name, chosen.epochs) == ("resnet8", 8)
    assert dataclasses.replace(chosen, model=full.model, epochs=full.epochs, grid=full.grid) == full
    expected = {(2**k, 2.0**j) for k in range(1, 12, 2) for j in range(-12, -3)}
    assert {(run.batch_size, run.base_lr) for run in chosen.runs()} == expected


SUBSETS = sorted(path.stem for path in (ROOT / "configs/reduced").glob("*_5000.py"))


@pytest.mark.parametrize("name", SUBSETS)
def test_a_figure_of_5000_images_differs_from_the_whole_in_size_alone(name):
    figures = {load(figure)[1].name: load(figure)[1] for figure in CONFIGS}
    _, chosen = load(f"reduced/{name}")
    full = figures[chosen.name]
    assert (chosen.dataset.subset, chosen.epochs) == (5_000, round(5 * full.epochs / 82))
    statistics = "running" if full.model.norm == "none" else "precise"
    assert (chosen.model.norm, chosen.model.bn_statistics) == (full.model.norm, statistics)
    assert name.startswith(chosen.name.removesuffix("_cifar10"))
    assert chosen.model.name in name or "alexnet" in name or chosen.name == "resnet32_nobn"
    same = {"model": full.model, "epochs": full.epochs, "grid": full.grid, "dataset": full.dataset}
    assert dataclasses.replace(chosen, **same) == full
    assert dataclasses.replace(chosen.dataset, subset=None) == full.dataset
    assert set(chosen.grid.batch_sizes) < set(full.grid.batch_sizes)
    assert set(chosen.grid.base_lrs) <= set(full.grid.base_lrs)


def test_fig04_is_one_rate_at_every_batch_size():
    _, chosen = load("fig04_convergence")
    assert [(run.batch_size, run.base_lr) for run in chosen.runs()] == [(2**k, 2**-8) for k in range(1, 12)]
    assert (chosen.model.name, chosen.model.norm, chosen.dataset.augment) == ("resnet32", "batch", False)


FIG13 = {"fig13_cifar10": ("cifar10", 82, "runs/fig08"), "fig13_cifar100": ("cifar100", 164, "runs/fig09")}


@pytest.mark.parametrize("name", FIG13)
def test_fig13_is_every_bn_batch_size_up_to_m_at_the_best_rate_of_another_figure(name):
    dataset, epochs, source = FIG13[name]
    _, chosen = load(name)
    assert (chosen.dataset.name, chosen.dataset.augment, chosen.epochs) == (dataset, True, epochs)
    assert (chosen.model.name, chosen.model.norm, chosen.grid.base_lrs_from) == ("resnet32", "batch", (source,))
    with pytest.raises(experiment.InputError, match=r"^grid\.base_lrs_from: "):
        chosen.runs()
    best = tuple((m, 2.0**-k) for k, m in enumerate(chosen.grid.batch_sizes))
    grid = dataclasses.replace(chosen.grid, base_lr_by_batch_size=best)
    runs = dataclasses.replace(chosen, grid=grid).runs()
    sizes = [2**k for k in range(1, 12)]
    assert [(run.batch_size, run.bn_batch_size) for run in runs] == [(m, b) for m in sizes for b in sizes if b <= m]
    assert {(run.batch_size, run.base_lr) for run in runs} == set(best)


IMAGENET = ("fig12_resnet50", "fig14_imagenet")


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_figure_is_the_papers_protocol(name):
    _, chosen = load(name)
    assert (chosen.model.name, chosen.model.norm) == ("resnet50", "batch")
    assert chosen.dataset == experiment.Dataset("imagenet2012", None, augment=True, image_size=224)
    assert (chosen.epochs, chosen.weight_decay, chosen.schedule.warmup_fraction) == (90, 1e-4, 0.0)
    assert (chosen.schedule.boundaries, chosen.schedule.factor) == ((30 / 90, 60 / 90, 80 / 90), 0.1)


def test_fig12_is_the_papers_grid_twice_and_may_be_trained_row_by_row():
    _, chosen = load("fig12_resnet50")
    runs = chosen.runs()
    assert len(runs) == 2 * 143
    assert {(run.batch_size, run.base_lr, run.seed) for run in runs} == {(m, lr, s) for m, lr in FULL_GRID for s in (0, 1)}
    assert all(run.bn_batch_size == run.batch_size for run in runs)
    rows = [
        dataclasses.replace(chosen, grid=dataclasses.replace(chosen.grid, batch_sizes=sizes)) for sizes in ((16,), (16, 32))
    ]
    assert [len(row.runs()) for row in rows] == [26, 52]
    assert experiment.differences(*rows) == []


def test_fig14_is_bn_batch_sizes_up_to_m_at_the_best_rates_of_fig12_and_above_128_at_the_papers():
    _, chosen = load("fig14_imagenet")
    assert chosen.grid.base_lrs_from == ("runs/fig12",)
    given = {256: 2**-10, 512: 2**-10, 1024: 2**-10, 2048: 2**-9}
    assert dict(chosen.grid.base_lr_by_batch_size) == given
    found = {m: 2.0**-m for m in (16, 32, 64, 128)} | given
    grid = dataclasses.replace(chosen.grid, base_lr_by_batch_size=tuple(found.items()))
    runs = dataclasses.replace(chosen, grid=grid).runs()
    sizes, bn_sizes = [2**k for k in range(4, 12)], [2**k for k in range(1, 9)]
    expected = [(m, b, found[m], 0) for m in sizes for b in bn_sizes if b <= m]
    assert [(run.batch_size, run.bn_batch_size, run.base_lr, run.seed) for run in runs] == expected


@pytest.mark.parametrize(("name", "count"), [("fig15_best", 8), ("fig16_ranges", 10)])
def test_a_summary_trains_nothing_and_names_the_workdirs_of_other_configs(name, count):
    _, chosen = load(name)
    assert chosen.runs() == []
    workdirs = {f"runs/{load(other)[1].name}" for other in PAPER}
    assert len(chosen.drawn_from) == count
    assert set(chosen.drawn_from) <= workdirs


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_opens_with_its_own_command_and_what_to_expect(name):
    module, chosen = load(name)
    assert f"--config=configs/{name}.py" in module.__doc__
    assert chosen.name == name.split("_")[0] or chosen.name == name
    if chosen.drawn_from:
        assert "Expect: a drawing" in module.__doc__
        return
    expected = re.search(r"Expect: (\d+) runs of (\d+) epochs", module.__doc__)
    assert expected is not None
    if chosen.grid.base_lrs_from:  # each batch size gets one base_lr, with any value
        any_rate = tuple((m, 1.0) for m in chosen.grid.batch_sizes)
        chosen = dataclasses.replace(chosen, grid=dataclasses.replace(chosen.grid, base_lr_by_batch_size=any_rate))
    assert (len(chosen.runs()), chosen.epochs) == tuple(map(int, expected.groups()))


BEYOND = {"quickstart", "momentum_digits", "quickstart_adamw", "batch_growth_digits"}


def test_every_other_config_is_of_the_paper():
    assert set(CONFIGS) - BEYOND == {*PAPER, *FIG13, *IMAGENET, "fig04_convergence", "fig15_best", "fig16_ranges"}
    assert all(load(name)[1].optimizer == experiment.Optimizer() for name in set(CONFIGS) - BEYOND)


def test_plan_lists_the_programs_and_trains_nothing():
    done = run("plan.py", "--config=configs/fig08_resnet32.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fig08: 143 runs of 82 epochs in 11 programs\n")
    assert "     2         2    13      2,050,000      53,300,000" in done.stdout
    assert "  2048      2048    13          2,002      53,301,248" in done.stdout


def test_plan_says_what_a_summary_is_drawn_from():
    done = run("plan.py", "--config=configs/fig15_best.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fig15: trains nothing, is drawn from runs/fig01, runs/fig02, ")


def test_the_sizes_that_plans_count_on_are_those_of_the_data():
    assert data.num_train_examples(experiment.Dataset("digits")) == len(data.load("digits").train_labels)
