"""§3.2, 5,000 images: ResNet-32 without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/resnet32_nobn_5000.py --workdir=runs/5000/resnet32_nobn
Expect: 25 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("resnet32_nobn", "resnet32", "none"))
