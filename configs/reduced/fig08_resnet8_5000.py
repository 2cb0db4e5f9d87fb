"""Fig. 8, 5,000 images: ResNet-8 for ResNet-32, with batch norm and augmentation.

Run:    python experiments/sweep.py --config=configs/reduced/fig08_resnet8_5000.py --workdir=runs/5000/fig08
Expect: 25 runs of 5 epochs. With 2^-8 and 2^-6, on a copy of CIFAR-10 in JPEG: best 48.4 % at m = 8, then 47.7 % at
        m = 32, 43.5 and 33.7 % at m = 128 and 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper:
        best at m = 4 or 8 (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig08", "resnet32", "batch", augment=True), "resnet8")
