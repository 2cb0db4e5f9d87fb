"""Predicts the cost of a config, program by program, from a few seconds of training each; stores nothing.

    python experiments/plan.py --config=configs/quickstart.py
    python experiments/plan.py --config=configs/fig08_resnet32.py --random_images --elsewhere=h100.json

A program is compiled once and trains all runs of one batch size and BN batch size. "time" is training and evaluation, on this
machine, of the runs that did not diverge within the probe. "memory" is that of the compiled program, without the dataset; the
last line also has the memory of this whole command, which a sweep needs as well. "shared by" is the number of devices that
share each batch; with more than one, a lane is a row of them (docs/scaling.md). Where batches grow, --probe_seconds=0 lists the
steps and images, and nothing else is predicted.
--elsewhere adds columns for another device, from the output of `benchmark.py --json` there for the same model;
--elsewhere_devices=1,8 plans for one and for eight of them, which divide the runs of each program.
--probe_seconds=0 measures nothing; those columns then assume that no run diverges.
--target=h100 (h200, a100, v5e, v6e, v5p) compiles the programs for an accelerator that this machine may lack, and estimates
their cost there; --batch_sizes=4,128 selects some. A compilation takes half a minute to several minutes, and is done once.
"""

import json
import math
import os
from pathlib import Path

import command
from absl import flags

from smallbatch_jax.config import experiment
from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.config.extras import MissingPackage
from smallbatch_jax.config.text import duration

CONFIG = command.define_config_flag()
SECONDS = command.DEFINE_number("probe_seconds", "2", "Seconds that each program is tried for; 0 measures nothing.", 0, 1e6)
RANDOM = flags.DEFINE_bool("random_images", False, "Measure on random images of the right shape, without the data.")
ELSEWHERE = command.DEFINE_path("elsewhere", "File with the JSON line of benchmark.py on another device.")
THERE = command.DEFINE_numbers("elsewhere_devices", "1", "Comma-separated numbers of such devices.")

NAMES = ["h100", "h200", "a100", "v5e", "v6e", "v5p"]
TARGET = flags.DEFINE_enum("target", None, NAMES, "Accelerator to compile for and estimate.")
SIZES = command.DEFINE_numbers("batch_sizes", None, "Comma-separated batch sizes that --target compiles; all by default.")


class Elsewhere:
    """Columns of the table for other devices: seconds of training by number of devices, and their sums."""

    def __init__(self, chosen: Experiment, path: str | None):
        """Reads the last line of a file, as benchmark.py prints it; without a path there are no columns."""
        self._counts = THERE.value if path else ()
        self._totals = [0.0] * len(self._counts)
        if path:
            model = chosen.model.name, chosen.model.norm
            try:
                stored = json.loads(Path(path).read_text().strip().split("\n")[-1])
                self._device, rows = stored["device"], stored["results"]
                ours = [row for row in rows if (row["model"], row["norm"]) == model]
                self._rates = [{name: float(row[name]) for name in ("batch_size", "images_per_second")} for row in ours]
                if not all(0 < value < math.inf for row in self._rates for value in row.values()):
                    raise ValueError("a batch size or rate is not above 0 and finite")
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise InputError(f"--elsewhere={path}: is not what benchmark.py --json prints: {reason}") from None

    def heads(self) -> str:
        return "".join(f"{'there' if count == 1 else f'there x {count}':>16}" for count in self._counts)

    def columns(self, batch_size: int, runs: int, images: int) -> str:
        """Returns the columns of a program, each of whose runs trains on `images`, and adds them to the totals."""
        from smallbatch_jax.runner import planning

        seconds = [planning.elsewhere(batch_size, runs, images, self._rates, count) for count in self._counts]
        self._totals = [total + more for total, more in zip(self._totals, seconds, strict=True)]
        return "".join(f"{duration(x):>16}" for x in seconds)

    def totals(self) -> str:
        counted = [f"{duration(x)}" + f" ({n} of them)" * (n > 1) for n, x in zip(self._counts, self._totals, strict=True)]
        return f"on {self._device} {', '.join(counted)}" if counted else ""


