"""Fig. 13, CIFAR-100, 5,000 images: BN batch sizes up to m, ResNet-8 for ResNet-32, each m at its best η̃ of Fig. 9.

Run:    python experiments/sweep.py --config=configs/reduced/fig13_cifar100_resnet8_5000.py --workdir=runs/5000/fig13_cifar100
        after configs/reduced/fig09_resnet8_5000.py
Expect: 15 runs of 10 epochs, not yet run on CIFAR-100. On a copy of CIFAR-10 in JPEG in its place, at the best η̃ of
        fig18_resnet8_5000.py: b = 8 to m within 1.5 points, b = 2 worst (2 cores of an Intel Xeon with AVX-512, 2026-11-28).
        The paper: b = 4 or 8 best (§3.6)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig13_cifar100", "resnet32", "batch", "cifar100", augment=True)
    config.grid.bn_batch_sizes = config.grid.batch_sizes
    config.grid.base_lrs_from = ("runs/5000/fig09",)
    return reduced(config, "resnet8")
