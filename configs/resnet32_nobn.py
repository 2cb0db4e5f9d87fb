"""§3.2, not shown in a figure: ResNet-32 without batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/resnet32_nobn.py --workdir=runs/resnet32_nobn
Expect: 143 runs of 82 epochs; the paper: only m = 2, 4 and 8 learn, best 76 % (§3.2);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("resnet32_nobn", "resnet32", "none")
