"""The paper's names for studies, models, norms, datasets and the accuracy."""

from collections.abc import Sequence
from pathlib import Path

from smallbatch_jax.config.catalog import MODELS, NORMS
from smallbatch_jax.config.datasets import DATASETS
from smallbatch_jax.config.experiment import OWN, Experiment, InputError
from smallbatch_jax.config.metric import ACCURACY, Metric
from smallbatch_jax.study.figures import style
from smallbatch_jax.study.study import Study


def paper_labels(studies: Sequence[Study]) -> list[str]:
    """The paper's name of each study, such as "ResNet-32, BN, Aug, WU".

    The dataset comes first if there are several, and the experiment's name last where two labels would be equal.
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
    """Returns the paper's name of the dataset, or the folder's name for a dataset in a folder."""
    name = experiment.dataset.name
    if name == "folder" and experiment.dataset.data_dir:
        return style.plain(Path(experiment.dataset.data_dir).name or name)
    return DATASETS[name].title if name in DATASETS else "own data"


def named_metric(*experiments: Experiment) -> Metric:
    """Returns the metric by which the experiments are compared, under the paper's name for their test images.

    Raises:
      InputError: if they do not agree on it.
    """
    metrics = {experiment.metric for experiment in experiments}
    if len(metrics) > 1:
        columns = " and ".join(sorted(metric.column for metric in metrics))
        raise InputError(f"select: experiments that go by {columns} cannot be compared; resume them with the same select.")
    metric, datasets = metrics.pop(), [DATASETS.get(experiment.dataset.name) for experiment in experiments]
    names = {dataset and dataset.test_metric for dataset in datasets}
    return metric._replace(called=names.pop() or "") if metric == ACCURACY and len(names) == 1 else metric
