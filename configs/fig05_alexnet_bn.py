"""Fig. 5: reduced AlexNet with batch norm everywhere, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig05_alexnet_bn.py --workdir=runs/fig05
Expect: 143 runs of 82 epochs, not yet run in full; the paper: best at m = 8 … 64 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("fig05", "alexnet", "batch")
