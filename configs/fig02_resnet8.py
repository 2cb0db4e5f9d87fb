"""Fig. 2: ResNet-8 without batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig02_resnet8.py --workdir=runs/fig02
Expect: 143 runs of 82 epochs, not yet run in full; the paper: best at m = 4 and m = 2 (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("fig02", "resnet8", "none")
