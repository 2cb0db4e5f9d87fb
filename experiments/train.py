"""Trains one run, with the same step and the same store as a sweep.

    python experiments/train.py --config=configs/quickstart.py --config.batch_size=8 --config.base_lr=2^-7 \
        --workdir=runs/one

`--config.bn_batch_size` and `--config.seed` set the rest; the config's grid is not used. The same command resumes.
"""

import command
import training

from smallbatch_jax.config import experiment

CONFIG = command.define_config_flag()
WORKDIR = command.DEFINE_path("workdir", "Folder of the results; made if it is not there.")


def main() -> int:
    config = command.given_config(CONFIG)
    return training.train(experiment.single_run(config), command.given(WORKDIR, "runs/one"))


if __name__ == "__main__":
    command.run(main)
