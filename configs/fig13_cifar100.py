"""Fig. 13, CIFAR-100: BN batch sizes up to the SGD batch size, ResNet-32, with augmentation, each m at its best η̃ of Fig. 9.

Run:    python experiments/sweep.py --config=configs/fig13_cifar100.py --workdir=runs/fig13_cifar100
        after configs/fig09_resnet32_cifar100.py into runs/fig09
Expect: 66 runs of 164 epochs, not yet run in full;
        the paper: best at a BN batch size of 4 or 8, smaller than m, for every m (§3.6)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig13_cifar100", "resnet32", "batch", "cifar100", augment=True)
    config.grid.bn_batch_sizes = config.grid.batch_sizes
    config.grid.base_lrs_from = ("runs/fig09",)
    return config
