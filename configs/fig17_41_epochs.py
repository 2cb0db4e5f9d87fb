"""Fig. 17: Fig. 8 at half the training length.

Run:    python experiments/sweep.py --config=configs/fig17_41_epochs.py --workdir=runs/fig17
Expect: 143 runs of 41 epochs, not yet run in full; the paper: worse than Fig. 8 (Appendix A)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig17", "resnet32", "batch", augment=True)
    config.epochs = 41
    return config
