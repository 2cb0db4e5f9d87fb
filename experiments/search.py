"""Searches the grid of a config for the best batch size and learning rate, within a budget; ends with a recommendation.

    python experiments/search.py --config=configs/quickstart.py --workdir=runs/search

The budget is --config.search.budget in training examples or --config.search.seconds; by default it is two full runs for each
batch size (three with several seeds) plus the confirming runs. The same command resumes. At the end it draws the
figures into WORKDIR/figures and prints the recommendation.
"""

import command
import training

from smallbatch_jax.config import experiment

CONFIG = command.define_config_flag()
WORKDIR = command.DEFINE_path("workdir", "Folder of the results; made if it is not there.")


def main() -> int:
    config = command.given_config(CONFIG)
    chosen = experiment.from_config(config)
    if not chosen.search.active:
        command.import_jax()
        from smallbatch_jax import data

        budget = chosen.search.default_budget(chosen.grid, chosen.epochs, data.num_train_examples(chosen.dataset))
        config.update_from_flattened_dict({"search.budget": budget})
        chosen = experiment.from_config(config)
    return training.train(chosen, command.given(WORKDIR, "runs/search"))


if __name__ == "__main__":
    command.run(main)
