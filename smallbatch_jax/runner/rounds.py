"""The rounds of a search: runs of one program that train together, chosen by `policy` from the stored rows alone.

Every process replays the policy from its start, so that a killed search resumes as if it had not been interrupted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.program import processes
from smallbatch_jax.runner import planning, policy
from smallbatch_jax.runner.jobs import Job, Setup
from smallbatch_jax.runner.progress import Status
from smallbatch_jax.store.workdir import read_workdir


def search_rounds(jobs: Sequence[Job], status: Status) -> Iterator[Job]:
    """Yields a job for every round that is left to train, with the goals of that round.

    Args:
      jobs: one for each program of the grid.
      status: updated with the runs that have begun and the rest of the budget.
    """
    by_shape = {(job.batch_size, job.bn_batch_size): job for job in jobs}
    experiment, num_examples = jobs[0].experiment, jobs[0].num_examples
    scalars = jobs[0].runs[0].scalars  # the same in all runs
    for job in jobs:
        ended = [run for run in job.runs if job.results.complete(run, experiment.epochs)]
        status.add_program(dict.fromkeys(ended, experiment.epochs), job.results, num_examples)
    asking, curves = policy.search(space_of(experiment, num_examples)), None
    while True:
        try:
            shape, goals = next(asking) if curves is None else asking.send(curves)
        except StopIteration:
            return
        job, runs = by_shape[shape], {run: replace(run, scalars=scalars) for run in goals}
        job.goals.clear()  # the phases of a job share them
        job.goals |= {runs[run]: epochs for run, epochs in goals.items()}
        if job.pending():
            stored = [job.results.epochs(run) for job in jobs for run in job.runs]
            if sum(stored) * num_examples >= (experiment.search.budget or math.inf):  # a smaller budget than before
                return
            status.runs = sum(map(bool, stored)) + sum(not job.results.epochs(run) for run in job.goals)
            left = (experiment.search.budget or 0.0) - sum(stored) * num_examples
            status.images = status.trained + max(0, round(left))
            yield job
        curves = {run: job.results.curve(runs[run], epochs) for run, epochs in goals.items()}


def with_budget(setup: Setup, workdir: Path) -> Experiment:
    """Returns the experiment with a budget in seconds converted to examples; a resumed workdir keeps its first conversion.

    Raises:
      InputError: if both are given, or with several processes, whose measurements would differ.
    """
    experiment, search = setup.experiment, setup.experiment.search
    if search.seconds is None:
        return experiment
    if search.budget is not None:
        raise InputError("search.seconds: a search has one budget; give search.seconds or search.budget, not both.")
    if processes.several():
        raise InputError("search.seconds: works in a single process only; give search.budget in examples.")
    if (workdir / "experiment.json").exists():
        stored = read_workdir(workdir)[0].search
        if stored.seconds == search.seconds:
            return replace(experiment, search=replace(search, budget=stored.budget))
    budget = planning.examples_in(search.seconds, setup)
    return replace(experiment, search=replace(search, budget=budget))


def space_of(experiment: Experiment, num_examples: int) -> policy.Space:
    """Returns the search space of an experiment, including its budget."""
    grid, search = experiment.grid, experiment.search
    return policy.Space(
        shapes=tuple(grid.shapes()),
        base_lrs=tuple(sorted(grid.base_lrs)),
        epochs=experiment.epochs,
        seeds=grid.seeds,
        budget=(search.budget or 0.0) / num_examples,
        fresh=search.fresh_seeds(grid.seeds),
        metric=experiment.metric,
    )
