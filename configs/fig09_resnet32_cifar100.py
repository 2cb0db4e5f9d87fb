"""Fig. 9: ResNet-32 with batch norm, CIFAR-100 with augmentation.

Run:    python experiments/sweep.py --config=configs/fig09_resnet32_cifar100.py --workdir=runs/fig09
Expect: 143 runs of 164 epochs, not yet run in full; the paper: best at m = 4 or 8, the best η̃ reachable for m ≤ 8 only (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("fig09", "resnet32", "batch", "cifar100", augment=True)
