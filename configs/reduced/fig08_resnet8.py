"""Fig. 8, reduced: ResNet-8 in place of ResNet-32, 8 epochs of all of CIFAR-10, m = 2, 8, … 2048, η̃ = 2^-12 … 2^-4.

Run:    python experiments/sweep.py --config=configs/reduced/fig08_resnet8.py --workdir=runs/reduced/fig08
Expect: 54 runs of 8 epochs. The 36 of m = 8, 32, 128, 512, on a copy of CIFAR-10 in JPEG: 136 s of training after 21 s of
        compilation on one NVIDIA H200 (2026-11-26); best 75.6 % at m = 8, then 74.5, 72.1 and 63.2 %; m = 2 and 2048 not yet
        run. The paper, with ResNet-32 and 82 epochs: best at m = 4 or 8 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig08", "resnet8", "batch", augment=True)  # the figure's name, by which claims know it
    config.epochs = 8
    config.grid.batch_sizes = tuple(2**k for k in range(1, 12, 2))
    config.grid.base_lrs = tuple(2.0**k for k in range(-12, -3))
    return config
