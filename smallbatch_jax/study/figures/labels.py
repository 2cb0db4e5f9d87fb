"""The paper's names for studies, models, norms, datasets and the accuracy."""

from collections.abc import Sequence
from pathlib import Path

from smallbatch_jax.config.catalog import MODELS, NORMS
from smallbatch_jax.config.datasets import DATASETS
from smallbatch_jax.config.experiment import OWN, Experiment
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.study import Study


def paper_labels(studies: Sequence[Study]) -> list[str]:
    """The paper's name of each study, such as "ResNet-32, BN, Aug, WU".

    The dataset comes first if there are several, and the experiment's name last where two labels would be one.
    """
    several = len({dataset_name(study.experiment) for study in studies}) > 1
    labels = [(f"{dataset_name(study.experiment)}, " if several else "") + _network(study.experiment) for study in studies]
    return [
        f"{label} ({style.plain(study.name)})" if labels.count(label) > 1 else label
        for label, study in zip(labels, studies, strict=True)
    ]


def _network(experiment: Experiment) -> str:
    model, norm = experiment.model.name, experiment.model.norm
    parts = [MODELS[model].title if model in MODELS else style.plain(model.removeprefix(OWN)), NORMS[norm].title]
    parts.append("Aug" if experiment.dataset.augment else "noAug")
    parts += experiment.optimizer.described()
    return ", ".join([*parts, "WU"] if experiment.schedule.warmup_fraction else parts)


def dataset_name(experiment: Experiment) -> str:
    """The paper's name of the dataset; the folder's of a dataset in a folder."""
    name = experiment.dataset.name
    if name == "folder" and experiment.dataset.data_dir:
        return style.plain(Path(experiment.dataset.data_dir).name or name)
    return DATASETS[name].title if name in DATASETS else style.plain(name.removeprefix(OWN))


def metric_name(*experiments: Experiment) -> str:
    """The paper's name of the accuracy on the images that the experiments test on."""
    datasets = [DATASETS.get(experiment.dataset.name) for experiment in experiments]
    names = {(dataset and dataset.test_metric) or style.TEST_ACCURACY for dataset in datasets}
    return names.pop() if len(names) == 1 else style.TEST_ACCURACY
