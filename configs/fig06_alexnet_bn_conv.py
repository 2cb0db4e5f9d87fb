"""Fig. 6: reduced AlexNet with batch norm after the convolutions only, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig06_alexnet_bn_conv.py --workdir=runs/fig06
Expect: 143 runs of 82 epochs, not yet run in full; the paper: best at m = 4 … 32 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("fig06", "alexnet", "batch_conv_only")
