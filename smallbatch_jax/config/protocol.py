"""The paper's protocol (§3.1, §3.5) as configs to start from."""

from typing import Any

from smallbatch_jax.config.catalog import MODELS, NORMS
from smallbatch_jax.config.experiment import default_config

BATCH_SIZES = tuple(2**k for k in range(1, 12))  # 2 … 2048
BASE_LRS = tuple(2.0**k for k in range(-12, 1))  # 2^-12 … 2^0
EPOCHS = {"cifar10": 82, "cifar100": 164, "imagenet2012": 90}
SUBSET = 5_000  # training images of a reduced figure for CPUs
SUBSET_EPOCHS = 5  # in place of 82
SUBSET_BATCH_SIZES = (2, 8, 32, 128, 512)  # larger ones would make fewer than 50 updates
SUBSET_BASE_LRS = tuple(2.0**k for k in range(-11, -2, 2))  # 2^-11, 2^-9, … 2^-3
LAST_EPOCHS = 5  # of a run, over which the median test accuracy is reported


def full_grid(name: str, model: str, norm: str, dataset: str = "cifar10", augment: bool = False) -> Any:
    """Returns the ConfigDict of a figure: the full grid, 143 runs, with η̃ divided by 10 at 50 % and 75 % of training.

    Args:
      name: the figure, such as "fig08".
      model: "alexnet", "resnet8", "resnet20", "resnet32" or "resnet50".
      norm: see `models.create_model`.
      dataset: a name in EPOCHS, which gives the length of a run.
      augment: whether training images are padded by 4, cropped and flipped at random.
    """
    config = default_config()
    config.name = name
    config.dataset.name = dataset
    config.dataset.augment = augment
    config.model.name = model
    config.model.norm = norm
    config.epochs = EPOCHS[dataset]
    config.weight_decay = MODELS[model].weight_decay
    config.grid.batch_sizes = BATCH_SIZES
    config.grid.base_lrs = BASE_LRS
    return config


def imagenet_config(name: str) -> Any:
    """Returns the ConfigDict of "fig12" or "fig14": ResNet-50 with batch norm on augmented 224 × 224 images, the full grid.

    Runs take 90 epochs, with η̃ divided by 10 after 30, 60 and 80 of them.
    """
    config = full_grid(name, "resnet50", "batch", "imagenet2012", augment=True)
    config.dataset.image_size = 224
    config.schedule.boundaries = (30 / 90, 60 / 90, 80 / 90)
    return config


def reduced(config: Any, model: str | None = None) -> Any:
    """Returns a CIFAR-10 figure's config for an hour or less on two CPU cores: 5,000 images, a sixteenth of the epochs.

    Args:
      config: the figure's config.
      model: a shallower network to use instead; None keeps the figure's.

    Returns:
      The config with m = 2, 8, … 512 and every second η̃, under the figure's name, which claims look up. Batch norm is
      evaluated by precise statistics, since running averages lag far behind after so few updates. Evaluations cover the
      whole test set, as always.
    """
    config.model.name = model or config.model.name
    config.dataset.subset = SUBSET
    config.epochs = round(config.epochs * SUBSET_EPOCHS / EPOCHS["cifar10"])
    if NORMS[config.model.norm].batch_statistics:
        config.model.bn_statistics = "precise"
    grid = config.grid
    grid.batch_sizes = tuple(m for m in SUBSET_BATCH_SIZES if m in grid.batch_sizes)
    if len(grid.base_lrs) > 1:
        grid.base_lrs = SUBSET_BASE_LRS
    if grid.bn_batch_sizes is not None:
        grid.bn_batch_sizes = tuple(b for b in SUBSET_BATCH_SIZES if b in grid.bn_batch_sizes)
    return config
