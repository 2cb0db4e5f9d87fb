"""Fig. 1, 5,000 images: reduced AlexNet without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig01_alexnet_5000.py --workdir=runs/5000/fig01
Expect: 25 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig01", "alexnet", "none"))
