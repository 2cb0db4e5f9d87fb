"""Fig. 3, 5,000 images: ResNet-20 without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig03_resnet20_5000.py --workdir=runs/5000/fig03
Expect: 25 runs of 5 epochs. The 20 of m = 2, 8, 32, 128 and those of 2^-12, on a copy of CIFAR-10 in JPEG: 35.8 % at
        m = 2, 32.2 % at m = 8, all others diverge (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper:
        best at m = 2 and 4 (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig03", "resnet20", "none"))
