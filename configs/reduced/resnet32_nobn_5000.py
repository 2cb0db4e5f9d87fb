"""§3.2, 5,000 images: ResNet-32 without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/resnet32_nobn_5000.py --workdir=runs/5000/resnet32_nobn
Expect: 25 runs of 5 epochs. Those of m = 2, 8, 32, on a copy of CIFAR-10 in JPEG, diverge at once, as do m = 4, 16
        and η̃ = 2^-12, 2^-10 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper: only m = 2, 4 and 8
        learn (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("resnet32_nobn", "resnet32", "none"))
