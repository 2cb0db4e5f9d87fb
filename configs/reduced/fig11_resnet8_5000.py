"""Fig. 11, 5,000 images: ResNet-8 for ResNet-32, with batch norm, augmentation and warm-up, at CIFAR-100's length.

Run:    python experiments/sweep.py --config=configs/reduced/fig11_resnet8_5000.py --workdir=runs/5000/fig11
Expect: 25 runs of 10 epochs, not yet run on CIFAR-100. On a copy of CIFAR-10 in JPEG in its place: best 57.2 % at m = 8, then
        56.3, 50.2, 50.1 and 40.4 % at m = 32, 128, 2 and 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-28). The paper:
        best at m = 4 … 16 (§3.4)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig11", "resnet32", "batch", "cifar100", augment=True)
    config.schedule.warmup_fraction = 0.05
    return reduced(config, "resnet8")
