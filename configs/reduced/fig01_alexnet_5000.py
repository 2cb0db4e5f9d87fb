"""Fig. 1, 5,000 images: reduced AlexNet without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig01_alexnet_5000.py --workdir=runs/5000/fig01
Expect: 25 runs of 5 epochs. With 2^-12, on a copy of CIFAR-10 in JPEG: best 47.8 % at m = 2, then 46.6 % at m = 8,
        42.6 and 35.4 % at m = 32 and 128, m = 512 trains at no rate (2 cores of an Intel Xeon with AVX-512,
        2026-11-26). The paper: best at m = 8 or smaller (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig01", "alexnet", "none"))
