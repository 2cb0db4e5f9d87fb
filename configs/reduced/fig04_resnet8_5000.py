"""Fig. 4, 5,000 images: convergence curves at η̃ = 2^-8, ResNet-8 for ResNet-32.

Run:    python experiments/sweep.py --config=configs/reduced/fig04_resnet8_5000.py --workdir=runs/5000/fig04
Expect: 5 runs of 5 epochs, not yet run
"""

from smallbatch_jax.config.protocol import full_grid, reduced


def get_config():
    config = full_grid("fig04", "resnet32", "batch")
    config.grid.base_lrs = (2.0**-8,)
    return reduced(config, "resnet8")
