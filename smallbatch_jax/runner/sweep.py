"""The public function `sweep`, which trains a grid from Python on any model and data."""

import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import linen as nn

from smallbatch_jax import data
from smallbatch_jax.config import experiment, fields
from smallbatch_jax.config.catalog import AXES
from smallbatch_jax.config.experiment import OWN, Experiment, InputError, from_config
from smallbatch_jax.data import Dataset, Photographs
from smallbatch_jax.models.adapters import adapted
from smallbatch_jax.models.own import OwnModel
from smallbatch_jax.program import devices, jax_flags, processes
from smallbatch_jax.program.tasks import Score
from smallbatch_jax.runner.grid import train_grid
from smallbatch_jax.runner.jobs import Own
from smallbatch_jax.runner.progress import Progress, for_stream
from smallbatch_jax.store import results

if TYPE_CHECKING:
    import pandas as pd

_SECTIONS = {
    field.name: type(field.default) for field in dataclasses.fields(Experiment) if dataclasses.is_dataclass(field.default)
}
_ARGUMENTS = {"drawn_from", "dataset", "model", "epochs", "grid"}  # fields that arguments of `sweep` set, or that train nothing
_ARGUMENTS |= {"batch_sizes", "base_lrs", "base_lrs_from", "base_lr_by_batch_size", "seeds", "optimizer", "metrics"}


