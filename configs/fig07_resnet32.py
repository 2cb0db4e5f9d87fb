"""Fig. 7: ResNet-32 with batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig07_resnet32.py --workdir=runs/fig07
Expect: 143 runs of 82 epochs, not yet run in full; the paper: best at m = 4 or 8 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("fig07", "resnet32", "batch")
