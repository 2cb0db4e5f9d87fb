"""Fig. 7, 5,000 images: ResNet-8 for ResNet-32, with batch norm.

Run:    python experiments/sweep.py --config=configs/reduced/fig07_resnet8_5000.py --workdir=runs/5000/fig07
Expect: 25 runs of 5 epochs. The whole range of m and η̃ with 2,000 test images: best 51.5 % at m = 16, 51.2 % at
        m = 8 (2 cores of an AMD EPYC, 2026-11-22; notebooks/results/cifar10_subset). The paper: best at m = 4 or 8
        (§3.3)
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    return reduced(full_grid("fig07", "resnet32", "batch"), "resnet8")
