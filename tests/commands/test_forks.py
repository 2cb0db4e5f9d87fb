"""A command that a test runs as a fork prints and exits like one that a user starts."""

import os
import signal

import pytest
from forks import Fork
from shell import QUICKSTART, ROOT, run, run_anew, variables

STORED = ROOT / "notebooks/results/digits/fig08"


@pytest.mark.parametrize(
    ("script", "arguments", "status"),
    [
        ("sweep.py", [QUICKSTART, "--workdir=w", "--config.epochs=many"], 2),
        ("sweep.py", [QUICKSTART, "--workdir=w", "--config.grid.batch_sizes=(2,5000)"], 2),  # after JAX is imported
        ("claims.py", [f"--workdir={STORED}"], 0),
    ],
)
@pytest.mark.long
def test_a_fork_ends_and_says_as_a_new_process(script, arguments, status):
    new, forked = run_anew(script, *arguments), run(script, *arguments)
    assert (new.returncode, new.stdout, new.stderr) == (forked.returncode, forked.stdout, forked.stderr)
    assert new.returncode == status
    assert not (ROOT / "w").exists()


@pytest.mark.parametrize(
    ("code", "status", "errors"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import os; os._exit(130)", 130, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last\n"),
        ("import jax; print(jax._src.xla_bridge.backends_are_initialized(), file=__import__('sys').stderr)", 0, "False\n"),
    ],
)
def test_a_fork_has_a_status_of_its_own_and_finds_no_device_started(code, status, errors):
    with Fork(["-c", code], variables()) as process:
        assert process.communicate(timeout=60) == ("", errors)
    assert process.returncode == status


def test_an_exception_in_a_fork_is_its_last_line_and_its_environment_is_what_it_was_given():
    code = "import os, sys; print(os.environ['A'], os.getcwd(), sys.argv); 1 / 0"
    with Fork(["-c", code, "x"], {**os.environ, "A": "b"}) as process:
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, f"b {ROOT} ['-c', 'x']\n")
    assert errors.endswith("ZeroDivisionError: division by zero\n")
    assert "A" not in os.environ
