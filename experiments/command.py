"""What every command shares: its flags, one line and exit status 2 for bad input, and how it ends."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import arguments
from absl import app, flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from smallbatch_jax.config import experiment, fields
from smallbatch_jax.config.experiment import Experiment, InputError
from smallbatch_jax.runner import signals
from smallbatch_jax.store.files import OUT_OF_SPACE, WriteError

flags.disclaim_key_flags()  # the flags defined here belong to the command that asks for them


class _Given:
    """The parts of the command line that concern the config."""

    config = "--config"
    overrides: dict[str, str] = {}  # noqa: RUF012 - the text of each --config.FIELD=VALUE, the last of each field


def define_config_flag() -> Any:
    """--config, an ml_collections file, of which --config.FIELD=VALUE overrides any field."""
    # ml_collections gets no arguments to find overrides in: `arguments.split` does that, and refuses unknown fields.
    described = "Config file; --config.FIELD=VALUE overrides a field."
    return config_flags.DEFINE_config_file("config", None, described, flags.FLAGS, lock_config=False, sys_argv=[])


def DEFINE_path(name: str, described: str) -> Any:
    """A flag for a path, in which ~ is the home folder."""
    return flags.DEFINE(_PathParser(name), name, None, described)


def DEFINE_paths(name: str, described: str) -> Any:
    """A flag for paths, which may be given several times."""
    return flags.DEFINE_multi(_PathParser(name), flags.ArgumentSerializer(), name, None, described)


class _PathParser(flags.ArgumentParser):
    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        return fields.expanded_path(f"--{self._name}", argument)

    def flag_type(self) -> str:
        return "path"


def given(flag: Any, example: str) -> Any:
    """The value of a flag that must be there."""
    if flag.value is None or flag.value == "":
        raise InputError(f"--{flag.name}: not given; for example --{flag.name}={example}")
    return flag.value


def given_config(flag: Any) -> ConfigDict:
    """The config, overrides applied.

    absl loads the file when it parses the flags, but some failures show only when the config is first read.
    """
    if flag.value is None and flag.present:
        raise InputError(f"{_Given.config}: get_config() returned None, accepts a ConfigDict")
    config = given(flag, "configs/quickstart.py")
    try:
        if isinstance(config, FrozenConfigDict):
            config = config.as_configdict()
        config = config if isinstance(config, ConfigDict) else ConfigDict(config)
        experiment.override(config, _Given.overrides)
        return config
    except InputError:
        raise
    except Exception as error:
        raise InputError(_config_error(error)) from None


def run(main: Callable[[], int]) -> None:
    """Parses the flags, runs `main` and exits with what it returns.

    One line on stderr says what went wrong: 2 for bad input, 1 for a disk that is full, 128 and its number for a signal.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # absl would show every library's INFO lines
        warnings.showwarning = _show_warning
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a locale without our letters is no reason to fail
                stream.reconfigure(errors="backslashreplace")
        try:
            for signum in signals.handled():
                signal.signal(signum, _stop)
            if len(argv) > 1:
                raise InputError(f"{argv[1]!r}: unknown argument; every option starts with --")
            status = main()
            sys.stdout.flush()
            sys.exit(status)
        except InputError as error:
            fail(str(error))
        except WriteError as error:
            leave(str(error), 1)
        except BrokenPipeError:  # whoever read our output, `head` perhaps, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            if error.errno not in OUT_OF_SPACE:
                raise
            leave(f"{error.filename or 'output'} cannot be written: {error.strerror}", 1)

    app.run(guarded, flags_parser=_parse)


def _stop(signum: int, frame: object) -> None:
    """Outside training, which notes a signal and saves first. An exception would be lost in what JAX imports."""
    with suppress(OSError):
        os.write(2, b"stopped; the same command goes on\n")
    os._exit(128 + signum)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr, flush=True)


def fail(line: str, status: int = 2) -> None:
    """One line on stderr, and the end."""
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def leave(line: str, status: int) -> None:
    """One line on stderr, and the end at once: threads that compile or save are not waited for."""
    with suppress(OSError):  # the terminal may be gone
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)


def import_jax() -> None:
    """JAX and Flax, which read their variables when they are imported.

    Raises:
      InputError: if one has a value that there is not.
    """
    try:
        import flax  # noqa: F401
    except ValueError as error:
        raise InputError(f"JAX cannot be imported: {error}") from None


def start_jax(cpu_devices: int | None = None, join: Callable[[], None] = lambda: None) -> None:
    """JAX and its devices, as the user's environment asks for them; on CPU one for each core, or as many as are given.

    Flags that could change a result are held from now on. `join` is called before the devices are made.

    Raises:
      InputError: if JAX_PLATFORMS, XLA_FLAGS or another variable asks for what there is not.
    """
    import_jax()
    from smallbatch_jax.program import ambient, devices

    ambient.hold_for_good()
    _require_xla_flags(ambient.expand_xla_flags())
    devices.use_all_cores()
    import jax

    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    join()
    ambient.require_devices()


