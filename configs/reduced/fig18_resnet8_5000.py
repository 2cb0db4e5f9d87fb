"""Fig. 18, 5,000 images: Fig. 8 at twice the training length, ResNet-8 for ResNet-32.

Run:    python experiments/sweep.py --config=configs/reduced/fig18_resnet8_5000.py --workdir=runs/5000/fig18
Expect: 25 runs of 10 epochs, on a copy of CIFAR-10 in JPEG: best 56.2 % at m = 32, then 55.2 % at m = 8, 49.3 and
        41.5 % at m = 128 and 512 (2 cores of an Intel Xeon with AVX-512, 2026-11-26). The paper: better than Fig. 8,
        mainly at large m (Appendix A)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig18", "resnet32", "batch", augment=True)
    config.epochs = 164
    return reduced(config, "resnet8")
