"""Drawings: loss curves and tables of tinted numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mimbench.curve import Curve
from mimbench.record import Record
from mimbench.report.ranking import Table
from mimbench.report.words import count, effort, number, view_name, when

CHART = (52.0, 8.0, 696.0, 194.0)  # left, top, right and bottom of a loss curve's plane, in SVG units
POINTS = 300  # most points drawn of one curve
SERIES = 5  # line styles that the style sheet tells apart


def charts(runs: Iterable[Record]) -> list[dict[str, Any]]:
    """Loss curves of pretraining: a chart per setting with a line per seed."""
    settings: dict[tuple[str, ...], dict[int, list[tuple[float, float]]]] = {}
    for run in sorted(runs, key=when, reverse=True):
        curve = Curve.of(run.curve).series("loss")
        if len(curve) > 1:
            budget = run.budget  # its seeds get differently far
            trained = view_name(budget) if budget else effort([run])
            title = (f"{run.preset} preset", run.backbone, run.pretrain.dataset, trained)
            settings.setdefault(title, {}).setdefault(run.seed, curve)
    return [_chart(" · ".join(filter(None, title)), by_seed) for title, by_seed in sorted(settings.items())]


def _chart(title: str, curves: Mapping[int, list[tuple[float, float]]]) -> dict[str, Any]:
    left, top, right, bottom = CHART
    last_step = max(x for curve in curves.values() for x, _ in curve)
    values = [y for curve in curves.values() for _, y in curve]
    y_marks = ticks(min(values), max(values))
    low, high = y_marks[0], y_marks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(left + (right - left) * x / (last_step or 1), 1),
            round(bottom - (bottom - top) * (y - low) / (high - low), 1),
        )

    lines = []
    for index, (seed, curve) in enumerate(sorted(curves.items())):
        points = [place(x, y) for x, y in thin(curve)]
        lines.append(
            {
                "label": f"seed {seed}",
                "style": index % SERIES,
                "points": " ".join(f"{x},{y}" for x, y in points),
                "last": curve[-1][1],
            }
        )
    first_seed = curves[min(curves)]
    return {
        "title": title,
        "summary": f"loss from {number(first_seed[0][1])} to {number(first_seed[-1][1])} in {count(last_step)} steps",
        "x_label": "step",
        "y_ticks": [{"at": place(0, v)[1], "label": f"{v:g}"} for v in y_marks],
        "x_ticks": [
            {"at": place(v, low)[0], "label": count(v)} for v in ticks(0, last_step) if v <= last_step
        ],
        "lines": lines,
    }


PLANE = (46.0, 8.0, 350.0, 190.0)  # left, top, right and bottom of a scatter plot's plane, in SVG units
TIMES = [
    (size * n, f"{n} {unit}")
    for size, unit, counts in (
        (1, "s", (1, 2, 5, 10, 20)),
        (60, "min", (0.5, 1, 2, 5, 10, 20)),
        (3600, "h", (0.5, 1, 2, 5, 10, 20, 50, 100)),
    )
    for n in counts
]
LETTER = 5.6  # about the width of a letter of a label, in SVG units


def scatter(
    *,
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    points: Sequence[Mapping[str, Any]],
    times: bool = False,
    front: Collection[str] = (),
) -> dict[str, Any]:
    """A plane of points with intervals upwards; ``front`` holds the keys of those that a line joins.

    ``times``: x is in seconds, on a logarithmic scale.

    A point has key, name, href, label, x, y, low, high and role. Names are written where no other is in the way,
    those of the front first; every point says its name when pointed at.
    """
    left, top, right, bottom = PLANE
    across = [math.log10(p["x"]) if times else p["x"] for p in points]
    upwards = [v for p in points for v in (p["y"], p["low"], p["high"]) if v is not None]
    y_marks = ticks(min(upwards), max(upwards))
    low, high = y_marks[0], y_marks[-1]
    room = 0.04 * (max(across) - min(across)) or 0.5
    first, last = min(across) - room, max(across) + room

    def x_at(value: float) -> float:
        return round(left + (right - left) * (value - first) / (last - first), 1)

    def y_at(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    if times:
        inside = [mark for mark in TIMES if first <= math.log10(mark[0]) <= last]
        x_ticks = [{"at": x_at(math.log10(seconds)), "label": label} for seconds, label in inside]
    else:
        x_ticks = [{"at": x_at(m), "label": f"{m:g}"} for m in ticks(first, last) if first <= m <= last]
    drawn = [
        {
            **{name: p[name] for name in ("name", "href", "label", "role")},
            **{"x": x_at(x), "y": y_at(p["y"]), "front": p["key"] in front, "text": None},
            **{"low": None if p["low"] is None else y_at(p["low"])},
            **{"high": None if p["high"] is None else y_at(p["high"])},
        }
        for p, x in zip(points, across, strict=True)
    ]
    drawn.sort(key=lambda p: (p["x"], p["y"], p["name"]))
    _label(drawn)
    line = " ".join(f"{p['x']},{p['y']}" for p in drawn if p["front"])
    return {
        **{"title": title, "note": note, "x_label": x_label, "y_label": y_label, "points": drawn},
        **{"line": line, "x_ticks": x_ticks},
        "y_ticks": [{"at": y_at(v), "label": f"{v:g}"} for v in y_marks],
    }


def _label(points: Sequence[dict[str, Any]]) -> None:
    """Writes names beside points, where neither a point nor another name is in the way."""
    left, top, right, bottom = PLANE
    taken = [(p["x"] - 3, p["y"] - 3, p["x"] + 3, p["y"] + 3) for p in points]
    taken += [
        (p["x"] - 1, p["high"], p["x"] + 1, p["low"]) for p in points if None not in (p["low"], p["high"])
    ]
    for p in sorted(points, key=lambda p: not p["front"]):
        wide = LETTER * len(p["name"]) + 3
        for anchor, dx, dy in (
            ("start", 6, 3.5),
            ("end", -6, 3.5),
            ("start", 3, -6),
            ("end", -3, -6),
            ("start", 3, 12),
            ("end", -3, 12),
        ):
            x = p["x"] + dx - (wide if anchor == "end" else 0)
            box = (x, p["y"] + dy - 8, x + wide, p["y"] + dy + 2)
            inside = left < box[0] and box[2] < right + 6 and top - 6 < box[1] and box[3] < bottom
            free = all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in taken)
            if inside and free:
                p["text"] = {"x": round(p["x"] + dx, 1), "y": round(p["y"] + dy, 1), "anchor": anchor}
                taken.append(box)
                break


def thin(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``POINTS`` points, evenly picked, the first and the last among them."""
    if len(curve) <= POINTS:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (POINTS - 1))] for i in range(POINTS)]


