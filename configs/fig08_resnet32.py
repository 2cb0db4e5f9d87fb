"""Fig. 8: ResNet-32 with batch norm, CIFAR-10 with augmentation.

Run:    python experiments/sweep.py --config=configs/fig08_resnet32.py --workdir=runs/fig08
Expect: 143 runs of 82 epochs; the paper: best at m = 4 or 8, the best η̃ reachable for m ≤ 16 only (§3.3);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    return cifar_config("fig08", "resnet32", "batch", augment=True)
