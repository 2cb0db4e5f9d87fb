"""Fig. 8: ResNet-32 with batch norm, CIFAR-10 with augmentation.

Run:    python experiments/sweep.py --config=configs/fig08_resnet32.py --workdir=runs/fig08
Expect: 143 runs of 82 epochs, not yet run in full; the paper: best at m = 4 or 8, the best η̃ reachable for m ≤ 16 only (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("fig08", "resnet32", "batch", augment=True)
