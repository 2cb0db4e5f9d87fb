"""Fig. 4, 5,000 images: convergence curves at η̃ = 2^-8, ResNet-8 for ResNet-32.

Run:    python experiments/sweep.py --config=configs/reduced/fig04_resnet8_5000.py --workdir=runs/5000/fig04
Expect: 5 runs of 5 epochs, on a copy of CIFAR-10 in JPEG: training accuracy, mean over epochs, 43.4 % at m = 32,
        40.5, 39.3 and 25.8 % at m = 8, 128 and 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper:
        similar for 4 ≤ m ≤ 64, larger ones behind (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig04", "resnet32", "batch")
    config.grid.base_lrs = (2.0**-8,)
    return reduced(config, "resnet8")
