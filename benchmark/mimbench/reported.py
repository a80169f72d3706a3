"""The numbers that a paper reports, from the ``reported.csv`` of its method's folder."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from mimbench import registry
from mimbench.errors import DataError

COLUMNS = (
    *("method", "backbone", "pretrain_data", "pretrain_epochs", "image_size"),
    *("protocol", "dataset", "metric", "value", "unit", "source", "locator", "confidence"),
)
NEEDED = ("method", "protocol", "metric", "value", "source", "confidence")
CONFIDENCE = (
    "verified",
    "secondary",
)  # read in the paper or its authors' repository; reported by another work

Row = dict[str, Any]


def read(slug: str) -> list[Row]:
    """What the paper of one method reports; empty when its folder has no ``reported.csv``.

    Each row has ``slug`` (of the folder) beside the file's columns; its ``method`` may be a rival that the
    paper measured. ``value`` is a float, ``pretrain_epochs`` a float or None; all else is text, or None
    where the source does not say. Raises DataError that names the file and the line.
    """
    file = registry.method(slug).folder / "reported.csv"
    return [{"slug": slug, **row} for row in _rows(file)] if file.is_file() else []


def read_all() -> list[Row]:
    """What all papers report, method by method."""
    return [row for slug in registry.methods() for row in read(slug)]


def _rows(file: Path) -> list[Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{file} cannot be read: {fault}") from None
    lines = csv.reader(io.StringIO(text), strict=True)
    rows = []
    try:
        header = next(lines, [])
        if tuple(header) != COLUMNS:
            raise DataError(f"{file}, line 1: the columns should be {','.join(COLUMNS)}")
        for cells in lines:
            if cells:
                rows.append(_row(cells, f"{file}, line {lines.line_num}"))
    except csv.Error as fault:
        raise DataError(f"{file}, line {lines.line_num}: {fault}") from None
    return rows


def _row(cells: list[str], where: str) -> Row:
    if len(cells) != len(COLUMNS):
        raise DataError(f"{where}: {len(cells)} cells where {len(COLUMNS)} belong")
    row: Row = {name: cell.strip() or None for name, cell in zip(COLUMNS, cells, strict=True)}
    for name in NEEDED:
        if row[name] is None:
            raise DataError(f"{where}: {name} is empty")
    for name in ("value", "pretrain_epochs"):
        row[name] = _number(row[name], name, where)
    if row["confidence"] not in CONFIDENCE:
        raise DataError(f"{where}: confidence is '{row['confidence']}', not {' or '.join(CONFIDENCE)}")
    if row["unit"] == "percent":
        row["unit"] = "%"
    return row


def _number(text: str | None, name: str, where: str) -> float | None:
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        raise DataError(f"{where}: {name} is '{text}', not a number") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} is {text}, not a number")
    return number
