"""Fig. 1: reduced AlexNet without batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig01_alexnet.py --workdir=runs/fig01
Expect: 143 runs of 82 epochs; the paper: best at m = 8 or smaller (§3.2);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("fig01", "alexnet", "none")