def sweep(
    model: str | nn.Module | Callable[..., Any] | tuple[Callable[..., Any], Callable[..., Any]],
    dataset: str | Dataset | Photographs,
    batch_sizes: Sequence[int],
    base_lrs: Sequence[float] | Mapping[int, float],
    epochs: int,
    seeds: Sequence[int] = (0,),
    workdir: str | os.PathLike[str] | None = None,
    *,
    loss: Score | None = None,
    metrics: Sequence[str] | Mapping[str, Score] = (),
    optimizer: str | experiment.Optimizer | Callable[..., Any] = "sgd",
    progress: Progress | None = None,
    **options: Any,
) -> "pd.DataFrame":
    """Trains the grid batch_sizes × base_lrs × seeds on your own model and data; lanes, storage and resume as in the commands.

    Args:
      model: a name of `create_model`, with the option `norm`; or your own, which gives logits float[n, num_classes]: a linen
        module; `make(rngs)` of a `flax.nnx.Module`; `make(key)` of an `equinox.Module` of one example, or of the pair that
        `equinox.nn.make_with_state` gives; or a pair of functions, `init(key, x)` of parameters and `apply(params, x)`. It is
        passed `train=…`, or a mode of another usual name (`models.own.MODES`), if it takes one.
      dataset: a name of `data.load`, with the options `data_dir` and `image_size`; or a `data.Dataset` of your own arrays, of
        any shape [n, …].
      batch_sizes: m, each at most the number of training examples.
      base_lrs: η̃ = η/m, the step length per example: crossed with all batch sizes, or given for each batch size.
      epochs: E, the same for every run at any m.
      seeds: of initialisation and data order; the replicates of a cell.
      workdir: folder that stores the results and resumes with the same model and data; None stores nothing.
      loss: your own (outputs, batch) → float32[n], one value for each example of `batch.images` and `batch.labels`; None uses
        the loss of the `task`, which follows from the labels: classes, regression targets, or the next token of sequences.
      metrics: reported in addition to the loss: names in `config.catalog.METRICS`, or functions by name, called like `loss`.
      optimizer: a name in `config.catalog.OPTIMIZERS`; an `experiment.Optimizer`; or your own function (learning_rate,
        **scalars) → optax.GradientTransformation. It gets the learning rate with its schedule, and the option `scalars`, a dict
        of numbers or of tuples of numbers to try, all of them traced: new values need no compilation.
      progress: display that is updated after every segment; None shows lines or a bar on stderr.
      **options: fields of a config (`config.experiment`), each by its own name, with the config's defaults:

        - of the optimizer its `rule` ("linear": η = η̃·m, "sqrt": η̃·√m, "constant": η̃), `momentum`, `beta1`, `beta2`,
          `epsilon`, `beta_rule`, `beta_batch_size`;
        - further axes of the grid: `weight_decays`, `warmup_fractions`, `momenta`, `beta1s`, `beta2s`, `beta1_half_lives` and
          `beta2_half_lives` in examples, `epsilons`, and the `scalars` of an own optimizer;
        - `diagnostics`, columns that help explain training: names in `config.catalog.DIAGNOSTICS`;
        - `label_smoothing`, and `select`, the column that says which run is best, as ("test_loss", "min");
        - `schedule`: an `experiment.Schedule`; or its `boundaries`, `factor`, `warmup_fraction`, `batch_growth`;
        - of the dataset `augment`, `subset`, `validation_fraction`, `data_dir`, `image_size`, `color_jitter`, `broken_images`,
          `workers`;
        - of a named model `norm`, `bn_decay`, `bn_statistics`;
        - of the grid `bn_batch_sizes`, for which your own module must have a field `bn_batch_size`;
        - `weight_decay`, `weight_decay_mask` ("kernels": biases and normalisation do not decay), `lanes`, `data_devices`,
          `micro_batch_size`, `segment_seconds`, `checkpoint_seconds`, `tensorboard`, `wandb`, and the `name` of the experiment;
        - `precision`, of matrix products on GPU and TPU, and of a named model's activations; your own chooses its dtypes;
        - `keep_parameters`: "best" keeps the final parameters of the best finished run of each batch size in the workdir, "all"
          those of every one, for `load_parameters`; refused if they would take more than `keep_gib` of disk.

    Returns:
      The rows of `results.load(workdir)`.

    Raises:
      InputError: in one line that names the invalid argument.
      KeyboardInterrupt: `runner.signals.Interrupted`, on Ctrl-C or another signal, once all lanes are saved in the workdir;
        the same call resumes.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # in a worker process that decodes photographs
        raise SystemExit("sweep: call it below `if __name__ == '__main__':`, since processes that decode import this script.")
    workdir = None if workdir is None else os.path.abspath(fields.expanded_path("workdir", workdir))
    sections = _sections(options)
    require_workdir(options, workdir)
    if progress is not None and not isinstance(progress, Progress):
        raise InputError(f"progress: got a {type(progress).__name__}, accepts an object with the methods show and close.")
    devices.use_all_cores()
    own = None if isinstance(model, str) else adapted(model)
    _require_usable(options, own)
    place = [sections["dataset"].pop(name, None) for name in ("data_dir", "image_size")]
    if not isinstance(dataset, str) and place != [None, None]:
        raise InputError("data_dir, image_size: belong to a dataset's name; give them to data.load, which made the dataset.")
    images = loaded(dataset, *place)
    division = {name: sections["dataset"][name] for name in ("subset", "validation_fraction") if name in sections["dataset"]}
    asked = fields.parse(experiment.Dataset, division, "dataset")
    images = data.divided(images, asked.subset, asked.validation_fraction)
    if isinstance(images, Dataset):
        held = images.splits().get("validation", ((), ()))[1]
        sections["dataset"]["validation_fraction"] = len(held) / (images.num_train + len(held))
        sections.setdefault("task", images.task)
    own_parts = _own_parts(sections, loss, metrics, optimizer)
    sections["dataset"] |= {
        "name": dataset if isinstance(dataset, str) else f"{OWN}{images.digest()}",
        "image_size": images.image_size if isinstance(images, Photographs) else None,
    }
    sections["model"]["name"] = own.name if own else model
    rates = "base_lr_by_batch_size" if isinstance(base_lrs, Mapping) else "base_lrs"
    sections["grid"] |= {"batch_sizes": batch_sizes, rates: base_lrs, "seeds": seeds}
    chosen = from_config(sections | {"epochs": epochs})
    for name, value in {"weight_decay": chosen.weight_decay, "warmup_fraction": chosen.schedule.warmup_fraction}.items():
        if value and name in chosen.grid.axes():  # a config's own value is a default, which an axis replaces
            raise InputError(f"grid.{AXES[name]}: {name}={value:g} says what {name} is; leave one of them out.")
    jax_flags.require_devices()
    with jax_flags.held(), tempfile.TemporaryDirectory() if workdir is None else nullcontext(workdir) as folder:
        model_of = fingerprint = None
        if own is not None:
            own = own.settled(images.example)
            model_of = own.with_bn_batch_size
            if workdir is not None:
                fingerprint = partial(own.fingerprint, images.example)
        train_grid(chosen, Path(folder), images, progress or for_stream(), model_of, fingerprint, own_parts)
        return processes.on_first(lambda: results.load(folder))


def loaded(dataset: Any, data_dir: str | None, image_size: int | None) -> Dataset | Photographs:
    """Returns a dataset, which may be given by name; raises InputError if it is none."""
    images = data.load(dataset, data_dir, image_size) if isinstance(dataset, str) else dataset
    if not isinstance(images, (Dataset, Photographs)):
        raise InputError(f"dataset: got a {type(images).__name__}; accepts a name, or a data.Dataset of your own arrays.")
    return images


def _own_parts(sections: dict[str, Any], loss: Any, metrics: Any, optimizer: Any) -> Own:
    """Returns the caller's own functions, and names them in the sections of the config."""
    functions = dict(metrics) if isinstance(metrics, Mapping) else {}
    for name, function in {"loss": loss, **{f"metrics: {name}": metric for name, metric in functions.items()}}.items():
        if function is not None and not callable(function):
            raise InputError(f"{name}: got a {type(function).__name__}, accepts a function (outputs, batch) → [n].")
    if loss is not None:
        sections["task"] = f"{OWN}{_name_of(loss)}"
    sections["metrics"] = [f"{OWN}{name}" for name in functions] if isinstance(metrics, Mapping) else metrics
    own: Any = optimizer if callable(optimizer) else None
    if isinstance(optimizer, experiment.Optimizer):
        sections["optimizer"] = dataclasses.asdict(optimizer) | sections["optimizer"]
    elif own or isinstance(optimizer, str):
        sections["optimizer"]["name"] = f"{OWN}{_name_of(optimizer)}" if own else optimizer
    else:
        raise InputError(f"optimizer: got a {_name_of(optimizer)}, accepts a name or a function such as optax.adam.")
    return Own(own, loss, functions)


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config that the options describe, with sections as dicts.

    Raises:
      InputError: if an option is unknown; the message lists the known ones.
    """
    known = dict.fromkeys(_names(Experiment), "")
    for section, kind in _SECTIONS.items():
        known |= {name: section for name in _names(kind) if name not in known}
    fields.refuse_unknown(options, list(known), "")
    config: dict[str, Any] = {"name": "sweep", **{section: {} for section in _SECTIONS}}
    for name, value in sorted(options.items(), key=lambda option: known[option[0]]):  # whole sections before their fields
        if known[name]:
            config[known[name]][name] = value
        else:
            config[name] = dataclasses.asdict(value) if isinstance(value, experiment.Schedule) else value
    return config


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.name not in _ARGUMENTS]


def require_workdir(options: Mapping[str, Any], workdir: str | os.PathLike[str] | None) -> None:
    """Raises InputError for options that write into a workdir if there is none."""
    offline = ("wandb",) * (os.environ.get("WANDB_MODE") == "offline")
    for name in ("tensorboard", "keep_parameters", *offline):
        if options.get(name) and workdir is None:
            raise InputError(f"{name}: needs a workdir; give one, or leave {name} out.")


def _require_usable(options: Mapping[str, Any], own: OwnModel | None) -> None:
    """Raises InputError for options that have no meaning for this model."""
    named = experiment.Model()
    for_named = ("norm", "bn_decay", "bn_statistics")
    if own is not None and any(options.get(name, getattr(named, name)) != getattr(named, name) for name in for_named):
        raise InputError(f"{', '.join(for_named)}: belong to the named models; an own module brings its own, leave them out.")
