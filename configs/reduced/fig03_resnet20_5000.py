"""Fig. 3, 5,000 images: ResNet-20 without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig03_resnet20_5000.py --workdir=runs/5000/fig03
Expect: 25 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig03", "resnet20", "none"))
