"""Fig. 17, 5,000 images: Fig. 8 at half the training length, ResNet-8 for ResNet-32.

Run:    python experiments/sweep.py --config=configs/reduced/fig17_resnet8_5000.py --workdir=runs/5000/fig17
Expect: 25 runs of 2 epochs, on a copy of CIFAR-10 in JPEG: best 36.0 % at m = 32, then 35.8 % at m = 8, 31.0 and
        26.5 % at m = 128 and 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper: worse than Fig. 8
        (Appendix A)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig17", "resnet32", "batch", augment=True)
    config.epochs = 41
    return reduced(config, "resnet8")
