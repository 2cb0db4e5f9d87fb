"""Start-up shared by all commands: config, JAX and signals; bad input ends in one line and exit status 2."""

import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

from absl import app, logging
from arguments import DEFINE_number, DEFINE_numbers, DEFINE_path, DEFINE_paths, define_config_flag, given, given_fields, parse
from ml_collections import ConfigDict

from smallbatch_jax.config import fields, overrides
from smallbatch_jax.config.experiment import Dataset, InputError
from smallbatch_jax.runner import signals
from smallbatch_jax.store.files import OUT_OF_SPACE, WriteError

__all__ = ["DEFINE_number", "DEFINE_numbers", "DEFINE_path", "DEFINE_paths", "define_config_flag", "given"]

STARTED = time.monotonic()


def given_config(flag: Any) -> ConfigDict:
    """Returns the config that --config names, with overrides applied; its path may have ":ARGUMENT" for `get_config`."""
    path = given(flag, "configs/quickstart.py")
    return load_config(f"--config={path}", path, given_fields())


def load_config(flag: str, path: str, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """Calls `get_config` of a config file and overrides fields of the config; errors begin with `flag`.

    Raises:
      InputError: if the file cannot be read or returns no config.
    """
    path, colon, argument = path.partition(":")
    try:
        make: Any = runpy.run_path(path)["get_config"]
        config = make(argument) if colon else make()
        if config is None:
            raise InputError(f"{flag}: get_config() returned None, accepts a ConfigDict")
        config = ConfigDict(config)
        overrides.override(config, changes or {})
        return config
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # any exception in a config file is the user's to fix
        raise InputError(f"{flag}: {type(error).__name__}: {_one_line(error)}") from None


def load_data(chosen: Dataset, random: bool = False) -> Any:
    """Returns the data of a config, or random images of the same shape."""
    from smallbatch_jax import data

    return data.load_section(chosen, random)


def run(main: Callable[[], int]) -> None:
    """Parses the flags, runs `main` and exits with the status it returns.

    Otherwise one line on stderr says what went wrong: status 2 for bad input, 1 for a full disk, 128 + number for a signal.
    """

    def prepared(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # absl would show every library's INFO lines
        warnings.showwarning = _show_warning
        for signum in signals.handled():
            signal.signal(signum, stop)
        if len(argv) > 1:
            raise InputError(f"{argv[1]!r}: unknown argument; every option starts with --")
        status = main()
        sys.stdout.flush()
        sys.exit(status)

    os.environ["MPLBACKEND"] = "agg"  # commands draw into files
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the locale may lack some characters
            stream.reconfigure(errors="backslashreplace")
    try:
        app.run(prepared, flags_parser=parse)
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    except WriteError as error:
        leave(str(error), 1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in OUT_OF_SPACE:
            raise
        leave(f"{error.filename or 'output'} cannot be written: {error.strerror}", 1)


def stop(signum: int, frame: object) -> NoReturn:
    """Exits on a signal outside training (training saves first); an exception would be lost within JAX's imports."""
    with suppress(OSError):
        os.write(2, b"stopped; the same command resumes\n")
    os._exit(128 + signum)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr, flush=True)


def leave(line: str, status: int) -> NoReturn:
    """Prints one line on stderr and exits at once, without waiting for threads that compile or save."""
    with suppress(OSError):  # the terminal may be gone
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)


def import_jax() -> None:
    """Imports JAX and Flax, which read environment variables at import.

    Raises:
      InputError: if an environment variable has a value that they do not accept.
    """
    try:
        import flax  # noqa: F401
    except ValueError as error:
        raise InputError(f"JAX cannot be imported: {error}") from None


def start_jax(join: Callable[[], None] = lambda: None) -> None:
    """Starts JAX and its devices as the user's environment specifies, with one device per core on CPU.

    Flags that could change a result keep JAX's defaults from now on. `join` is called before the devices are created.

    Raises:
      InputError: if JAX_PLATFORMS, XLA_FLAGS or another variable asks for something that is not available.
    """
    import_jax()
    from smallbatch_jax.program import devices, jax_flags

    jax_flags.hold(ExitStack())  # for the rest of this process
    require_xla_flags()
    devices.use_all_cores()
    join()
    jax_flags.require_devices()


def require_xla_flags() -> None:
    """Tries XLA_FLAGS in another process, since XLA ends a process that has an unknown flag."""
    from smallbatch_jax.program import jax_flags

    if given := jax_flags.xla_flags():
        error = _error_of("import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()")
        said = re.search(r"\] (Unknown flag.*|Couldn't interpret.*)", error)
        if error:
            raise InputError(f"XLA_FLAGS={given}: cannot be used: {said[1] if said else error.splitlines()[-1]}")


def require_devices() -> None:
    """Tries the user's devices in another process, so that this one holds none.

    Raises:
      InputError: if JAX_PLATFORMS asks for something that is not available.
    """
    error = _error_of("from smallbatch_jax.program import jax_flags; jax_flags.require_devices()")
    if error:
        raise InputError(error.split("InputError: ")[-1])


def _error_of(code: str) -> str:
    """Runs Python code in another process and returns its errors; empty if it ends well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    return (done.stderr.strip() or "no reason given") if done.returncode else ""


def _one_line(error: BaseException | Warning | str) -> str:
    return fields.cut(" ".join(str(error).split()) or type(error).__name__, 1000)
