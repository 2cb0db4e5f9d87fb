"""Fig. 6, 5,000 images: reduced AlexNet with batch norm after convolutions alone.

Run:    python experiments/sweep.py --config=configs/reduced/fig06_alexnet_bn_conv_5000.py --workdir=runs/5000/fig06
Expect: 25 runs of 5 epochs. With 2^-12, on a copy of CIFAR-10 in JPEG: best 50.8 % at m = 8, then 48.6 % at m = 2,
        48.1, 44.7 and 18.6 % at m = 32, 128 and 512 (2 cores of an AMD EPYC and of an Intel Xeon, 2026-11-26). The
        paper: best at m = 4 … 32 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig06", "alexnet", "batch_conv_only"))
