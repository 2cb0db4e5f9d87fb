"""The paper's written claims, judged on stored results.

A claim is a passage of Masters & Luschi (2018) and the checks that make it up, an entry of `paper.CLAIMS`. Each check is judged
on the studies that it is about, which are given by name ("fig08").
"""

import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from smallbatch_jax.config.metric import ACCURACY
from smallbatch_jax.config.text import and_list
from smallbatch_jax.study.claims.margins import FAILS, HOLDS, LACKS, OPEN, VERDICTS, Finding
from smallbatch_jax.study.claims.paper import CLAIMS, Check, Claim
from smallbatch_jax.study.claims.tables import NotEnoughData
from smallbatch_jax.study.study import Study, describe

Studies = Mapping[str, Study]


class Verdict(NamedTuple):
    """A claim, the entry of VERDICTS that is the answer, and the findings of its checks."""

    claim: Claim
    answer: str
    findings: tuple[Finding, ...]

    @property
    def judged(self) -> bool:
        """Whether any of the claim's checks could be judged."""
        return any(finding.verdict != LACKS for finding in self.findings)

    @property
    def margin(self) -> float:
        """The margin of the weakest check behind the answer, in standard errors; NaN where that one counts runs."""
        margins = [finding.margin for finding in self.findings if finding.verdict == self.answer]
        known = [margin for margin in margins if margin == margin]
        return min(known) if known and (self.answer != FAILS or len(known) == len(margins)) else float("nan")

    @property
    def shown(self) -> str:
        """The answer with its margin, and whether parts of the claim lack data: "holds, +3.1 standard errors, in part"."""
        part = ", in part" if self.answer != LACKS and any(finding.verdict == LACKS for finding in self.findings) else ""
        return Finding(self.answer, "", self.margin).shown + part


def judge(studies: Studies) -> list[Verdict]:
    """Judges every entry of CLAIMS on the studies, given by name, such as "fig08" (`study.load_all`)."""
    return [judge_one(claim, studies) for claim in CLAIMS]


def judge_one(claim: Claim, studies: Studies) -> Verdict:
    """Judges one claim on the studies, as `judge` does.

    It does not hold if any check does not. Otherwise it lacks data if checks that it needs do (`Claim.one_of`), cannot be
    told if any check cannot, and else holds.
    """
    absent = dict.fromkeys(name for check in claim.checks for name in check.figures if name not in studies)
    found = [(check, _examine(check, studies)) for check in claim.checks if absent.keys().isdisjoint(check.figures)]
    known = [check.figures for check, finding in found if finding.verdict != LACKS]
    lacks = len(known) < len(claim.checks)
    if claim.one_of:
        lacks = any(all(set(group).isdisjoint(figures) for figures in known) for group in claim.one_of)
    findings = [finding for _, finding in found]
    if absent:
        findings.append(Finding(LACKS, f"{and_list([*absent])} {'are' if len(absent) > 1 else 'is'} not among the workdirs"))
    verdicts = {finding.verdict for finding in findings}
    answer = FAILS if FAILS in verdicts else LACKS if lacks else OPEN if OPEN in verdicts else HOLDS
    return Verdict(claim, answer, tuple(dict.fromkeys(findings)))  # equal findings are listed once


def _examine(check: Check, studies: Studies) -> Finding:
    if lacks := [lack for name in check.figures if (lack := _lack(name, studies[name]))]:
        return Finding(LACKS, "; ".join(lacks))
    try:
        return check.judge(*(studies[name] for name in check.figures))
    except NotEnoughData as lack:
        return Finding(LACKS, str(lack))


def _lack(name: str, study: Study) -> str:
    """The reason why a study cannot be judged at all; empty if it can."""
    ended, planned = study.runs
    if ended < planned:
        return f"{name}: {planned - ended:,} of {planned:,} runs have not ended"
    if study.experiment.search.active:
        return f"{name} is a search, which leaves cells of the grid untrained"
    return "" if study.metric == ACCURACY else f"{name} goes by {study.metric.title}, the paper by accuracy"


def format_report(studies: Studies, verdicts: Iterable[Verdict]) -> str:
    """The studies, each claim with its findings, and how many claims hold, as plain text."""
    verdicts = list(verdicts)
    known = {name for claim in CLAIMS for check in claim.checks for name in check.figures}
    facts = {
        name: describe(study) if name in known else "is not a figure that a claim is about" for name, study in studies.items()
    }
    blocks = ["\n".join(f"{name}: {fact}" for name, fact in facts.items()), *map(_format_verdict, verdicts)]
    counts = [sum(verdict.answer == answer for verdict in verdicts) for answer in VERDICTS]
    many = "hold", "do not hold", "cannot be told", "lack data"
    words = zip(counts, ("holds", "does not hold", "cannot be told", "lacks data"), many, strict=True)
    return "\n\n".join([*blocks, ", ".join(f"{count} {one if count == 1 else more}" for count, one, more in words)])


def _format_verdict(verdict: Verdict) -> str:
    claim, margin = verdict.claim, "  "
    head = f"{claim.id:<4} {verdict.shown}   ({claim.where})"
    sentence = f"“{claim.sentence}”".replace(" = ", "\xa0=\xa0")  # no line ends within "m = 8"
    sentence = textwrap.fill(sentence, 120, initial_indent=margin, subsequent_indent=margin).replace("\xa0", " ")
    findings = [f"{margin}- {finding.text}: {finding.shown}" for finding in verdict.findings]
    return "\n".join([head, sentence, *findings])
