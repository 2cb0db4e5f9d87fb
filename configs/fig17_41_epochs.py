"""Fig. 17: Fig. 8 at half the training length.

Run:    python experiments/sweep.py --config=configs/fig17_41_epochs.py --workdir=runs/fig17
Expect: 143 runs of 41 epochs; the paper: worse than Fig. 8 (Appendix A);
        not yet run here in full
"""

from smallbatch_jax.config.protocol import cifar_config


def get_config():
    config = cifar_config("fig17", "resnet32", "batch", augment=True)
    config.epochs = 41
    return config
