"""Explained gaps, and one encoder under many recipes, as their pages show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mimbench import explanation, stats
from mimbench.explanation import End, Explanation
from mimbench.record import Record, stale, test_selected
from mimbench.report.drawings import ticks
from mimbench.report.ranking import row_bits
from mimbench.report.words import count, flatten, number, page_name, signed, when

# Of a drawing of rows, in SVG units: its width, where the plane begins and ends, and the height of a row.
WIDTH, LEFT, RIGHT, ROW = 704.0, 216.0, 600.0, 26.0
LABEL = 30  # most letters of a row's label; tables hold the whole
FIGURES = 6  # most encoders drawn on one page: those with the most recipes


# Explanations -----------------------------------------------------------------------------------------


def explained_views(
    source: Iterable[Explanation], runs: Iterable[str], methods: Iterable[str]
) -> list[dict[str, Any]]:
    """Each explanation as its page shows it, by protocol and size of the gap; ``runs`` and ``methods`` have pages."""
    known = set(runs), set(methods)
    views = [_view(found, *known) for found in source]
    return sorted(views, key=lambda v: (v["protocol"], -abs(v["gap"] or 0.0), v["href"]))


def _view(found: Explanation, runs: set[str], methods: set[str]) -> dict[str, Any]:
    unit = "points" if found.unit == "%" else found.unit
    parts = sorted(found.parts, key=lambda part: (-abs(part.points), list(part.settings)))
    return {
        "href": f"explained/{page_name(found.id)}.html",
        "a": _end(found.a, found, runs),
        "b": _end(found.b, found, runs),
        "protocol": found.protocol,
        "protocol_href": f"protocols/{page_name(found.protocol)}.html",
        "version": found.version,
        "method": found.method,
        "method_href": f"methods/{page_name(found.method)}.html" if found.method in methods else "",
        "encoder": found.encoder,
        "data": found.data,
        "note": found.note,
        "n": found.n,
        "metric": found.metric,
        "unit": unit,
        "gap": found.gap.points,
        "low": found.gap.low,
        "high": found.gap.high,
        "p": None if found.gap.p is None else "< 0.0001" if found.gap.p < 1e-4 else f"{found.gap.p:.2g}",
        "only": None if found.gap.only_a is None else (found.gap.only_a, found.gap.only_b),
        "walked": found.walked,
        "rest": found.rest if found.apart else None,
        "parts": [
            {
                "settings": [(name, _text(a), _text(b)) for name, (a, b) in part.settings.items()],
                "points": part.points,
                "low": part.low,
                "high": part.high,
            }
            for part in parts
        ],
        "figure": _waterfall(found, parts, unit) if parts else None,
        "apart": found.apart,
        "notes": found.notes,
        "reads": found.test_reads,
        "scores": len(found.stops),
        "command": found.command,
        "stale": explanation.stale(found) or "",
        "commit": str(found.git.get("commit") or "")[:7],
        "dirty": bool(found.git.get("dirty")),
        "machine": found.environment.get("cpu") or "an unnamed machine",
        "date": datetime.fromisoformat(found.created).astimezone(UTC),
        "file": explanation.place(found, Path()).as_posix(),
    }


def _end(end: End, found: Explanation, runs: set[str]) -> dict[str, Any]:
    return {
        "name": end.name,
        "recipe": f"{found.protocol}:{end.recipe}" if end.recipe else "",
        "value": end.value,
        "low": end.low,
        "high": end.high,
        "metric": end.metric,
        "unit": end.unit,
        "chosen": ", ".join(
            f"{name.removeprefix('chosen_').replace('_', ' ')} {_text(value)}"
            for name, value in end.chosen.items()
        ),
        "run_href": f"runs/{page_name(end.run)}.html" if end.run in runs else "",
    }


def _text(value: Any) -> str:
    return flatten(value)[0][1]


def _waterfall(found: Explanation, parts: Sequence[explanation.Part], unit: str) -> dict[str, Any]:
    """From A's score to B's, a bar for each part."""
    rows: list[dict[str, Any]] = [_mark(found.a, found.unit)]
    level = found.a.value
    for part in parts:
        rows.append(
            {
                "label": ", ".join(part.settings),
                "bar": (level, level + part.points),
                "kind": "gain" if part.points >= 0 else "loss",
                "text": signed(part.points, found.unit, 2),
            }
        )
        level += part.points
    rest = found.rest if found.apart else None
    if rest is not None:
        rows.append(
            {
                "label": "other weights",
                "bar": (level, level + rest),
                "kind": "rest",
                "text": signed(rest, found.unit, 2),
            }
        )
    if rest is not None or not found.apart:
        rows.append(_mark(found.b, found.unit))
    told = "; ".join(f"{row['label']} {row['text']}" for row in rows)
    return _rows(rows, f"From {found.a.name} to {found.b.name}, in {unit}: {told}", found.unit)


def _mark(end: End, unit: str) -> dict[str, Any]:
    interval = None if end.low is None or end.high is None else (end.low, end.high)
    return {
        "label": end.name,
        "dot": end.value,
        "line": interval,
        "kind": "end",
        "text": number(end.value, unit, 2),
    }


def _rows(rows: Sequence[Mapping[str, Any]], summary: str, unit: str) -> dict[str, Any]:
    """A drawing with a row for each of ``rows``: a bar, or a dot with its interval, on one scale.

    The scale need not begin at zero: bars run from one score to another, and dots have no length.
    """
    values = [
        v
        for row in rows
        for v in (*row.get("bar", ()), row.get("dot"), *(row.get("line") or ()))
        if v is not None
    ]
    marks = ticks(min(values), max(values))
    low, high = marks[0], marks[-1]

    def at(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 1)

    drawn = []
    level: float | None = None
    for i, row in enumerate(rows):
        y = 14 + ROW * i
        bar = row.get("bar")
        ends = sorted(map(at, bar)) if bar else None
        drawn.append(
            {
                "y": y,
                "label": row["label"] if len(row["label"]) <= LABEL else f"{row['label'][: LABEL - 1]}…",
                "text": row["text"],
                "kind": row["kind"],
                "bar": {"x": ends[0], "width": round(max(ends[1] - ends[0], 1.0), 1)} if ends else None,
                "dot": at(row["dot"]) if "dot" in row else None,
                "line": [at(v) for v in row["line"]] if row.get("line") else None,
                "from": None if level is None else at(level),
            }
        )
        if any("bar" in other for other in rows):  # then each row goes on where the one above ends
            level = bar[1] if bar else row["dot"]
    bottom = 14 + ROW * (len(rows) - 0.5)
    return {
        "summary": summary,
        "width": WIDTH,
        "height": bottom + 22,
        "bottom": bottom,
        "label_x": LEFT - 8,
        "text_x": WIDTH - 4,
        "ticks": [{"x": at(mark), "label": f"{mark:g}"} for mark in marks],
        "rows": drawn,
        "unit": unit,
    }


# One encoder, many recipes ----------------------------------------------------------------------------


def recipe_figures(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """By protocol: encoders that were scored by several recipes on the same test images, with the spread.

    What is chosen on the test split is drawn, but makes no second recipe. Of an encoder's seeds the first is drawn,
    and of a page's encoders those with the most recipes; ``left_out`` counts the others.
    """
    groups: dict[tuple[str, ...], dict[str, Record]] = {}
    for run in sorted(
        records, key=lambda run: (not stale(run), when(run), run.id)
    ):  # later ones replace earlier
        key = (run.protocol.name, run.pretrain.key, run.data.fingerprint, run.primary, run.score.unit)
        groups.setdefault(key, {})[run.fingerprint] = run
    first: dict[tuple[str, ...], list[Record]] = {}
    several = [
        list(group.values())
        for group in groups.values()
        if sum(not test_selected(r) for r in group.values()) > 1
    ]
    for runs in sorted(several, key=_order):
        run = runs[0]
        first.setdefault((run.protocol.name, _title(run), run.data.fingerprint, run.primary), runs)
    found: dict[str, list[list[Record]]] = {}
    for runs in first.values():
        found.setdefault(runs[0].protocol.name, []).append(runs)
    return {
        protocol: {
            "drawn": [
                _spread(runs) for runs in sorted(held, key=lambda runs: (-len(runs), *_order(runs)))[:FIGURES]
            ],
            "left_out": max(0, len(held) - FIGURES),
        }
        for protocol, held in found.items()
    }


def _order(runs: Sequence[Record]) -> tuple[Any, ...]:
    run = runs[0]
    return run.method.slug, run.preset, run.seed, run.data.name, run.pretrain.key, run.primary


def _title(run: Record) -> str:
    """An encoder's name, but for its seed."""
    changed = [
        f"{name}={value}"
        for name, value in flatten(run.overrides)
        if name and not name.startswith(f"{run.protocol.name}.")
    ]
    return ", ".join([run.method.slug, f"{run.preset} preset", *changed, run.backbone])


