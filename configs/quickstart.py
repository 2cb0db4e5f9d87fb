"""The paper's picture in two minutes: the reduced AlexNet on scikit-learn's digits (8×8 images, in the package itself).

Run:    python experiments/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart
Expect: 65 runs of 8 epochs; the range of base learning rates that converge shrinks from m = 2 to m = 512
"""

from smallbatch_jax.config.experiment import default_config


def get_config():
    config = default_config()
    config.name = "quickstart"
    config.dataset.name = "digits"
    config.model.name = "alexnet"
    config.model.norm = "none"
    config.epochs = 8
    config.weight_decay = 5e-4
    config.grid.batch_sizes = (2, 8, 32, 128, 512)
    config.grid.base_lrs = tuple(2.0**k for k in range(-12, 1))
    return config
