"""Joins and supervises several processes that run one command together, on one or many machines.

When one process is lost, JAX ends the others from native code, with pages of output. So each process forks: the parent watches
and the child does the work. The parent forwards the child's output without JAX's messages about other processes, and reports in
one line how the child ended.
"""

import ctypes
import mmap
import os
import re
import signal
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import command
from absl import flags

from smallbatch_jax.config.fields import InputError
from smallbatch_jax.runner import signals

COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; JAX_COORDINATOR_ADDRESS if not given.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes; JAX_NUM_PROCESSES if not given.")
PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0; JAX_PROCESS_ID if not given.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes that Slurm, Open MPI, Kubernetes or a TPU pod started; JAX finds them."
)
JOIN_SECONDS = flags.DEFINE_integer("join_seconds", 300, "How long to wait for the other processes to start.", lower_bound=1)

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
NOISE = re.compile(r"\[Gloo\]|connected to \d+ peer ranks|coordination_service|preemption_sync|JAX distributed service")
NATIVE_LINE = re.compile(r"[IWEF]\d{4} ")  # beginning of a native log entry, which may have more lines
JOINED = mmap.mmap(-1, 1)  # shared by the watcher and its child: 1 once the processes have joined


def asked() -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None if this process is alone.

    Raises:
      InputError: if the flags or variables are incomplete or contradict each other.
    """
    address = COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, number = _number(PROCESSES, "JAX_NUM_PROCESSES"), _number(PROCESS, "JAX_PROCESS_ID")
    if DISTRIBUTED.value and (not address or (count is None and number is None)):
        return {"coordinator_address": address}  # JAX detects the rest
    if not address:
        if (count or 1) > 1 or PROCESS.value is not None:
            raise InputError("--coordinator_address: not given; several processes need it, for example 10.0.0.1:1234")
        return None
    port = re.fullmatch(r".+:(\d{1,5})", address)
    if port is None or int(port[1]) >= 2**16:
        raise InputError(f"--coordinator_address: got {address!r}, accepts HOST:PORT")
    if count is None or number is None:
        raise InputError(f"--{'num_processes' if count is None else 'process_id'}: not given, with a --coordinator_address")
    if not 0 <= number < count:
        raise InputError(f"--process_id: got {number} of {count} processes, accepts 0 to --num_processes - 1")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def _number(flag: Any, variable: str) -> int | None:
    text = os.environ.get(variable)
    try:
        return flag.value if flag.value is not None or text is None else int(text)
    except ValueError:
        raise InputError(f"{variable}: got {text!r}, accepts an integer") from None


def supervise() -> None:
    """Forks if there are several processes, and returns in the child only; the parent watches it and ends when it does.

    Call it before JAX is imported: a child does not inherit JAX's threads.
    """
    chosen = asked()
    if chosen is None:
        return
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        _watch(child, reader, chosen.get("process_id"))
    os.setsid()  # Ctrl-C comes from the watcher, once
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for stream in ("stdout", "stderr"):  # on descriptors that native code does not write to
        own = getattr(sys, stream)
        own.flush()
        copy = os.dup(own.fileno())
        os.dup2(writer, own.fileno())
        setattr(sys, stream, os.fdopen(copy, "w", buffering=1, encoding=own.encoding, errors=own.errors))


def _watch(child: int, reader: int, number: int | None) -> NoReturn:
    def forward(signum: int, frame: object) -> None:
        if JOINED[0]:
            os.kill(child, signum)
        else:  # the child may be waiting in native code, where it handles no signal
            os.kill(child, signal.SIGKILL)
            command.stop(signum, frame)

    for signum in signals.handled():
        signal.signal(signum, forward)
    with open(reader, errors="backslashreplace") as lines:
        for line in without_noise(lines):
            print(line, end="", file=sys.stderr, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGABRT and not JOINED[0]:
        raise InputError(f"--coordinator_address: not all processes joined within --join_seconds={JOIN_SECONDS.value}")
    if status < 0:
        which = "" if number is None else f" {number}"
        lost = status == -signal.SIGABRT
        cause = "another process was lost" if lost else f"it was ended by {signal.Signals(-status).name}"
        print(f"process{which} stopped: {cause}; the same command resumes", file=sys.stderr, flush=True)
    os._exit(status if status >= 0 else 1)


def without_noise(lines: Iterable[str]) -> Iterable[str]:
    """Yields the lines without the log entries of JAX's processes about each other, up to a fatal one."""
    dropping = False
    for line in lines:
        dropping = dropping and not NATIVE_LINE.match(line)
        if NOISE.search(line):
            if line.startswith("F"):
                return
            dropping = bool(NATIVE_LINE.match(line))
        elif line.strip() and not dropping:  # concurrent threads write fragments of lines
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

    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
    try:
        jax.distributed.initialize(
            **chosen,
            initialization_timeout=JOIN_SECONDS.value,
            heartbeat_timeout_seconds=30,  # unless connections fail earlier
            shutdown_timeout_seconds=600,  # the first process draws the figures meanwhile
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator_address: the processes cannot be joined: {error}") from None
    JOINED[0] = 1


def failure(error: Exception) -> str:
    """Returns a one-line description of a JAX exception in this process."""
    import jax

    reason = " ".join(str(error).split())[:200]
    lost = re.search(r"gloo|nccl|connection|socket|heartbeat", reason, re.IGNORECASE)
    cause = f"another process was lost ({reason})" if lost else reason
    return f"process {jax.process_index()} stopped: {cause}; the same command resumes"
