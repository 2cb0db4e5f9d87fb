"""Fig. 13, CIFAR-10: BN batch sizes up to the SGD batch size, ResNet-32, with augmentation, each m at its best η̃ of Fig. 8.

Run:    python experiments/sweep.py --config=configs/fig13_cifar10.py --workdir=runs/fig13_cifar10
        after configs/fig08_resnet32.py into runs/fig08
Expect: 66 runs of 82 epochs, not yet run in full;
        the paper: best at a BN batch size of 4 or 8 for every m, worse as m grows (§3.6)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig13_cifar10", "resnet32", "batch", augment=True)
    config.grid.bn_batch_sizes = config.grid.batch_sizes
    config.grid.base_lrs_from = ("runs/fig08",)
    return config
