"""The ledger's page: verdicts on reported numbers as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mimbench import verdict
from mimbench.report.ranking import Table, reported_view, tables
from mimbench.report.source import Source
from mimbench.report.words import number, page_name, signed
from mimbench.verdict import REASONS, RULES, VERDICTS, Verdict

MOST = 300  # judged numbers in full on one page, the rest on the pages of their papers
NEAREST = 30


def verdicts(source: Source, ranked: Sequence[Table] | None = None) -> list[Verdict]:
    """A verdict on every reported number of ``source``, whose ``tables`` may be given if they are there already."""
    held = tables(source.records, ()) if ranked is None else ranked
    reporting = {row["method"] for row in source.papers}
    rows = (row for table in held for row in table.rows if row.method in reporting)
    return verdict.verdicts(source.papers, (verdict.measured(row.runs) for row in rows))


def verdict_view(found: Verdict) -> dict[str, Any]:
    """A verdict for reading, with the reported number that it is about."""
    ours, unit = found.ours, found.unit
    like = ours is not None and not {"metric", "unit"} & set(found.differences or ())
    points = "points" if unit == "%" else unit
    difference = interval = allowed = ""
    if found.difference is not None and found.margin is not None:
        difference = f"{signed(found.difference, unit)} {points}".strip()
        # Two decimals: a margin near 100 % is smaller than one.
        allowed = f"±{number(found.margin, unit, 2)}"
    if found.test is not None:
        interval = f"{signed(found.test.low, unit)} to {signed(found.test.high, unit)}"
    return {
        **reported_view(found.theirs),
        "rival": found.theirs["method"] != found.theirs["slug"],
        "verdict": found.verdict,
        "reason": found.reason,
        "said": found.said,
        "ours": number(found.mean, unit) if like else "",
        "our_unit": unit,
        "low": found.low,
        "high": found.high,
        "seeds": len(ours.seeds) if ours else 0,
        "preset": ours.preset if ours else "",
        "method_href": f"methods/{page_name(ours.method)}.html" if ours else "",
        "stale": ours.stale if ours else "",
        "differences": [
            {"name": name, "ours": our, "theirs": their}
            for name, (our, their) in (found.differences or {}).items()
        ],
        "difference": difference,
        "interval": interval,
        "margin": allowed,
    }


def ledger(found: Sequence[Verdict], papers: dict[str, str]) -> dict[str, Any]:
    """What the page shows; ``papers`` gives each paper's page."""
    judged = [each for each in found if each.verdict != "untestable"]
    order = list(VERDICTS)
    judged.sort(key=lambda each: (order.index(each.verdict), each.theirs["slug"], each.theirs["protocol"]))
    beside = [each for each in found if each.reason in ("setting", "several")]
    beside.sort(key=lambda each: len(each.differences or {}))  # stable: in the order of papers
    counts = verdict.counts(found)
    total = Counter(each.verdict for each in found)
    apart = Counter(name for each in beside for name in each.differences or {})
    return {
        "numbers": len(found),
        "rivals": sum(each.theirs["method"] != each.theirs["slug"] for each in found),
        "verdicts": [
            {"name": name, "meaning": meaning, "count": total[name]} for name, meaning in VERDICTS.items()
        ],
        "reasons": [
            {"verdict": kind, "reason": REASONS[reason], "count": held}
            for (kind, reason), held in counts.items()
        ],
        "apart": [{"name": name, "count": held} for name, held in apart.most_common()],
        "beside": len(beside),
        "judged": [verdict_view(each) for each in judged[:MOST]],
        "more": max(0, len(judged) - MOST),
        "nearest": [verdict_view(each) for each in beside[:NEAREST]],
        "papers": _papers(found, papers),
        "rules": [{"what": what, "margin": allowed, "why": why} for what, allowed, why in RULES],
        "version": verdict.VERSION,
    }


def _papers(found: Iterable[Verdict], papers: dict[str, str]) -> list[dict[str, Any]]:
    """A line a paper, in the order of their names: how many of its numbers have which verdict."""
    by_paper: dict[str, Counter[str]] = {}
    for each in found:
        held = by_paper.setdefault(each.theirs["slug"], Counter())
        held[each.reason if each.verdict == "untestable" else each.verdict] += 1
    lines = []
    for slug, held in sorted(by_paper.items()):
        lines.append({"slug": slug, "href": papers.get(slug, ""), "numbers": held.total(), "counts": held})
    return lines


def by_paper(found: Iterable[Verdict]) -> dict[str, list[dict[str, Any]]]:
    """The numbers of each paper with their verdicts, for its page."""
    held: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        held.setdefault(each.theirs["slug"], []).append(verdict_view(each))
    return held
