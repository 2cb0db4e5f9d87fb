"""The paper's written claims, judged on stored results.

A claim is what a passage of Masters & Luschi (2018) says in words (`paper`), and the parts that make it up (`checks`),
each judged on the studies that it is about, known by their names ("fig08").
"""

import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from smallbatch_jax.study.claims.checks import Finding, NotEnoughData
from smallbatch_jax.study.claims.paper import CLAIMS, Claim, Part
from smallbatch_jax.study.study import Study, describe

Studies = Mapping[str, Study]

VERDICTS = {True: "holds", False: "does not hold", None: "not enough data"}


class Verdict(NamedTuple):
    """A claim and what was found of its parts."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool | None:
        """False if any part fails, True if all hold, else None."""
        answers = {finding.holds for finding in self.findings}
        return False if False in answers else None if None in answers else True


def judge(studies: Studies) -> list[Verdict]:
    """Every claim, judged on the studies given by name."""
    return [judge_one(claim, studies) for claim in CLAIMS]


def judge_one(claim: Claim, studies: Studies) -> Verdict:
    """One claim, judged on the studies given by name."""
    parts = [part for part in claim.parts if not claim.one_of or part.figures[0] in studies]
    found = [finding for part in parts for finding in _examine(part, studies)]
    missing = [group for group in claim.one_of if not any(name in studies for name in group)]
    found += [Finding(None, f"none of {', '.join(group)} is among the workdirs") for group in missing]
    return Verdict(claim, tuple(dict.fromkeys(found)))  # parts that lack the same study say so once


def _examine(part: Part, studies: Studies) -> list[Finding]:
    lacks = [lack for name in part.figures if (lack := _lack(name, studies.get(name)))]
    if lacks:
        return [Finding(None, lack) for lack in lacks]
    try:
        return [part.check(*(studies[name] for name in part.figures))]
    except NotEnoughData as lack:
        return [Finding(None, str(lack))]


def _lack(name: str, study: Study | None) -> str:
    """What keeps a study from being judged at all; empty if nothing does."""
    if study is None:
        return f"{name} is not among the workdirs"
    ended, planned = study.runs
    if ended < planned:
        return f"{name}: {planned - ended:,} of {planned:,} runs have not ended"
    return "" if study.cells["finished"].any() else f"no run of {name} finished"


def format_report(studies: Studies, verdicts: Iterable[Verdict]) -> str:
    """The studies, each claim with its findings, and how many claims hold, as plain text."""
    verdicts = list(verdicts)
    blocks = ["\n".join(map(_describe, studies.values())), *map(_format_verdict, verdicts)]
    hold, fail, lack = (sum(verdict.holds is answer for verdict in verdicts) for answer in VERDICTS)
    verbs = "holds" if hold == 1 else "hold", "does" if fail == 1 else "do", "lacks" if lack == 1 else "lack"
    return "\n\n".join([*blocks, f"{hold} {verbs[0]}, {fail} {verbs[1]} not hold, {lack} {verbs[2]} data"])


def _describe(study: Study) -> str:
    """One line: what was trained, on what, and how much of it has ended."""
    if not any(study.name in part.figures for claim in CLAIMS for part in claim.parts):
        return f"{study.name}: holds no figure that a claim is about"
    return f"{study.name}: {describe(study)}"


def _format_verdict(verdict: Verdict) -> str:
    claim, margin = verdict.claim, "  "
    head = f"{claim.id:<4} {VERDICTS[verdict.holds]}   ({claim.where})"
    sentence = f"“{claim.sentence}”".replace(" = ", "\xa0=\xa0")  # no line ends within "m = 8"
    sentence = textwrap.fill(sentence, 120, initial_indent=margin, subsequent_indent=margin).replace("\xa0", " ")
    findings = [f"{margin}- {finding.text}: {VERDICTS[finding.holds]}" for finding in verdict.findings]
    return "\n".join([head, sentence, *findings])
