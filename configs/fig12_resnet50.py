"""Fig. 12: ResNet-50 with batch norm, ImageNet with augmentation, the mean of two runs.

Run:    python experiments/sweep.py --config=configs/fig12_resnet50.py --workdir=runs/fig12
        after python experiments/prepare_data.py --dataset=imagenet2012
        Each row is optional: --config.grid.batch_sizes="(16,)" trains one batch size, and the same command with more of
        them, such as "(16,32)", adds theirs to the same workdir later. --config.precision=bfloat16 computes in bfloat16,
        which is faster where the device has it; a workdir keeps the precision that it began with.
Expect: 286 runs of 90 epochs, not yet run in full; the paper: best at m = 16 … 64, m below 16 stable at every η̃ (§3.5)
"""

from smallbatch_jax.config.protocol import imagenet_config


def get_config():
    config = imagenet_config("fig12")
    config.grid.seeds = (0, 1)
    return config
