"""Batches of 8 that grow tenfold where the quickstart's learning rate falls to a tenth (Smith et al. 2017): digits, ten seeds.

Run:    python experiments/sweep.py --config=configs/batch_growth_digits.py --workdir=runs/batch_growth_digits
        and against it, into runs/decay_digits, with --config.schedule.batch_growth=1
Expect: 50 runs of 8 epochs: 8 min on 2 cores of an AMD EPYC (2026-11-26, beside much other work). Growth is as good as decay in
        759 updates instead of 1,437: 97.6 ± 0.4 % and 97.6 ± 0.5 % at η̃ = 2^-9, 98.0 ± 0.8 % both at 2^-8, 97.2 ± 0.7 % and
        97.2 ± 0.6 % at 2^-7; 6 of 10 runs diverge at 2^-6 and all at 2^-5, with both
"""

from smallbatch_jax.config.experiment import default_config


def get_config():
    config = default_config()
    config.name = "batch_growth_digits"
    config.dataset.name = "digits"
    config.model.name = "alexnet"
    config.model.norm = "none"
    config.epochs = 8
    config.weight_decay = 5e-4
    config.schedule.batch_growth = 10
    config.grid.batch_sizes = (8,)
    config.grid.base_lrs = tuple(2.0**k for k in range(-9, -4))
    config.grid.seeds = tuple(range(10))
    return config
