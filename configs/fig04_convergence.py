"""Fig. 4: convergence curves of ResNet-32 with batch norm at η̃ = 2^-8, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig04_convergence.py --workdir=runs/fig04
Expect: 11 runs of 82 epochs, not yet run in full; the paper: similar for 4 ≤ m ≤ 64, degraded for larger m (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig04", "resnet32", "batch")
    config.grid.base_lrs = (2.0**-8,)
    return config
