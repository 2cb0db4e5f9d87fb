"""Fig. 18: Fig. 8 at twice the training length.

Run:    python experiments/sweep.py --config=configs/fig18_164_epochs.py --workdir=runs/fig18
Expect: 143 runs of 164 epochs; the paper: better than Fig. 8, at the best η̃ mainly for large m (Appendix A);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    config = cifar_config("fig18", "resnet32", "batch", augment=True)
    config.epochs = 164
    return config
