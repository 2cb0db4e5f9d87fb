"""The benchmark script for a GPU, tried on a CPU."""

import subprocess
import sys

import pytest
from shell import QUICKSTART, ROOT


@pytest.mark.slow
def test_the_table_has_a_rate_for_each_way_and_batch_size():
    options = ["--config.grid.base_lrs=(1,2)", "--batch_sizes=8,2,32", "--seconds=0.05", "--repeats=1", "--nopeer"]
    line = [sys.executable, "benchmarks/accelerator.py", QUICKSTART, *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, _, *lines = (line.strip("| ").split(" |") for line in done.stdout.splitlines() if line.startswith("|"))
    assert head == ["images/s at m =", " 8", " 2", " 32"]
    assert [name for name, *_ in lines] == ["all lanes", "one lane", "without command buffers"]
    rates = [[float(cell.replace(",", "") or "nan") for cell in cells] for _, *cells in lines]
    assert all(rate > 0 for rate in [*rates[0], *rates[1], *rates[2][:2]])
