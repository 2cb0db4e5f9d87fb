"""Fig. 18, 5,000 images: Fig. 8 at twice the training length, ResNet-8 for ResNet-32.

Run:    python experiments/sweep.py --config=configs/reduced/fig18_resnet8_5000.py --workdir=runs/5000/fig18
Expect: 25 runs of 10 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig18", "resnet32", "batch", augment=True)
    config.epochs = 164
    return reduced(config, "resnet8")
