"""Fig. 10: ResNet-32 with batch norm and gradual warm-up, CIFAR-10 with augmentation.

Run:    python experiments/sweep.py --config=configs/fig10_warmup.py --workdir=runs/fig10
Expect: 143 runs of 82 epochs, not yet run in full; the paper: best at m = 4 and 8, quite good out to m = 128 (§3.4)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig10", "resnet32", "batch", augment=True)
    config.schedule.warmup_fraction = 0.05
    return config
