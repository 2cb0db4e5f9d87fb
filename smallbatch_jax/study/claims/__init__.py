"""The paper's written claims, judged on stored results.

A claim is a passage of Masters & Luschi (2018) and the checks that make it up, an entry of `paper.CLAIMS`. Each check is judged
on the studies that it is about, known by their names ("fig08").
"""

import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from smallbatch_jax.config.metric import ACCURACY
from smallbatch_jax.study.claims.checks import Finding, NotEnoughData
from smallbatch_jax.study.claims.paper import CLAIMS, Check, Claim
from smallbatch_jax.study.study import Study, describe

Studies = Mapping[str, Study]

VERDICTS = {True: "holds", False: "does not hold", None: "not enough data"}


class Verdict(NamedTuple):
    """A claim and the findings of its checks."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool | None:
        """False if any check fails, True if all hold, else None."""
        answers = {finding.holds for finding in self.findings}
        return False if False in answers else None if None in answers else True


def judge(studies: Studies) -> list[Verdict]:
    """Judges every entry of CLAIMS on the studies, which have their names as keys, such as "fig08" (`study.load_all`)."""
    return [judge_one(claim, studies) for claim in CLAIMS]


def judge_one(claim: Claim, studies: Studies) -> Verdict:
    """Judges one claim on the studies, as `judge` does; an absent or unfinished study gives a finding that holds None."""
    checks = [check for check in claim.checks if not claim.one_of or check.figures[0] in studies]
    found = [finding for check in checks for finding in _examine(check, studies)]
    missing = [group for group in claim.one_of if not any(name in studies for name in group)]
    found += [Finding(None, f"none of {', '.join(group)} is among the workdirs") for group in missing]
    return Verdict(claim, tuple(dict.fromkeys(found)))  # checks that lack the same study say so once


def _examine(check: Check, studies: Studies) -> list[Finding]:
    lacks = [lack for name in check.figures if (lack := _lack(name, studies.get(name)))]
    if lacks:
        return [Finding(None, lack) for lack in lacks]
    try:
        return [check.judge(*(studies[name] for name in check.figures))]
    except NotEnoughData as lack:
        return [Finding(None, str(lack))]


def _lack(name: str, study: Study | None) -> str:
    """The reason why a study cannot be judged at all; empty if it can."""
    if study is None:
        return f"{name} is not among the workdirs"
    ended, planned = study.runs
    if ended < planned:
        return f"{name}: {planned - ended:,} of {planned:,} runs have not ended"
    if study.experiment.search.active:
        return f"{name} is a search, which leaves cells of the grid untrained"
    if study.metric != ACCURACY:
        return f"{name} goes by {study.metric.title}, the paper by accuracy"
    return "" if study.cells["finished"].any() else f"no run of {name} finished"


def format_report(studies: Studies, verdicts: Iterable[Verdict]) -> str:
    """The studies, each claim with its findings, and how many claims hold, as plain text."""
    verdicts = list(verdicts)
    known = {name for claim in CLAIMS for check in claim.checks for name in check.figures}
    facts = {
        name: describe(study) if name in known else "holds no figure that a claim is about" for name, study in studies.items()
    }
    blocks = ["\n".join(f"{name}: {fact}" for name, fact in facts.items()), *map(_format_verdict, verdicts)]
    hold, fail, lack = (sum(verdict.holds is answer for verdict in verdicts) for answer in VERDICTS)
    verbs = "holds" if hold == 1 else "hold", "does" if fail == 1 else "do", "lacks" if lack == 1 else "lack"
    return "\n\n".join([*blocks, f"{hold} {verbs[0]}, {fail} {verbs[1]} not hold, {lack} {verbs[2]} data"])


def _format_verdict(verdict: Verdict) -> str:
    claim, margin = verdict.claim, "  "
    head = f"{claim.id:<4} {VERDICTS[verdict.holds]}   ({claim.where})"
    sentence = f"“{claim.sentence}”".replace(" = ", "\xa0=\xa0")  # no line ends within "m = 8"
    sentence = textwrap.fill(sentence, 120, initial_indent=margin, subsequent_indent=margin).replace("\xa0", " ")
    findings = [f"{margin}- {finding.text}: {VERDICTS[finding.holds]}" for finding in verdict.findings]
    return "\n".join([head, sentence, *findings])
