"""How many devices should share a batch: a model of what a step costs on them, explained in docs/scaling.md."""

from dataclasses import dataclass

from smallbatch_jax.config.experiment import OWN, Experiment, InputError


@dataclass(frozen=True)
class Machine:
    """What a step costs on one kind of device."""

    flops_per_second: float  # of a device, in a training step
    exchange_seconds: float  # of the smallest exchange among the devices
    bytes_per_second: float  # exchanged by each device


# By platform, and whether the devices are of several processes. CPU measured, see docs/scaling.md; the others as published, not
# measured here.
MACHINES = {
    ("cpu", False): Machine(1e11, 1e-4, 1e9),
    ("cpu", True): Machine(1e11, 1.5e-3, 1e9),
    ("gpu", False): Machine(1e13, 2e-5, 1e11),
    ("gpu", True): Machine(1e13, 5e-5, 2e10),
    ("tpu", False): Machine(3e13, 5e-6, 1e11),
    ("tpu", True): Machine(3e13, 5e-6, 1e11),
}


def machine(platform: str, several: bool) -> Machine:
    """Of a platform by JAX's name, one that is not known taken for a GPU; `several` processes or one."""
    return MACHINES.get((platform, several), MACHINES["gpu", several])


@dataclass(frozen=True)
class Network:
    """What a step of a network takes."""

    flops_per_image: float
    parameter_bytes: int
    batch_norms: int  # layers


def step_seconds(machine: Machine, network: Network, batch_size: int, bn_batch_size: int, devices: int) -> float:
    """Seconds of a step of one run whose batch is shared by so many devices; what every step costs anyhow is left out.

    They exchange the gradients once, the running averages with them; and twice for each batch norm, forward and backward, the
    statistics of a BN batch that lies on several devices.
    """
    share = batch_size / devices
    computing = share * network.flops_per_image / machine.flops_per_second
    if devices == 1:
        return computing
    exchanges = 1 + network.batch_norms * (2 if bn_batch_size > share else 0)
    moved = 2 * network.parameter_bytes * (devices - 1) / devices
    return computing + exchanges * machine.exchange_seconds + moved / machine.bytes_per_second


def asked_devices(experiment: Experiment, devices: int) -> int | None:
    """The `data_devices` that the experiment asks for; None if it leaves them to be chosen.

    Raises:
      InputError: if their number does not divide that of the devices there are, or the model is the user's own.
    """
    asked = experiment.data_devices
    if asked is not None and devices % asked:
        raise InputError(
            f"data_devices: {asked} does not divide the {devices} devices there are; use "
            f"{', '.join(map(str, _divisors(devices)))}."
        )
    if (asked or 1) > 1 and _is_own(experiment):
        raise InputError(f"data_devices: {asked} devices cannot share the batches of an own model; use 1.")
    return asked


def data_devices(
    experiment: Experiment,
    shape: tuple[int, int],
    runs: int,
    devices: int,
    machine: Machine,
    network: Network,
    blocks: int | None = None,
) -> int:
    """How many of the devices should share each batch of a program: 1 while each has a run of its own, else the fastest.

    Args:
      experiment: of which the program is.
      shape: batch size and BN batch size of the program.
      runs: of the program.
      devices: that there are.
      machine, network: of the model of `step_seconds`.
      blocks: that each batch is cut into, to be shared evenly; None if they may be cut.
    """
    if _is_own(experiment) or runs >= devices:
        return 1
    able = [d for d in _divisors(devices) if experiment.can_share(*shape, d) and (blocks or d) % d == 0]
    return min(able, key=lambda d: (-(-runs // (devices // d)) * step_seconds(machine, network, *shape, d), d))


def _is_own(experiment: Experiment) -> bool:
    """Whether its model may do anything with its batch."""
    return experiment.model.name.startswith(OWN)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
