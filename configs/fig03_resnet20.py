"""Fig. 3: ResNet-20 without batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig03_resnet20.py --workdir=runs/fig03
Expect: 143 runs of 82 epochs; the paper: best at m = 4 and m = 2 (§3.2);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("fig03", "resnet20", "none")
