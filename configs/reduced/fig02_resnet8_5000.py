"""Fig. 2, 5,000 images: ResNet-8 without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig02_resnet8_5000.py --workdir=runs/5000/fig02
Expect: 25 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig02", "resnet8", "none"))
