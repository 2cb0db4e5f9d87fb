"""Writes one HTML page that explains stored results, finished or not: it opens from disk and needs no network.

    python experiments/report.py --workdir=runs/quickstart [--out=report.html]
    python experiments/report.py --workdir=runs/fig07 --workdir=runs/fig08 --out=report.html
    python experiments/report.py --workdir=runs/fig08 --watch

With --watch the page is rewritten as results arrive, and an open browser reloads it, until every run has ended.
"""

import time
from pathlib import Path

import command
from absl import flags

WORKDIR = command.DEFINE_paths("workdir", "Folder of the results; repeat it for several on one page.")
OUT = command.DEFINE_path("out", "The HTML file; by default report.html in the first workdir.")
WATCH = flags.DEFINE_bool("watch", False, "Write it again whenever there are new results, until all runs have ended.")
EVERY = flags.DEFINE_integer("every_seconds", 10, "With --watch, how often to look.", lower_bound=1)


def main() -> int:
    workdirs = [Path(workdir) for workdir in command.given(WORKDIR, "runs/quickstart")]
    out = Path(OUT.value or workdirs[0] / "report.html")
    if WATCH.value:
        watch(workdirs, out)
    else:
        write(workdirs, out)
    return 0


def write(workdirs: list[Path], out: Path, refresh_seconds: int | None = None) -> bool:
    """Writes the page and prints the answers; returns whether there are unfinished runs."""
    from smallbatch_jax.study import report, study
    from smallbatch_jax.study.answer import answer

    studies = list(study.load_all(workdirs).values())
    unfinished = any(found.unfinished for found in studies)
    report.write(studies, out, refresh_seconds if unfinished else None)
    for found in studies:
        print(f"{found.name}: {answer(found).sentence}")
    print(f"report: {out}", flush=True)
    return unfinished


def watch(workdirs: list[Path], out: Path) -> None:
    """Writes the page whenever results have changed, until every run has ended."""
    awaited = [workdir for workdir in workdirs if not (workdir / "experiment.json").is_file()]
    if awaited:
        print(f"waiting for {', '.join(map(str, awaited))}", flush=True)
    while not all((workdir / "experiment.json").is_file() for workdir in awaited):
        time.sleep(1)
    seen = None
    while True:
        stamp = [_stamp(workdir) for workdir in workdirs]
        if stamp != seen and not write(workdirs, out, EVERY.value):
            return
        seen = stamp
        time.sleep(EVERY.value)


def _stamp(workdir: Path) -> list[tuple[str, int]]:
    """Returns names and sizes of the files whose content a page shows; they only grow."""
    files = sorted([*workdir.glob("*.json*"), *workdir.glob("results/*.csv")])
    return [(path.name, path.stat().st_size) for path in files]


if __name__ == "__main__":
    command.run(main)
