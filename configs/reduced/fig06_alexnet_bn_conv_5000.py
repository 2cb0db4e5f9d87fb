"""Fig. 6, 5,000 images: reduced AlexNet with batch norm after convolutions alone.

Run:    python experiments/sweep.py --config=configs/reduced/fig06_alexnet_bn_conv_5000.py --workdir=runs/5000/fig06
Expect: 25 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced_subset


def get_config():
    return reduced_subset(full_grid("fig06", "alexnet", "batch_conv_only"))
