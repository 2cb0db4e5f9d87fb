"""The commands as a user types them."""

import os
import subprocess
import sys

from forks import ROOT, Fork

QUICKSTART = "--config=configs/quickstart.py"


def variables():
    """What a command finds in its environment; the flags of XLA that these tests run with are not among it."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def command(script, *arguments, **options):
    """The line and options that start it as a new process."""
    return [sys.executable, f"experiments/{script}", *map(str, arguments)], {"cwd": ROOT, "env": variables(), **options}


def start(script, *arguments, environment=None, **options):
    """Starts it as a fork, which has more variables in its environment."""
    return Fork([f"experiments/{script}", *arguments], variables() | (environment or {}), **options)


def run(script, *arguments, **options):
    with start(script, *arguments, **options) as process:
        out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def run_anew(script, *arguments):
    """The same as a new process, which imports everything itself."""
    line, options = command(script, *arguments, capture_output=True, text=True, timeout=300)
    return subprocess.run(line, **options)


def refused(done, says):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert done.stdout == ""