def ticks(low: float, high: float) -> list[float]:
    """Round marks from at or below ``low`` to at or above ``high``, about five of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(start, stop + 1)]


def heats(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run's details that are tables of numbers, such as accuracy per corruption and severity."""
    found = []
    for name, table in grids(details).items():
        if any(isinstance(cells, Mapping) for cells in table.values()):
            found.append(_heat(name, "", [(label, "", _named(cells)) for label, cells in table.items()]))
        else:
            found.append(_heat(name, "", [("", "", table)]))
    return found


def heats_of(table: Table) -> list[dict[str, Any]]:
    """What the runs of a ranking say per class or per corruption: methods down, names across."""
    lines: dict[str, list[tuple[str, str, dict[str, float | None]]]] = {}
    averaged = set()
    for row in table.rows:
        held = [grids(run.details) for run in row.runs]
        for name in dict.fromkeys(name for grid in held for name in grid):
            seeds = [grid[name] for grid in held if name in grid]
            if any(isinstance(cells, Mapping) for cells in seeds[0].values()):
                averaged.add(name)
            labels = dict.fromkeys(label for seed in seeds for label in seed)
            cells = {
                label: _mean([_mean(_named(seed.get(label)).values()) for seed in seeds]) for label in labels
            }
            lines.setdefault(name, []).append((row.method, row.href, cells))
    note = {
        True: "mean over seeds and over what each name holds, such as severities",
        False: "mean over seeds",
    }
    return [_heat(name, note[name in averaged], rows) for name, rows in lines.items()]


def grids(details: Mapping[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """The tables of ``details``, by dotted name: two or more names mapped to a number each, or to numbers each.

    None stands for no number. Lists become tables numbered from 1.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in details.items():
        if not isinstance(value, Mapping):
            continue
        table = {
            label: {str(i): v for i, v in enumerate(cells, 1)} if isinstance(cells, list) else cells
            for label, cells in value.items()
        }
        leaves = [leaf for cells in table.values() for leaf in _named(cells).values()]
        if (
            len(value) > 1
            and any(map(_is_number, leaves))
            and all(v is None or _is_number(v) for v in leaves)
        ):
            found[path + name] = table
        else:
            found |= grids(value, f"{path}{name}.")
    return found


def _named(cells: Any) -> dict[str, Any]:
    return dict(cells) if isinstance(cells, Mapping) else {"": cells}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _heat(title: str, note: str, rows: list[tuple[str, str, dict[str, float | None]]]) -> dict[str, Any]:
    """A table of numbers with the share of its range that each has; ``rows`` are (name, link, cells)."""
    known = [value for *_, cells in rows for value in cells.values() if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    columns = list(dict.fromkeys(column for *_, cells in rows for column in cells))
    percent = high > 1  # shares and errors below one need more decimals

    def cell(value: float | None) -> dict[str, Any]:
        share = 0.0 if value is None or high == low else (value - low) / (high - low)
        text = number(value, "%") if percent else "–" if value is None else f"{value:.3f}"
        return {"text": text, "share": round(share, 3)}

    return {
        "title": title.replace("_", " ").replace(".", ", "),
        "note": note,
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [
            {
                "name": name if href else name.replace("_", " "),
                "href": href,
                "cells": [cell(cells.get(c)) for c in columns],
            }
            for name, href, cells in rows
        ],
    }
