"""The comparison page: which rows may stand beside each other, and what its script needs to compare any of them.

The page is compare.html, and a choice is part of its link, so that any page and any mail can point to one::

    compare.html#TABLE                    a table (ranking.Table.anchor), nothing chosen yet
    compare.html#TABLE&rows=ROW,ROW,...   rows of it, in the order in which they are compared

ROW is the row's key: the first eight signs of its setting's hash (``record.setting``), or just the method's slug where
the table has one row of it. Each is percent-encoded.

The site opens from the file system, where a page may read no data but scripts. So each table has one,
data/bits/TABLE.js, which is loaded when the table is picked: what each run has right as ``record.pack`` wrote it,
its numbers by class, its cost and its settings. What cannot be compared is said by ``mimbench.compare``'s rules.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mimbench import compare
from mimbench.errors import ResultsError
from mimbench.record import Record, setting
from mimbench.report.ranking import Row, Table, compared_by, machine
from mimbench.report.words import INVISIBLE, count, duration, flatten, view_name

DIGITS = 6  # decimals of numbers by class


@dataclass
class Choice:
    """A row that can be picked."""

    key: str  # in links
    label: str  # tells it from the other rows of its table
    row: Row


def choices(table: Table) -> list[Choice]:
    """The rows of ``table`` in its order."""
    alike: dict[str, list[Row]] = {}
    for row in table.rows:
        alike.setdefault(row.method, []).append(row)
    labels = {
        id(row): label for rows in alike.values() for row, label in zip(rows, _labels(rows), strict=True)
    }
    keys = [row.method if len(alike[row.method]) == 1 else _hash(row) for row in table.rows]
    return [Choice(key, labels[id(row)], row) for key, row in zip(keys, table.rows, strict=True)]


def comparisons(
    ranked: Iterable[Table], records: Iterable[Record]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What the page lists, each table of two rows or more, and their scripts by path below the site's folder."""
    speaks = _spokesmen(records)
    views, files = [], {}
    for table in ranked:
        if len(table.rows) < 2:
            continue
        found = choices(table)
        content = _content(table, found, speaks)
        views.append(
            {
                "table": table,
                "choices": found,
                "command": _command(content),
                "in_pairs": sum(any(map(_has_bits, row.runs)) for row in table.rows) > 1,
            }
        )
        # Escaped beyond need, so that it could stand in a page as well.
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        files[f"data/bits/{table.anchor}.js"] = f'mimbench.bits("{table.anchor}",{text});\n'.encode()
    return views, files


def _content(table: Table, found: Sequence[Choice], speaks: set[tuple[str, ...]]) -> dict[str, Any]:
    runs = [run for row in table.rows for run in row.runs]
    labels = {name: _classes(runs, name) for name in compare.PER_CLASS}
    labels = {name: classes for name, classes in labels.items() if classes}
    return {
        "metric": _shown(table.metric.replace("_", " ")),
        "unit": _shown(table.unit),
        "options": f"--protocol {_word(f'{table.protocol}:{table.recipe}')} --dataset {_word(table.data)}",
        "labels": {name: [_shown(label) for label in classes] for name, classes in labels.items()},
        "rows": {choice.key: _facts(choice, labels, speaks) for choice in found},
    }


def _command(content: dict[str, Any]) -> str:
    """Compares the first two rows that the terminal knows by their methods' names under one preset."""
    by_preset: dict[str, list[str]] = {}
    for row in content["rows"].values():
        if row["preset"] is not None:
            names = by_preset.setdefault(row["preset"], [])
            names.append(row["name"])
            if len(names) == 2:
                return f"mimbench compare {' '.join(names)} {content['options']} --preset {row['preset']}"
    return ""


