"""Fig. 9, 5,000 images: ResNet-8 for ResNet-32, with batch norm and augmentation, at CIFAR-100's length.

Run:    python experiments/sweep.py --config=configs/reduced/fig09_resnet8_5000.py --workdir=runs/5000/fig09
Expect: 25 runs of 10 epochs, not yet run on CIFAR-100. On CIFAR-10 they are those of fig18_resnet8_5000.py: best 56.2 % at
        m = 32, then 55.2 % at m = 8 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper: best at m = 4 or 8 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig09", "resnet32", "batch", "cifar100", augment=True), "resnet8")