def _spread(runs: Sequence[Record]) -> dict[str, Any]:
    ranked = sorted(runs, key=lambda run: (-run.score.value, run.protocol.recipe, run.id))
    best, worst = ranked[0], ranked[-1]
    unit = best.score.unit
    bits = row_bits([best]), row_bits([worst])
    paired = None
    if bits[0] is not None and bits[1] is not None and bits[0].shape == bits[1].shape and bits[0].size > 1:
        paired = stats.paired(bits[0], bits[1])
    names = [run.protocol.recipe for run in runs]
    rows = []
    for run in ranked:
        own = run.overrides.get(run.protocol.name)
        label = run.protocol.recipe
        if own and names.count(label) > 1:
            label += f" ({', '.join(f'{name}={value}' for name, value in flatten(own))})"
        score = run.score
        rows.append(
            {
                "label": label,
                "dot": score.value,
                "line": None if score.low is None or score.high is None else (score.low, score.high),
                "kind": "chosen" if test_selected(run) else "end",
                "text": number(score.value, score.unit),
                "href": f"runs/{page_name(run.id)}.html",
                "value": score.value,
                "low": score.low,
                "high": score.high,
                "stale": stale(run) or "",
            }
        )
    spread = best.score.value - worst.score.value
    title = f"{_title(best)}, seed {best.seed}"
    measured = "points" if unit == "%" else unit
    summary = (
        f"{len(rows)} recipes on one encoder: from {rows[-1]['text']} ({rows[-1]['label']}) to {rows[0]['text']}"
        f" ({rows[0]['label']}), a spread of {number(spread, unit)} {measured}"
    )
    return {
        "title": title,
        "data": best.data.name,
        "metric": best.primary,
        "unit": unit,
        "n": best.data.n_test and count(best.data.n_test),
        "summary": summary,
        "low": paired.low if paired else None,
        "high": paired.high if paired else None,
        "selected": any(row["kind"] == "chosen" for row in rows),
        "rows": rows,
        "figure": _rows(rows, f"{title}: {summary}", unit),
    }
