"""§3.2, not shown in a figure: ResNet-32 without batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/resnet32_nobn.py --workdir=runs/resnet32_nobn
Expect: 143 runs of 82 epochs, not yet run in full; the paper: only m = 2, 4 and 8 learn, best 76 % (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    return full_grid("resnet32_nobn", "resnet32", "none")
