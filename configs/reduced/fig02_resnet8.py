"""Fig. 2, reduced: 8 epochs of all of CIFAR-10, m = 2, 8, … 2048, η̃ = 2^-12 … 2^-5.

Run:    python experiments/sweep.py --config=configs/reduced/fig02_resnet8.py --workdir=runs/reduced/fig02
Expect: 96 runs of 8 epochs, two seeds. On a copy of CIFAR-10 in JPEG: best 70.3 % at m = 2, then 69.7 % at m = 8, 65.2, 52.4
        and 38.8 % at m = 32, 128 and 512; m = 2048 trains at no rate (2 cores of an Intel Xeon with AVX-512, 2026-11-27). The
        paper, with 82 epochs: best at m = 4 and m = 2 (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig02", "resnet8", "none")  # the figure's name, by which claims know it
    config.epochs = 8
    config.grid.batch_sizes = tuple(2**k for k in range(1, 12, 2))
    config.grid.base_lrs = tuple(2.0**k for k in range(-12, -4))
    config.grid.seeds = (0, 1)
    return config
