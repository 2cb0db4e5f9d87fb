"""The quickstart with AdamW and the square-root rule: η = η̃·√m at batch size m, and betas keep their half-life in examples.

Run:    python experiments/sweep.py --config=configs/quickstart_adamw.py --workdir=runs/quickstart_adamw
Expect: 45 runs of 8 epochs: 5 min on 2 cores (AMD EPYC, beside other work, 2026-11-26); none diverges; best 98.1 % at m = 2,
        97.5 % at m = 32, 74.4 % at m = 512
"""

from smallbatch_jax.config.experiment import default_config


def get_config():
    config = default_config()
    config.name = "quickstart_adamw"
    config.dataset.name = "digits"
    config.model.name = "alexnet"
    config.model.norm = "none"
    config.epochs = 8
    config.optimizer.name = "adamw"
    config.optimizer.rule = "sqrt"
    config.optimizer.beta_rule = "half_life"
    config.optimizer.beta_batch_size = 32
    config.weight_decay = 1e-2
    config.grid.batch_sizes = (2, 8, 32, 128, 512)
    config.grid.base_lrs = tuple(2.0**k for k in range(-17, -8))
    return config
