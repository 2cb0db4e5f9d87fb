"""Runs the commands of experiments/ as a user types them."""

import os
import subprocess
import sys

from forks import ROOT, Fork

QUICKSTART = "--config=configs/quickstart.py"


def variables():
    """Returns the environment of a command, without the XLA flags that these tests run with."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def command(script, *arguments, **options):
    """Returns the arguments of `subprocess.Popen` that start the script as a new process."""
    return [sys.executable, f"experiments/{script}", *map(str, arguments)], {"cwd": ROOT, "env": variables(), **options}


def start(script, *arguments, environment=None, **options):
    """Starts the script as a fork; `environment` adds to its environment variables."""
    return Fork([f"experiments/{script}", *arguments], variables() | (environment or {}), **options)


def run(script, *arguments, **options):
    with start(script, *arguments, **options) as process:
        out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def run_anew(script, *arguments):
    """Runs the script as a new process, which imports everything itself."""
    line, options = command(script, *arguments, capture_output=True, text=True, timeout=300)
    return subprocess.run(line, **options)


def refused(done, says):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert done.stdout == ""