def _require_xla_flags(given: str) -> None:
    """XLA ends the process that gives it a flag it does not know; so another process asks first."""
    if not given:
        return
    trial = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"
    done = subprocess.run([sys.executable, "-c", trial], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = re.search(r"\] (Unknown flag.*|Couldn't interpret.*)", done.stderr)
        reason = said.group(1) if said else (done.stderr.strip().split("\n") or [""])[-1]
        raise InputError(f"XLA_FLAGS={given}: cannot be used: {reason}")


def _parse(argv: Sequence[str]) -> list[str]:
    """Like absl's own parser, but --help exits 0 and a mistake takes one line."""
    if any(arg in ("--help", "-h", "-help", "--helpfull", "--helpshort") for arg in argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\nflags:\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    logging.set_verbosity(logging.ERROR)  # config_flags warns of what we refuse
    try:
        args = arguments.expanded(argv[1:])
        if "config" in flags.FLAGS:
            args = _without_config(args)
        return flags.FLAGS([argv[0], *args])
    except (InputError, flags.Error) as error:
        # config_flags tells a TypeError or ValueError of a config file with its whole traceback: say the error itself
        if isinstance(error.__context__, InputError):
            fail(str(error.__context__))  # without absl's own words before it
        cause = error.__context__ and error.__context__.__context__
        if isinstance(cause, Exception) and "Traceback" in str(error):
            fail(_config_error(cause))
        fail(_one_line(error))
    except Exception as error:  # whatever a config file or an override raises is the user's to mend, not ours to trace
        fail(_config_error(error))
    raise AssertionError("unreachable")


def _without_config(args: Sequence[str]) -> list[str]:
    """Returns the arguments without overrides of the config, which it keeps for `given_config`."""
    found = arguments.split(args)
    if found.file is None:
        if found.overrides:
            raise InputError(f"--config: not given, of which --config.{next(iter(found.overrides))} is a field")
        return found.others
    _Given.config, _Given.overrides = f"--config={found.file}", found.overrides
    return [_Given.config, *found.others]


def _config_error(error: Exception) -> str:
    return f"{_Given.config}: {type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException | str) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 1000 else line[:997] + "..."


def resolved(chosen: Experiment, workdir: str | None = None) -> Experiment:
    """The experiment with the base learning rates that it takes from other workdirs."""
    if not chosen.grid.base_lrs_from:
        return chosen
    from smallbatch_jax.study.study import choose_base_lrs

    return choose_base_lrs(chosen, workdir)


def for_workdir(chosen: Experiment, workdir: str) -> Experiment:
    """The experiment as it is trained into a workdir, which may be new or hold a part of it.

    Raises:
      InputError: if there is nothing to train, or the workdir holds anything else.
    """
    if chosen.drawn_from:
        raise InputError(
            f"drawn_from: {chosen.name} is drawn from other results and trains nothing; "
            "use python experiments/figures.py with the same --config."
        )
    chosen = resolved(chosen, workdir)
    from smallbatch_jax.store.workdir import refuse_difference

    refuse_difference(Path(workdir), chosen)
    return chosen


def train(chosen: Experiment, workdir: str, started: float) -> int:
    """Trains an experiment into a workdir, draws its figures and prints its table; the exit status.

    With several processes all train, and the first alone uses the workdir.
    """
    import several

    several.supervise()
    chosen, folder = for_workdir(chosen, workdir), Path(workdir)
    start_jax(join=several.join)
    import jax

    from smallbatch_jax import data
    from smallbatch_jax.data.streaming.prefetch import WorkerDied
    from smallbatch_jax.program import processes
    from smallbatch_jax.runner import driver, progress
    from smallbatch_jax.store import results

    imported = time.monotonic()
    dataset = data.load(chosen.dataset.name, chosen.dataset.data_dir, chosen.dataset.image_size)
    loaded = time.monotonic()
    try:
        driver.train_grid(chosen, folder, dataset, progress.for_stream())
    except driver.Interrupted as interrupted:
        leave(f"stopped; everything is saved in {folder}, the same command goes on", 128 + interrupted.signum)
    except WorkerDied as died:
        leave(f"{died}; the same command goes on", 1)
    except jax.errors.JaxRuntimeError as error:
        if not processes.several():
            raise
        leave(several.failure(error), 1)
    if not processes.is_first():
        return 0
    trained = time.monotonic()
    show(folder)
    timings = results.Timings(folder)
    for phase, seconds in (("import", imported - started), ("data", loaded - imported)):
        timings.add(phase, seconds)
    timings.add("draw", time.monotonic() - trained)
    return 0


def show(folder: Path, out: Path | None = None) -> None:
    """Draws the figures of a workdir and prints its table and the answer."""
    from smallbatch_jax.store import skipped
    from smallbatch_jax.study import analysis, figures, study
    from smallbatch_jax.study.answer import RULE, answer

    stored = study.load(folder)
    print(analysis.format_summary(analysis.summary(stored.rows, stored.chance, stored.cells)))
    found = answer(stored)
    print("\n".join(["", found.sentence, *(f"- {caveat}" for caveat in found.caveats), f"({RULE})", ""]), flush=True)
    if left_out := len(skipped.load(folder)):
        print(f"skipped images, which could not be decoded: {left_out}, listed in {folder}/skipped.csv")
    drawn = figures.draw_studies([stored], out)
    print(f"figures: {', '.join(dict.fromkeys(path.stem for path in drawn))}, as PNG and PDF in {drawn[0].parent}")
    print(f"as a page: python experiments/report.py --workdir={folder}")