def main() -> int:
    if TARGET.value:
        os.environ["JAX_PLATFORMS"] = "cpu"  # an installed TPU compiler would look for a TPU
    command.import_jax()
    from smallbatch_jax import data
    from smallbatch_jax.data.order import BatchSchedule
    from smallbatch_jax.study.study import choose_base_lrs

    chosen = choose_base_lrs(experiment.from_config(command.given_config(CONFIG)))
    if chosen.drawn_from:
        print(f"{chosen.name}: trains nothing, is drawn from {', '.join(chosen.drawn_from)}")
        return 0
    if chosen.schedule.batch_growth > 1 and (SECONDS.value or TARGET.value or ELSEWHERE.value):
        raise InputError(
            f"schedule.batch_growth: got {chosen.schedule.batch_growth}, but its time cannot be predicted; use 1 or "
            "--probe_seconds=0 without --target and --elsewhere."
        )
    if SIZES.value and not TARGET.value:
        raise InputError("--batch_sizes: belongs to --target; use --config.grid.batch_sizes to plan fewer.")
    if TARGET.value and ELSEWHERE.value:
        raise InputError("--elsewhere: the time on another device is planned without --target; give one of them.")
    there = Elsewhere(chosen, ELSEWHERE.value)
    listed = Elsewhere(chosen, None) if SECONDS.value else there  # the runs that diverge are known after the probe
    num_examples = data.num_train_examples(chosen.dataset)
    chosen.require_examples(num_examples)
    programs = experiment.programs(chosen.runs())
    print(f"{chosen.name}: {len(chosen.runs())} runs of {chosen.epochs} epochs in {len(programs)} programs")
    print(f"{'m':>6}{'BN batch':>10}{'runs':>6}{'steps per run':>15}{'images':>16}{listed.heads()}")
    for (m, b), runs in programs.items():
        batches = BatchSchedule.of(chosen, num_examples, m)
        steps, images = batches.total_steps, batches.examples(batches.total_steps)
        columns = listed.columns(m, len(runs), images)
        print(f"{m:>6}{b:>10}{len(runs):>6}{steps:>15,}{images * len(runs):>16,}{columns}")
    if chosen.search.budget:
        print(f"the search trains on at most {chosen.search.budget:,.0f} of these images, plus one run")
    if TARGET.value:
        compile_for(TARGET.value, chosen)
    elif SECONDS.value:
        measure(chosen, there)
    elif there.heads():
        print(there.totals())
    return 0


def measure(chosen: Experiment, there: Elsewhere) -> None:
    """Prints the measured cost of each program, and the sums."""
    command.start_jax()
    from smallbatch_jax.program import devices
    from smallbatch_jax.runner import flops, planning
    from smallbatch_jax.runner.jobs import Setup

    try:
        dataset = command.load_data(chosen.dataset, RANDOM.value)
    except MissingPackage:
        raise
    except InputError as error:
        print(f"not measured: {error} Or use --random_images.")
        return
    print(f"\n{'m':>6}{'BN batch':>10}{'lanes':>7}{'shared by':>11}{'diverge':>9}{'FLOPs':>10}", end="")
    print(f"{'images/s':>10}{'compile':>9}{'memory':>10}{'time':>14}{there.heads()}")
    plans = []
    for trial in planning.measure(Setup(chosen, dataset)):
        job, m = trial.job, trial.job.batch_size
        per_image = flops.flops_per_image(job.model_of(None), dataset.image_shape)
        plan = planning.plan_program(trial, per_image, SECONDS.value)
        plans.append(plan)
        columns = there.columns(m, len(job.runs) - plan.diverging, job.total_steps * m)
        print(
            f"{m:>6}{job.bn_batch_size:>10}{trial.program.lanes:>7}{job.data_devices:>11}{plan.diverging:>9}"
            f"{plan.flops:>10.1e}{plan.images_per_second:>10,.0f}{plan.compile_seconds:>7.1f} s"
            f"{plan.peak_bytes / 2**20:>6,.0f} MiB{duration(plan.seconds):>14}{columns}",
            flush=True,
        )
    largest, in_all = max(plan.peak_bytes for plan in plans), devices.peak_bytes_in_use()
    print(
        f"{len(plans)} compilations, {sum(plan.flops for plan in plans):.1e} FLOPs, at most {largest / 2**20:,.0f} MiB"
        f" ({in_all / 2**20:,.0f} with all else, as this command took); here {duration(planning.total_seconds(plans))}"
        + (f", {there.totals()}" if there.heads() else "")
    )


def compile_for(name: str, chosen: Experiment) -> None:
    """Prints the compiler's estimate of each program's time on a target, and the sum."""
    command.start_jax()
    from smallbatch_jax.runner import target

    sizes = SIZES.value or ()
    unknown = sorted(set(sizes) - {m for m, _ in experiment.programs(chosen.runs())})
    if unknown:
        raise InputError(f"--batch_sizes={','.join(map(str, unknown))}: not in the grid, {chosen.grid.batch_sizes}")
    dataset = command.load_data(chosen.dataset, random=True)
    platform = target.TARGETS[name].platform
    moved = "MiB moved" if platform == "gpu" else "MiB written"
    print(f"\nEstimated by the compiler for one {name}, nothing is measured; per step of all lanes:")
    print(
        f"{'m':>6}{'BN batch':>10}{'lanes':>7}{'kernels':>9}{moved:>13}{'memory':>12}{'step':>11}{'images/s':>10}{'time':>14}"
    )
    total = 0.0
    for found in target.estimate(chosen, dataset, name, sizes):
        total += found.seconds
        m, lanes, step = found.batch_size, found.compiled.lanes, found.step_seconds
        print(f"{m:>6}{found.bn_batch_size:>10}{lanes:>7}{found.compiled.kernels:>9,}{found.mib_per_step:>13,.0f}", end="")
        print(f"{found.compiled.peak_bytes / 2**20:>8,.0f} MiB{1e3 * step:>8.2f} ms{m * lanes / step:>10,.0f}", end="")
        print(f"{duration(found.seconds):>14}", flush=True)
    print(f"in all {duration(total)} if no run diverges, by the compiler's estimate ({target.ASSUMPTIONS[platform]})")


if __name__ == "__main__":
    command.run(main)
