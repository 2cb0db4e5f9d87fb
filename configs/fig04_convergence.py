"""Fig. 4: convergence curves of ResNet-32 with batch norm at η̃ = 2^-8, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig04_convergence.py --workdir=runs/fig04
Expect: 11 runs of 82 epochs; the paper: similar for 4 ≤ m ≤ 64, degraded for larger m (§3.3);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    config = cifar_config("fig04", "resnet32", "batch")
    config.grid.base_lrs = (2.0**-8,)
    return config
