"""Trains one run, with the same step and the same store as a sweep.

    python experiments/train.py --config=configs/quickstart.py --config.batch_size=8 --config.base_lr=2^-7 \
        --workdir=runs/one

`--config.bn_batch_size` and `--config.seed` set the rest; the config's grid is not used. The same command resumes.
"""

import training

from smallbatch_jax.config import experiment

if __name__ == "__main__":
    training.run(experiment.single_run, "runs/one")
