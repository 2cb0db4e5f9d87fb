"""Fig. 7, 5,000 images: ResNet-8 for ResNet-32, with batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig07_resnet8_5000.py --workdir=runs/5000/fig07
Expect: 25 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig07", "resnet32", "batch"), "resnet8")
