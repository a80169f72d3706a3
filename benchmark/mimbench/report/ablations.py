"""What a changed setting does to a method: its rows of one table against the one that changes the least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mimbench import stats
from mimbench.report.ranking import Row, Table, row_bits
from mimbench.report.words import flatten


def ablations(slug: str, ranked: Sequence[Table]) -> list[dict[str, Any]]:
    """A method's settings that were scored and trained alike, beside the one that all others are changes of."""
    found = []
    for table in ranked:
        rows = [row for row in table.rows if row.method == slug and (row.pretrained or row.role)]
        for base in rows:
            plain = _changes(base)
            others = [
                row
                for row in rows
                if row is not base
                and row.preset == base.preset
                and row.dataset == base.dataset
                and plain.items() <= _changes(row).items()
            ]
            if others:
                found.append(
                    {
                        "table": table,
                        "base": base,
                        "lines": [_line(base, row, plain) for row in others],
                    }
                )
    return found


def _changes(row: Row) -> dict[str, str]:
    return {name: value for name, value in flatten(row.runs[0].overrides) if name}


def _line(base: Row, row: Row, plain: dict[str, str]) -> dict[str, Any]:
    changed = [f"{name} = {value}" for name, value in _changes(row).items() if name not in plain]
    common = [seed for seed in row.seeds if seed in base.seeds]
    pair = None
    if common:
        bits = [row_bits([run for run in each.runs if run.seed in common]) for each in (row, base)]
        if all(found is not None for found in bits) and bits[0].shape == bits[1].shape:  # type: ignore[union-attr]
            pair = stats.paired(bits[0], bits[1])  # type: ignore[arg-type]
    return {"row": row, "changed": ", ".join(changed), "difference": row.mean - base.mean, "paired": pair}
