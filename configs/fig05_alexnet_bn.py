"""Fig. 5: reduced AlexNet with batch norm everywhere, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig05_alexnet_bn.py --workdir=runs/fig05
Expect: 143 runs of 82 epochs; the paper: best at m = 8 … 64 (§3.3);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("fig05", "alexnet", "batch")
