"""How many devices share each batch: as many as the user asks for, else one.

A batch is sharded only on request: otherwise a run's last bits would depend on how many devices happen to be idle.
"""

import dataclasses

import jax

from smallbatch_jax.config.experiment import OWN, Experiment, InputError
from smallbatch_jax.runner.jobs import Job


def placed(job: Job) -> Job:
    """Returns the job with the number of devices that share each of its batches; see `data_devices` for what is refused."""
    return dataclasses.replace(job, data_devices=data_devices(job.experiment, jax.device_count()))


def data_devices(experiment: Experiment, devices: int) -> int:
    """Returns how many of the devices share each batch.

    Raises:
      InputError: if what the experiment asks for does not divide their number, or its model is the user's own.
    """
    asked = experiment.data_devices or 1
    if devices % asked:
        divisors = [d for d in range(1, devices + 1) if devices % d == 0]
        raise InputError(
            f"data_devices: {asked} does not divide the {devices} devices there are; use {', '.join(map(str, divisors))}."
        )
    if asked > 1 and experiment.model.name.startswith(OWN):  # which may do anything with its batch
        raise InputError(f"data_devices: {asked} devices cannot share the batches of an own model; use 1.")
    return asked
