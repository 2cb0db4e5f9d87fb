"""Fig. 6, 5,000 images: reduced AlexNet with batch norm after convolutions alone.

Run:    python experiments/sweep.py --config=configs/reduced/fig06_alexnet_bn_conv_5000.py --workdir=runs/5000/fig06
Expect: 25 runs of 5 epochs. The 16 of m = 8, 32, 128, 512 and η̃ = 2^-11 … 2^-5, on a copy of CIFAR-10 in JPEG: best
        50.8 % at m = 8, then 48.1, 44.7 and 18.6 % (2 cores of an AMD EPYC, 2026-11-26). The paper: best at m = 4 … 32 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig06", "alexnet", "batch_conv_only"))
