"""Fig. 10, 5,000 images: ResNet-8 for ResNet-32, with batch norm, augmentation and warm-up.

Run:    python experiments/sweep.py --config=configs/reduced/fig10_resnet8_5000.py --workdir=runs/5000/fig10
Expect: 25 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig10", "resnet32", "batch", augment=True)
    config.schedule.warmup_fraction = 0.05
    return reduced(config, "resnet8")
