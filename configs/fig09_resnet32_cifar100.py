"""Fig. 9: ResNet-32 with batch norm, CIFAR-100 with augmentation.

Run:    python experiments/sweep.py --config=configs/fig09_resnet32_cifar100.py --workdir=runs/fig09
Expect: 143 runs of 164 epochs; the paper: best at m = 4 or 8, the best η̃ reachable for m ≤ 8 only (§3.3);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("fig09", "resnet32", "batch", "cifar100", augment=True)
