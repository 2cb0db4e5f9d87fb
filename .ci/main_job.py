"""Checks what the README's main job left, in the environment it made: the base install and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

from smallbatch_jax.store import results

WORKDIR = Path("runs/quickstart")
QUICKSTART, FIG12 = "--config=configs/quickstart.py", "--config=configs/fig12_resnet50.py"
BENCHMARK = ("experiments/benchmark.py", QUICKSTART, "--batch_sizes=512", "--seconds=0.05", "--repeats=1", "--json")
# Commands that need an extra, and the extra that the one line on stderr must name.
LEAN = [
    (("sweep.py", QUICKSTART, "--workdir=w", "--config.tensorboard=True"), "tensorboard"),
    (("sweep.py", QUICKSTART, "--workdir=w", "--config.wandb=project"), "wandb"),
    (("sweep.py", FIG12, "--workdir=w"), "photographs"),
    (("benchmark.py", FIG12, "--random_images"), "photographs"),
    (("benchmark.py", QUICKSTART, "--peer"), "peer"),
    (("launch.py", QUICKSTART, "--workdir=w"), "cluster"),
    (("prepare_data.py", "--dataset=cifar10", "--data_dir=w"), "prepare"),
]


def main() -> None:
    frame = results.load(WORKDIR)
    last = frame.groupby(["batch_size", "base_lr"]).status.last()
    assert len(last) == 65, f"{len(last)} of 65 runs"
    assert set(last) == {"finished", "diverged"}, set(last)
    best = frame.groupby("batch_size").test_accuracy.max()
    assert best.loc[[2, 8]].min() > 0.95, best
    stems = [f"{name}.{kind}" for name in ("accuracy_vs_batch_size", "heat_map", "convergence") for kind in ("png", "pdf")]
    missing = [name for name in stems if not (WORKDIR / "figures" / name).stat().st_size]
    assert not missing, missing
    subprocess.run([sys.executable, "experiments/report.py", f"--workdir={WORKDIR}"], check=True, stdout=subprocess.DEVNULL)
    timed = subprocess.run([sys.executable, *BENCHMARK], check=True, capture_output=True, text=True).stdout
    (row,) = json.loads(timed.splitlines()[-1])["results"]
    assert min(row["images_per_second"], row["seconds_to_compile"], row["peak_bytes"], row["lanes"]) > 0, row
    for arguments, extra in LEAN:
        script, *flags = arguments
        done = subprocess.run([sys.executable, f"experiments/{script}", *flags], capture_output=True, text=True)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert done.stderr.count("\n") == 1, (arguments, done.stderr)
        assert f'pip install -e ".[{extra}]"' in done.stderr, (arguments, done.stderr)
        assert not Path("w").exists(), arguments
        print(done.stderr, end="")


if __name__ == "__main__":
    main()
