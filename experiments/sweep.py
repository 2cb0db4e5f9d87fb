"""Trains the grid of a config: every batch size × base learning rate, in a few compiled programs.

    python experiments/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command resumes. At the end it draws the figures into WORKDIR/figures and prints the table.
"""

import training

from smallbatch_jax.config import experiment

if __name__ == "__main__":
    training.run(experiment.from_config, "runs/quickstart")
