"""Fig. 1, reduced: 8 epochs of all of CIFAR-10, m = 2, 8, … 2048, η̃ = 2^-12 … 2^-7.

Run:    python experiments/sweep.py --config=configs/reduced/fig01_alexnet.py --workdir=runs/reduced/fig01
Expect: 72 runs of 8 epochs, two seeds. On a copy of CIFAR-10 in JPEG: best 73.9 % at m = 2 and 8, then 71.5 and 65.0 % at
        m = 32 and 128; m = 512 and 2048 train at no rate (2 cores of an Intel Xeon with AVX-512, 2026-11-27 and 28). The
        paper, with 82 epochs: best at m = 8 or smaller (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig01", "alexnet", "none")  # the figure's name, by which claims know it
    config.epochs = 8
    config.grid.batch_sizes = tuple(2**k for k in range(1, 12, 2))
    config.grid.base_lrs = tuple(2.0**k for k in range(-12, -6))
    config.grid.seeds = (0, 1)
    return config
