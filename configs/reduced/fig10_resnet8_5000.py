"""Fig. 10, 5,000 images: ResNet-8 for ResNet-32, with batch norm, augmentation and warm-up.

Run:    python experiments/sweep.py --config=configs/reduced/fig10_resnet8_5000.py --workdir=runs/5000/fig10
Expect: 25 runs of 5 epochs, on a copy of CIFAR-10 in JPEG: best 49.4 % at m = 8, then 46.8 % at m = 32, 42.1 and
        33.6 % at m = 128 and 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper: best at m = 4 and 8,
        good out to 128 (§3.4)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig10", "resnet32", "batch", augment=True)
    config.schedule.warmup_fraction = 0.05
    return reduced(config, "resnet8")
