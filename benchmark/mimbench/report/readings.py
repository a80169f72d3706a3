"""The odometer's page: reads of test labels, and what the best of several reads flatters, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mimbench import odometer
from mimbench.odometer import Dial, Optimism
from mimbench.record import Record
from mimbench.report.ranking import STRIP
from mimbench.report.words import number, page_name

MOST = 15  # encoders of a data set that are named
PAIRS = 100  # encoders scored in both ways that are shown


def readings(records: Sequence[Record]) -> dict[str, Any]:
    """What the page shows."""
    dials = odometer.dials(records)
    pairs = odometer.optimism(records)
    return {
        "reads": sum(dial.reads for dial in dials),
        "dials": [_dial(dial) for dial in dials],
        "pairs": _pairs(pairs[:PAIRS]),
        "optimism": _summary(pairs),
        "more": max(0, len(pairs) - PAIRS),
    }


def _dial(dial: Dial) -> dict[str, Any]:
    return {
        "data": dial.data,
        "n": dial.n,
        "reads": dial.reads,
        "runs": dial.runs,
        "encoders": len(dial.encoders),
        "protocols": _told(dial.protocols),
        "flattery": number(dial.flattery if dial.accuracies else None, "%"),
        "most": [
            vars(each)
            | {"protocols": _told(each.protocols), "href": f"methods/{page_name(each.method)}.html"}
            for each in dial.encoders[:MOST]
        ],
        "others": max(0, len(dial.encoders) - MOST),
    }


def _told(reads: Counter[str]) -> str:
    """ "knn 4, linear 1": the most read first."""
    return ", ".join(
        f"{name} {held}" for name, held in sorted(reads.items(), key=lambda pair: (-pair[1], pair[0]))
    )


def _summary(pairs: Sequence[Optimism]) -> dict[str, Any]:
    """What all encoders that were scored in both ways say together."""
    found = [pair.paired.difference for pair in pairs]
    if not found:
        return {}
    return {
        "encoders": len(found),
        "mean": f"{sum(found) / len(found):.2f}",
        "most": f"{max(found):.2f}",
        "same": sum(pair.best.correct == pair.ours.correct for pair in pairs),
    }


def _pairs(pairs: Sequence[Optimism]) -> list[dict[str, Any]]:
    """A line an encoder, with its interval on one scale for all, which holds 0."""
    ends = [end for pair in pairs for end in (pair.paired.low, pair.paired.high)]
    left, right = min(0.0, *ends, 0.0), max(0.0, *ends, 0.0)
    margin = 0.05 * (right - left) or 1.0
    left, right = left - margin, right + margin

    def at(value: float) -> float:
        return round(5 + (STRIP - 10) * (value - left) / (right - left), 1)

    return [_pair(pair) | {"x": {name: at(value) for name, value in _ends(pair).items()}} for pair in pairs]


def _ends(pair: Optimism) -> dict[str, float]:
    found = pair.paired
    return {"zero": 0.0, "mean": found.difference, "low": found.low, "high": found.high}


def _pair(pair: Optimism) -> dict[str, Any]:
    best, ours, found = pair.best, pair.ours, pair.paired
    named = "k = " if "chosen_k" in best.details else ""
    return {
        "method": best.method.slug,
        "preset": best.preset,
        "backbone": best.backbone,
        "seed": best.seed,
        "data": best.data.name,
        "protocol": best.protocol.name,
        "recipes": [best.protocol.recipe, ours.protocol.recipe],
        "values": [best.score.value, ours.score.value],
        "hrefs": [f"runs/{page_name(run.id)}.html" for run in (best, ours)],
        "unit": best.score.unit,
        "sort": found.difference,
        "difference": _points(found.difference),
        "interval": f"{_points(found.low)} to {_points(found.high)}",
        "candidates": ", ".join(f"{named}{name}: {value:.2f}" for name, value in pair.candidates.items()),
        "spread": f"{pair.spread:.2f}",
        "looks": len(pair.candidates),
        "stale": pair.stale,
    }


def _points(difference: float) -> str:
    """Two decimals, as two runs may differ by a few images, and the sign unless it is nothing."""
    text = f"{difference:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text
