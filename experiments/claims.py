"""Judges the paper's claims on the stored results of one or more workdirs; exits with status 1 if one fails.

python experiments/claims.py --workdir=runs/fig01 [--workdir=runs/fig02 …]
"""

import command

WORKDIR = command.DEFINE_paths("workdir", "Folder of the results of one figure; repeat it for more.")


def main() -> int:
    from smallbatch_jax.study import claims, study

    workdirs = command.given(WORKDIR, "runs/fig01")
    studies = study.load_all(workdirs)
    verdicts = claims.judge(studies)
    print(claims.format_report(studies, verdicts))
    return int(any(verdict.answer == claims.FAILS for verdict in verdicts))


if __name__ == "__main__":
    command.run(main)
