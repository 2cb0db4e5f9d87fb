"""Fig. 13, 5,000 images: BN batch sizes up to m, ResNet-8 for ResNet-32, each m at its best η̃ of Fig. 8.

Run:    python experiments/sweep.py --config=configs/reduced/fig13_resnet8_5000.py --workdir=runs/5000/fig13_cifar10
        after configs/reduced/fig08_resnet8_5000.py
Expect: 15 runs of 5 epochs, on a copy of CIFAR-10 in JPEG: b = 8 to m within the noise, b = 2 worst, accuracy falls
        with m (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper: b = 4 or 8 best (§3.6)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig13_cifar10", "resnet32", "batch", augment=True)
    config.grid.bn_batch_sizes = config.grid.batch_sizes
    config.grid.base_lrs_from = ("runs/5000/fig08",)
    return reduced(config, "resnet8")
