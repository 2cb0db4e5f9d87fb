"""Times AdamW on the transformer of `notebooks/language_model.ipynb`: a sweep of 13 lanes, and 13 runs of plain JAX and Optax.

    python benchmarks/transformer.py [--json]

A plain run is a jitted step in a Python loop, all sequences on the device. Compilation and evaluation are not timed.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("experiments", "notebooks"))
import command
from absl import flags

from smallbatch_jax.config.experiment import OWN, from_config

SECONDS = flags.DEFINE_float("seconds", 3.0, "Seconds of each way in each round.", lower_bound=0.1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")
M = 4  # batch size
RATES = [2.0**-10 * 2 ** (k / 4) for k in range(-6, 7)]  # learning rates


def main() -> int:
    command.start_jax()
    import jax
    from language import Transformer, draw, random_language

    from smallbatch_jax import data
    from smallbatch_jax.models.adapters import adapted
    from smallbatch_jax.runner import planning
    from smallbatch_jax.runner.jobs import Setup

    language = random_language(8, seed=0)
    sequences = data.Dataset(draw(language, 2000, 16, seed=1), None, draw(language, 100, 16, seed=2), None, num_classes=8)
    model = adapted(Transformer(8)).settled(sequences.example)
    config = {"model": {"name": model.name}, "dataset": {"name": f"{OWN}random"}, "task": "next_token", "epochs": 100_000}
    config |= {"optimizer": {"name": "adamw", "rule": "constant"}, "grid": {"batch_sizes": (M,), "base_lrs": RATES}}
    trial = next(planning.measure(Setup(from_config(config | {"lanes": len(RATES)}), sequences, model.with_bn_batch_size)))
    trial.warm_up()
    ways = {"sweep": trial.train, "plain": plain(Transformer(8), sequences.train_images)}
    rounds = [{way: float(np.divide(*run(SECONDS.value))) for way, run in ways.items()} for _ in range(ROUNDS.value)]
    medians = {way: median(rates[way] for rates in rounds) for way in rounds[0]}
    ratio = median(rates["sweep"] / rates["plain"] for rates in rounds)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{device}, m = {M}: sweep {medians['sweep']:,.0f} sequences/s, plain {medians['plain']:,.0f}, {ratio:.2f} x")
    if JSON.value:
        print(json.dumps({"device": device, **medians, "ratio": ratio, "rounds": rounds}))
    return 0


def plain(model, tokens):
    """Returns a function that trains the runs for about `seconds` in total and returns (sequences, seconds)."""
    import jax
    import optax

    resident = jax.device_put(tokens)

    @jax.jit
    def step(params, state, learning_rate, indices):
        def loss(params):
            logits = model.apply(params, resident[indices])[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, resident[indices, 1:]).mean()

        updates, state = optax.adamw(learning_rate, weight_decay=0.0).update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def train(seconds: float) -> tuple[int, float]:
        rng, trained, spent = np.random.default_rng(0), 0, 0.0
        for k, learning_rate in enumerate(RATES, 1):
            params = model.init(jax.random.key(0), resident[:1])
            state = optax.adamw(learning_rate).init(params)
            while not trained or spent < k * seconds / len(RATES):
                began = time.perf_counter()
                for indices in rng.integers(len(tokens), size=(100, M)):
                    params, state = step(params, state, learning_rate, indices)
                jax.block_until_ready(params)
                trained, spent = trained + 100 * M, spent + time.perf_counter() - began
        return trained, spent

    train(0.0)  # compiles
    return train


if __name__ == "__main__":
    command.run(main)
