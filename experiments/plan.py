"""Lists what a config would train, program by program; trains nothing.

    python experiments/plan.py --config=configs/fig08_resnet32.py

A program is compiled once and trains all runs of one batch size and BN batch size.
"""

import command

from smallbatch_jax import experiment

CONFIG = command.define_config_flag()


def main() -> int:
    from smallbatch_jax import data
    from smallbatch_jax.data import order

    chosen = command.resolved(experiment.from_config(command.given_config(CONFIG)))
    if chosen.drawn_from:
        print(f"{chosen.name}: trains nothing, is drawn from {', '.join(chosen.drawn_from)}")
        return 0
    num_examples = data.num_train_examples(chosen.dataset.name, chosen.dataset.data_dir)
    chosen.require_examples(num_examples)
    programs = experiment.programs(chosen.runs())
    print(f"{chosen.name}: {len(chosen.runs())} runs of {chosen.epochs} epochs in {len(programs)} programs")
    print(f"{'m':>6}{'BN batch':>10}{'runs':>6}{'steps per run':>15}{'images':>16}")
    for (m, b), runs in programs.items():
        steps = order.total_steps(chosen.epochs, num_examples, m)
        print(f"{m:>6}{b:>10}{len(runs):>6}{steps:>15,}{steps * m * len(runs):>16,}")
    return 0


if __name__ == "__main__":
    command.run(main)
