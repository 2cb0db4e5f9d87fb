"""Fig. 18: Fig. 8 at twice the training length.

Run:    python experiments/sweep.py --config=configs/fig18_164_epochs.py --workdir=runs/fig18
Expect: 143 runs of 164 epochs, not yet run in full;
        the paper: better than Fig. 8, at the best η̃ mainly for large m (Appendix A)
"""

from smallbatch_jax.config.protocol import full_grid


def get_config():
    config = full_grid("fig18", "resnet32", "batch", augment=True)
    config.epochs = 164
    return config
