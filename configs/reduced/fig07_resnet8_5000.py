"""Fig. 7, 5,000 images: ResNet-8 for ResNet-32, with batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig07_resnet8_5000.py --workdir=runs/5000/fig07
Expect: 25 runs of 5 epochs. With 2^-6 in place of 2^-3, on a copy of CIFAR-10 in JPEG: best 51.7 % at m = 8, then
        50.6 % at m = 32, 44.1 and 35.5 % at m = 128 and 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The
        paper: best at m = 4 or 8 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig07", "resnet32", "batch"), "resnet8")
