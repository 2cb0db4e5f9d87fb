"""Fig. 5, 5,000 images: reduced AlexNet with batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig05_alexnet_bn_5000.py --workdir=runs/5000/fig05
Expect: 25 runs of 5 epochs, on a copy of CIFAR-10 in JPEG: best 54.3 % at m = 32, then 53.5 % at m = 8, 52.0 and
        46.1 % at m = 128 and 512, 15.8 % at m = 2 (2 cores of an AMD EPYC and of an Intel Xeon, 2026-11-26). The
        paper: best at m = 8 … 64 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig05", "alexnet", "batch"))
