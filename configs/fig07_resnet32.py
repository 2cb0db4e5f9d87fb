"""Fig. 7: ResNet-32 with batch norm, CIFAR-10 without augmentation.

Run:    python experiments/sweep.py --config=configs/fig07_resnet32.py --workdir=runs/fig07
Expect: 143 runs of 82 epochs; the paper: best at m = 4 or 8 (§3.3);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("fig07", "resnet32", "batch")
