"""Fig. 14: BN batch sizes of 2 to 256, ResNet-50 on ImageNet with augmentation, each m up to 128 at its best η̃ of Fig. 12.

Run:    python experiments/sweep.py --config=configs/fig14_imagenet.py --workdir=runs/fig14
        after configs/fig12_resnet50.py into runs/fig12, of which the rows m = 16 … 128 are needed
        Each row is optional, as in Fig. 12: --config.grid.batch_sizes="(16,256)"; and so is --config.precision=bfloat16.
Expect: 54 runs of 90 epochs, not yet run in full;
        the paper: best at a BN batch size of 16 … 64 for every m, worse as m grows (§3.6)
"""

from smallbatch_jax.config.protocol import imagenet_config


def get_config():
    config = imagenet_config("fig14")
    config.grid.batch_sizes = tuple(2**k for k in range(4, 12))  # 16 … 2048
    config.grid.bn_batch_sizes = tuple(2**k for k in range(1, 9))  # 2 … 256
    config.grid.base_lrs_from = ("runs/fig12",)
    # §3.6 prints 10^-10 and 10^-9. Powers of two are meant: all other base learning rates of the paper are (§3.1), and steps
    # of 10^-10 would train nothing.
    config.grid.base_lr_by_batch_size = ((256, 2**-10), (512, 2**-10), (1024, 2**-10), (2048, 2**-9))
    return config
