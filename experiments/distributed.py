"""Several processes that run one command together, on one or many machines: how each joins the others, and how it ends.

JAX ends a process from native code, with pages of output, when another is lost. So each process here is two: the one that was
started watches, and its child does the work. The watcher passes on the child's output without the messages of JAX's processes
about each other, and says in one line how the child ended.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from absl import flags

from smallbatch_jax.config.fields import InputError
from smallbatch_jax.runner import signals

HEARTBEAT_SECONDS = 30  # of silence, after which a process is taken to be lost if its connections have not failed before
END_SECONDS = 600  # that the others wait for the first process, which draws the figures
PR_SET_PDEATHSIG = 1  # of linux/prctl.h

COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT at which process 0 is reached by the others; JAX_COORDINATOR_ADDRESS if not given."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are; JAX_NUM_PROCESSES if not given.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; JAX_PROCESS_ID if not given.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes that Slurm, Open MPI, Kubernetes or a TPU pod started, which say the rest."
)
JOIN_SECONDS = flags.DEFINE_integer("join_seconds", 300, "How long to wait for the other processes to start.", lower_bound=1)


def asked() -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None if this process is alone.

    Raises:
      InputError: if the flags or variables are incomplete or contradict each other.
    """
    address = COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if DISTRIBUTED.value and not address:
        return {}
    count, number = _number(PROCESSES, "JAX_NUM_PROCESSES"), _number(PROCESS, "JAX_PROCESS_ID")
    if address is None:
        if (count or 1) > 1:
            raise InputError("--coordinator_address: not given; several processes need it, for example 10.0.0.1:1234")
        return None
    if DISTRIBUTED.value and count is None and number is None:
        return {"coordinator_address": address}
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise InputError(f"--coordinator_address: got {address!r}, accepts HOST:PORT")
    if count is None or number is None:
        raise InputError(f"--{'num_processes' if count is None else 'process_id'}: not given, with a --coordinator_address")
    if count < 1 or not 0 <= number < count:
        raise InputError(f"--process_id: got {number} of {count} processes, accepts 0 to --num_processes - 1")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def _number(flag: Any, variable: str) -> int | None:
    text = os.environ.get(variable)
    if flag.value is not None or text is None:
        return flag.value
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{variable}: got {text!r}, accepts an integer") from None


def supervise() -> None:
    """With several processes, forks and returns in the child only; the parent watches it and ends as it does.

    Call it before JAX is imported: a child does not inherit JAX's threads.
    """
    chosen = asked()
    if chosen is None:
        return
    reader, writer = os.pipe()
    watcher, child = os.getpid(), os.fork()
    if child:
        os.close(writer)
        _watch(child, reader, chosen.get("process_id"))
    os.close(reader)
    os.setsid()  # Ctrl-C comes from the watcher, once
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != watcher:
        os._exit(1)
    sys.stdout, sys.stderr = (_duplicate(stream) for stream in (sys.stdout, sys.stderr))
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)


def _duplicate(stream: Any) -> Any:
    """Returns the stream on another descriptor, which native code does not write to."""
    stream.flush()
    return open(os.dup(stream.fileno()), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)


def _watch(child: int, reader: int, number: int | None) -> NoReturn:
    for signum in signals.handled():
        signal.signal(signum, lambda signum, _: os.kill(child, signum))
    with open(reader, errors="backslashreplace") as lines:
        for line in without_noise(lines):
            print(line, end="", file=sys.stderr, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        name, which = signal.Signals(-status).name, "" if number is None else f" {number}"
        cause = "another process was lost" if status == -signal.SIGABRT else f"it was ended by {name}"
        print(f"process{which} stopped: {cause}; the same command goes on", file=sys.stderr, flush=True)
    os._exit(status if status >= 0 else 1)


NOISE = re.compile(r"\[Gloo\]|connected to \d+ peer ranks|coordination_service|preemption_sync|JAX distributed service")
NATIVE_LINE = re.compile(r"[IWEF]\d{4} ")  # beginning of a native log entry, which may have more lines


def without_noise(lines: Iterable[str]) -> Iterable[str]:
    """Yields the lines without the log entries of JAX's processes about each other, up to a fatal one."""
    dropping = ended = False
    for line in lines:
        if NATIVE_LINE.match(line):
            dropping = False
        if NOISE.search(line):
            dropping, ended = bool(NATIVE_LINE.match(line)), ended or line.startswith("F")
        elif line.strip() and not dropping and not ended:  # lines of two threads at once come in pieces
            yield line


def join() -> None:
    """Joins the other processes, if there are any; call it before JAX makes its devices.

    Raises:
      InputError: if they cannot be reached.
    """
    chosen = asked()
    if chosen is None:
        return
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            **chosen,
            initialization_timeout=JOIN_SECONDS.value,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator_address: the processes cannot be joined: {error}") from None


def failure(error: Exception) -> str:
    """Returns one line for an exception of JAX in this process."""
    import jax

    reason = " ".join(str(error).split())[:200]
    lost = re.search(r"gloo|nccl|connection|socket|heartbeat", reason, re.IGNORECASE)
    cause = f"another process was lost ({reason})" if lost else reason
    return f"process {jax.process_index()} stopped: {cause}; the same command goes on"
