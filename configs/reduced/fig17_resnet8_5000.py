"""Fig. 17, 5,000 images: Fig. 8 at half the training length, ResNet-8 for ResNet-32.

Run:    python experiments/sweep.py --config=configs/reduced/fig17_resnet8_5000.py --workdir=runs/5000/fig17
Expect: 25 runs of 2 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig17", "resnet32", "batch", augment=True)
    config.epochs = 41
    return reduced(config, "resnet8")