def _facts(choice: Choice, labels: dict[str, list[str]], speaks: set[tuple[str, ...]]) -> dict[str, Any]:
    """All that the script knows of a row; lists of runs are in the order of its seeds."""
    row, first = choice.row, choice.row.runs[0]
    pretrain = [run.pretrain for run in row.runs]
    named = _kind(first) + compare.alike(first) in speaks
    notes = [f"is stale: {row.stale}"] if row.stale else []
    notes += [f"was run with {row.overrides}"] if row.overrides else []
    return {
        "hash": _hash(row),
        "method": _shown(row.method),
        "label": _shown(choice.label),
        # How `mimbench compare` is told of it: the method under a preset, or a single run.
        "name": _word(row.method) if named else first.id if len(row.runs) == 1 else None,
        "preset": _word(row.preset) if named else None,
        "seeds": row.seeds,
        "value": row.mean,
        "low": row.low,
        "high": row.high,
        "correct": [run.correct for run in row.runs],
        "faults": [_fault(run) for run in row.runs],
        "classes": {name: [_numbers(run, name, held) for run in row.runs] for name, held in labels.items()},
        "trained": all(each.images for each in pretrain),
        "images": statistics.mean(float(each.images) for each in pretrain),
        "device_seconds": statistics.mean(float(each.device_seconds) for each in pretrain),
        "machines": sorted({_shown(machine(run)) for run in row.runs}),
        "time": duration(statistics.mean(each.device_seconds for each in pretrain)),
        "seen": count(round(statistics.mean(each.images for each in pretrain))),
        "notes": [_shown(note) for note in notes],
        "settings": {_shown(name): _shown(value) for name, value in _settings(row, first)},
    }


def _settings(row: Row, first: Record) -> list[tuple[str, str]]:
    facts = {
        "preset": row.preset,
        "backbone": row.backbone,
        "readout": row.readout,
        "pretraining data": row.dataset if first.pretrain.images else "none",
        "trained": view_name(compared_by(first)),
        "pretraining": row.effort or "none",
        "precision": row.how,
    }
    return [*facts.items(), *((name, value) for name, value in flatten(first.config) if name)]


def _fault(run: Record) -> str | None:
    try:
        fault = compare.unusable(run)
    except ResultsError:
        fault = "has a damaged list of correct test items"
    return fault and _shown(fault)


def _classes(runs: Iterable[Record], name: str) -> list[str]:
    tables = [table for run in runs if isinstance(table := run.details.get(name), dict)]
    return sorted(
        {label for table in tables for label, value in table.items() if isinstance(value, int | float)}
    )


def _numbers(run: Record, name: str, labels: Sequence[str]) -> list[float | None] | None:
    table = run.details.get(name)
    if not isinstance(table, dict):
        return None
    values = [table.get(label) for label in labels]
    return [round(value, DIGITS) if isinstance(value, int | float) else None for value in values]


def _has_bits(run: Record) -> bool:
    return run.correct is not None


def _kind(run: Record) -> tuple[str, ...]:
    """What a method's name and the options of ``mimbench compare`` narrow the choice to."""
    return run.method.slug, run.protocol.name, run.protocol.recipe, run.data.name, run.preset


def _spokesmen(records: Iterable[Record]) -> set[tuple[str, ...]]:
    """Of each kind of runs those that ``mimbench compare`` takes for the method's name."""
    kinds: dict[tuple[str, ...], list[Record]] = {}
    for run in records:
        kinds.setdefault(_kind(run), []).append(run)
    return {kind + compare.alike(compare.preferred(runs)) for kind, runs in kinds.items()}


def _hash(row: Row) -> str:
    return setting(row.runs[0])[:8]


def _labels(own: Sequence[Row]) -> list[str]:
    """The name of a method's rows, with what tells them apart where there are several."""
    if len(own) == 1:
        return [own[0].method]
    traits = [(row.preset, row.backbone, row.dataset, row.effort, row.overrides) for row in own]
    telling = [len(set(column)) > 1 for column in zip(*traits, strict=True)]
    labels = [
        ", ".join([row.method, *(text for text, tells in zip(texts, telling, strict=True) if text and tells)])
        for row, texts in zip(own, traits, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label}, setting {_hash(row)}"
        for label, row in zip(labels, own, strict=True)
    ]


def _word(text: str) -> str:
    return _shown(shlex.quote(text))


def _shown(text: str) -> str:
    """Invisible characters as their codes: the script shows texts as they are."""
    return text.translate(INVISIBLE)
