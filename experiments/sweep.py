"""Trains the grid of a config: every batch size × base learning rate, in a few compiled programs.

    python experiments/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command resumes. At the end it draws the figures into WORKDIR/figures and prints the table.
"""

import command
import training

from smallbatch_jax.config import experiment

CONFIG = command.define_config_flag()
WORKDIR = command.DEFINE_path("workdir", "Folder of the results; made if it is not there.")


def main() -> int:
    config = command.given_config(CONFIG)
    return training.train(experiment.from_config(config), command.given(WORKDIR, "runs/quickstart"))


if __name__ == "__main__":
    command.run(main)
