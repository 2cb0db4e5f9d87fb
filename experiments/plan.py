"""What a config would cost, program by program, from a few seconds of each; keeps nothing that it trains.

    python experiments/plan.py --config=configs/quickstart.py
    python experiments/plan.py --config=configs/fig08_resnet32.py --random_images --elsewhere=h100.json

A program is compiled once and trains all runs of one batch size and BN batch size. Time: of training and evaluating the
runs that did not diverge within the probe, on this machine. Memory: of the compiled program, the dataset not counted; in the
last line also what this command took in all, which a sweep takes as well: it compiles and runs the same programs.
"shared by": how many devices share each batch; with more than one, a lane is a row of them (docs/scaling.md).
--elsewhere adds a column for another device, from what `benchmark.py --json` printed there for the same model; and for as many
of them as --elsewhere_devices names, which share out the runs of each program.
--probe_seconds=0 only lists, with those columns for runs that all train to their end.
"""

import json
from pathlib import Path

import command
from absl import flags

from smallbatch_jax.config import experiment
from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.config.extras import MissingPackage

CONFIG = command.define_config_flag()
SECONDS = flags.DEFINE_float("probe_seconds", 2.0, "Seconds that each program is tried for; 0 measures nothing.", lower_bound=0)
RANDOM = flags.DEFINE_bool("random_images", False, "Measure on random images of the right shape: the data need not be here.")
ELSEWHERE = command.DEFINE_path("elsewhere", "File with the JSON line of benchmark.py on another device.")
THERE = flags.DEFINE_list("elsewhere_devices", ["1"], "Numbers of such devices, with commas between.")


def main() -> int:
    command.import_jax()
    from smallbatch_jax import data
    from smallbatch_jax.data import order

    chosen = command.resolved(experiment.from_config(command.given_config(CONFIG)))
    if chosen.drawn_from:
        print(f"{chosen.name}: trains nothing, is drawn from {', '.join(chosen.drawn_from)}")
        return 0
    there = _stored(ELSEWHERE.value, chosen) if ELSEWHERE.value else None
    num_examples = data.num_train_examples(chosen.dataset.name, chosen.dataset.data_dir, chosen.dataset.image_size)
    chosen.require_examples(num_examples)
    programs = experiment.programs(chosen.runs())
    alone = there if not SECONDS.value else None  # else the runs that diverge are known first
    print(f"{chosen.name}: {len(chosen.runs())} runs of {chosen.epochs} epochs in {len(programs)} programs")
    print(f"{'m':>6}{'BN batch':>10}{'runs':>6}{'steps per run':>15}{'images':>16}{_heads(alone)}")
    total = [0.0] * len(_devices())
    for (m, b), runs in programs.items():
        steps = order.total_steps(chosen.epochs, num_examples, m)
        seconds = _seconds(alone, m, len(runs), steps * m)
        total = [x + y for x, y in zip(total, seconds, strict=False)]
        print(f"{m:>6}{b:>10}{len(runs):>6}{steps:>15,}{steps * m * len(runs):>16,}{_columns(seconds)}")
    if alone:
        print(_totals(alone, total))
    if SECONDS.value:
        _measure(chosen, there)
    return 0


def _measure(chosen: Experiment, there: dict | None) -> None:
    """Prints what each program costs, and the sums."""
    command.start_jax()
    from smallbatch_jax import data
    from smallbatch_jax.program import devices
    from smallbatch_jax.runner import planning
    from smallbatch_jax.runner.progress import duration

    try:
        dataset = (data.random if RANDOM.value else data.load)(
            chosen.dataset.name, chosen.dataset.data_dir, chosen.dataset.image_size
        )
    except MissingPackage:
        raise
    except InputError as error:
        print(f"not measured: {error} Or use --random_images.")
        return
    print(f"\n{'m':>6}{'BN batch':>10}{'lanes':>7}{'shared by':>11}{'diverge':>9}{'FLOPs':>10}", end="")
    print(f"{'images/s':>10}{'compile':>9}{'memory':>10}{'time':>14}{_heads(there)}")
    plans, total = [], [0.0] * len(_devices())
    for trial in planning.measure(chosen, dataset):
        job, image_shape = trial.job, dataset.image_shape
        flops = planning.flops_per_image(job.model_of(None), image_shape)
        plan = planning.plan_program(job, flops, planning.probe(trial, SECONDS.value))
        plans.append(plan)
        seconds = _seconds(there, plan.batch_size, plan.runs - plan.diverging, plan.steps * plan.batch_size)
        total = [x + y for x, y in zip(total, seconds, strict=False)]
        print(
            f"{plan.batch_size:>6}{plan.bn_batch_size:>10}{plan.lanes:>7}{plan.data_devices:>11}{plan.diverging:>9}{plan.flops:>10.1e}"
            f"{plan.images_per_second:>10,.0f}{plan.compile_seconds:>7.1f} s{plan.peak_bytes / 2**20:>6,.0f} MiB"
            f"{duration(plan.seconds):>14}{_columns(seconds)}",
            flush=True,
        )
    largest, in_all = max(plan.peak_bytes for plan in plans), devices.peak_bytes_in_use()
    print(
        f"{len(plans)} compilations, {sum(plan.flops for plan in plans):.1e} FLOPs, at most {largest / 2**20:,.0f} MiB"
        f" ({in_all / 2**20:,.0f} with all else, as this command took); here {duration(planning.total_seconds(plans))}"
        + ("" if there is None else f", {_totals(there, total)}")
    )


def _devices() -> list[int]:
    """How many devices elsewhere."""
    given = THERE.value or []
    found = [int(text) for text in given if text.isascii() and text.isdigit() and int(text)]
    if len(found) < len(given) or not found:
        raise InputError(f"--elsewhere_devices={','.join(given)}: must be whole numbers from 1 on, with commas between.")
    return found


def _heads(there: dict | None) -> str:
    return "" if there is None else "".join(f"{'there' if count == 1 else f'there x {count}':>16}" for count in _devices())


def _seconds(there: dict | None, batch_size: int, runs: int, images: int) -> list[float]:
    """Of training, for each number of devices elsewhere."""
    from smallbatch_jax.runner import planning

    return [] if there is None else [planning.elsewhere(batch_size, runs, images, there["results"], n) for n in _devices()]


def _columns(seconds: list[float]) -> str:
    from smallbatch_jax.runner.progress import duration

    return "".join(f"{duration(x):>16}" for x in seconds)


def _totals(there: dict, total: list[float]) -> str:
    from smallbatch_jax.runner.progress import duration

    counted = [f"{duration(x)}" + (f" ({n} of them)" if n > 1 else "") for n, x in zip(_devices(), total, strict=True)]
    return f"on {there['device']} {', '.join(counted)}"


def _stored(path: str, chosen: Experiment) -> dict:
    """The last line of a file, as benchmark.py prints it, with its results for the config's model alone."""
    try:
        stored = json.loads(Path(path).read_text().strip().split("\n")[-1])
        results = [row for row in stored["results"] if (row["model"], row["norm"]) == (chosen.model.name, chosen.model.norm)]
        return {"device": stored["device"], "results": results}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--elsewhere={path}: is not what benchmark.py --json prints: {type(error).__name__}: {error}"
        ) from None


if __name__ == "__main__":
    command.run(main)
