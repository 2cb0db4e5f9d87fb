"""Fig. 6: reduced AlexNet with batch norm after the convolutions only, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig06_alexnet_bn_conv.py --workdir=runs/fig06
Expect: 143 runs of 82 epochs; the paper: best at m = 4 … 32 (§3.3);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("fig06", "alexnet", "batch_conv_only")
