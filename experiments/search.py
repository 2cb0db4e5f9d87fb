"""Searches the grid of a config for the best batch size and learning rate, within a budget; ends with a recommendation.

    python experiments/search.py --config=configs/quickstart.py --workdir=runs/search

The budget is --config.search.budget in training examples or --config.search.seconds; by default it is two full runs for each
batch size (three with several seeds) plus the confirming runs. The same command resumes. At the end it draws the
figures into WORKDIR/figures and prints the recommendation.
"""

import training
from ml_collections import ConfigDict

from smallbatch_jax.config import experiment


def with_budget(config: ConfigDict) -> experiment.Experiment:
    """Returns the experiment of a config, with the default budget if the config has none."""
    chosen = experiment.from_config(config)
    if not chosen.search.active:
        from smallbatch_jax import data

        budget = chosen.search.default_budget(chosen.grid, chosen.epochs, data.num_train_examples(chosen.dataset))
        config.update_from_flattened_dict({"search.budget": budget})
        chosen = experiment.from_config(config)
    return chosen


if __name__ == "__main__":
    training.run(with_budget, "runs/search")
