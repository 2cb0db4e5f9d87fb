"""Fig. 1: reduced AlexNet without batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig01_alexnet.py --workdir=runs/fig01
Expect: 143 runs of 82 epochs, not yet run in full; the paper: best at m = 8 or smaller (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("fig01", "alexnet", "none")
