"""Fig. 2, 5,000 images: ResNet-8 without batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig02_resnet8_5000.py --workdir=runs/5000/fig02
Expect: 25 runs of 5 epochs. With 2^-12, on a copy of CIFAR-10 in JPEG: best 41.9 % at m = 2, then 40.2 % at m = 8,
        35.0 and 26.7 % at m = 32 and 128, m = 512 trains at no rate (2 cores of an Intel Xeon with AVX-512,
        2026-11-26). The paper: best at m = 4 and m = 2 (§3.2)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig02", "resnet8", "none"))
