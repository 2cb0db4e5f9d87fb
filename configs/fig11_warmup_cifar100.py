"""Fig. 11: ResNet-32 with batch norm and gradual warm-up, CIFAR-100 with augmentation.

Run:    python experiments/sweep.py --config=configs/fig11_warmup_cifar100.py --workdir=runs/fig11
Expect: 143 runs of 164 epochs, not yet run in full; the paper: best at m = 4 … 16, a steeper loss for larger m (§3.4)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig11", "resnet32", "batch", "cifar100", augment=True)
    config.schedule.warmup_fraction = 0.05
    return config
