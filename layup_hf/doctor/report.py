"""What the doctor prints."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from .finding import Finding, Level

_MARKS: dict[Level, str] = {"ok": "ok", "skipped": "--", "warning": "warning", "error": "ERROR"}
_WIDTH = 118


def has_failed(findings: Mapping[int, Sequence[Finding]]) -> bool:
    """Whether training would not work.

    Args:
        findings: Of each worker, by rank.
    """
    return any(finding.level == "error" for theirs in findings.values() for finding in theirs)


def report(headline: str, findings: Mapping[int, Sequence[Finding]], workers: int) -> str:
    """The report: a line for each check; where those who have answered differ, one for each finding, with its ranks.

    Args:
        headline: What this is a report of.
        findings: Of each worker that has answered, by rank.
        workers: How many there are.
    """
    lines = [headline]
    for name in dict.fromkeys(finding.name for theirs in findings.values() for finding in theirs):
        for finding, ranks in _groups(name, findings):
            where = "" if len(ranks) == len(findings) else f"{_ranks(ranks)}: "
            lines += _lines(finding, where)
    lines.append(_verdict(findings, workers))
    return "\n".join(lines)


def _groups(name: str, findings: Mapping[int, Sequence[Finding]]) -> list[tuple[Finding, list[int]]]:
    """Each finding of a check, with the ranks that have it."""
    found = {rank: [one for one in theirs if one.name == name] for rank, theirs in findings.items()}
    every = [finding for theirs in found.values() for finding in theirs]
    scores = [finding.score for finding in every if finding.level == "ok" and finding.score is not None]
    if len(scores) == len(every):
        return [(every[scores.index(min(scores))], list(findings))]
    groups: dict[Finding, list[int]] = {}
    for rank, theirs in found.items():
        for finding in theirs:
            groups.setdefault(finding, []).append(rank)
    return list(groups.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Such as "rank 0-3, 7"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return "rank " + ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _lines(finding: Finding, where: str) -> list[str]:
    start, indent = f"  {_MARKS[finding.level]:8}{finding.name:10} ", " " * 21
    text = where + finding.text
    lines = textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
    if finding.remedy:
        remedy = f"-> {finding.remedy}"
        lines += textwrap.wrap(
            remedy, _WIDTH, initial_indent=indent, subsequent_indent=indent + "   ", break_on_hyphens=False
        )
    return lines


def _verdict(findings: Mapping[int, Sequence[Finding]], workers: int) -> str:
    levels = [(finding.name, finding.level) for theirs in findings.values() for finding in theirs]
    bad = list(dict.fromkeys(name for name, level in levels if level == "error"))
    if bad:
        return f"Training would not work here: see {', '.join(bad)}."
    warned = list(dict.fromkeys(name for name, level in levels if level == "warning"))
    alone = ", as plain training: one process has nobody to exchange with" if workers == 1 else ""
    return f"Training would work here{alone}." + (f" Look at {', '.join(warned)}." if warned else "")
