"""The commands as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICKSTART = "--config=configs/quickstart.py"


def command(script, *arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return [sys.executable, f"experiments/{script}", *map(str, arguments)], {"cwd": ROOT, "env": environment, **options}


def run(script, *arguments):
    line, options = command(script, *arguments, capture_output=True, text=True, timeout=300)
    return subprocess.run(line, **options)


def refused(done, says):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert done.stdout == ""
