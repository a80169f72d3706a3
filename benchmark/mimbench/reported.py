"""The catalogue of papers and the numbers that they report.

A paper's numbers are in the ``reported.csv`` of its method's folder, or in ``results/reported/SLUG.csv`` as long as
it has none.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimbench import paths, registry
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


@dataclass(frozen=True)
class Paper:
    """A line of ``results/papers.csv``: a paper that is here or planned. What is not known is empty."""

    slug: str  # of its method's folder, there or to come
    title: str
    arxiv: str
    venue: str
    year: int
    family: str
    code: str  # of the authors: OWNER/NAME on GitHub, empty where none was found
    licence: str  # of that code


def catalogue() -> list[Paper]:
    """All papers that the suite is about, in the catalogue's order; raises DataError that names the file and line."""
    file = paths.papers() / "papers.csv"
    columns = tuple(Paper.__dataclass_fields__)
    papers: dict[str, Paper] = {}
    for cells, where in _lines(file, columns) if file.is_file() else ():
        row = dict(zip(columns, map(str.strip, cells), strict=True))
        for name in ("slug", "title", "family"):
            if not row[name]:
                raise DataError(f"{where}: {name} is empty")
        if row["slug"] in papers:
            raise DataError(f"{where}: {row['slug']} is listed twice")
        if not re.fullmatch(r"\d{4}\.\d{4,5}", row["arxiv"]):
            raise DataError(f"{where}: arxiv is '{row['arxiv']}', which should look like 2111.06377")
        if not re.fullmatch(r"\d{4}", row["year"]):
            raise DataError(f"{where}: year is '{row['year']}', not a year")
        papers[row["slug"]] = Paper(**(row | {"year": int(row["year"])}))  # type: ignore[arg-type]
    return list(papers.values())


def slugs() -> list[str]:
    """Every method, and every paper without one whose numbers are here; in alphabetical order."""
    return sorted({*registry.methods(), *(f.stem for f in (paths.papers() / "reported").glob("*.csv"))})


def read(slug: str) -> list[Row]:
    """What one paper reports; empty where none of its numbers could be read.

    Each row has ``slug`` (of the paper) beside the file's columns; its ``method`` may be a rival that the
    paper measured. ``value`` is a float, ``pretrain_epochs`` a float or None; all else is text, or None
    where the source does not say. Raises DataError that names the file and the line.
    """
    card = registry.methods().get(slug)
    file = card.folder / "reported.csv" if card else paths.papers() / "reported" / f"{slug}.csv"
    return [{"slug": slug, **_row(*line)} for line in _lines(file, COLUMNS)] if file.is_file() else []


def read_all() -> list[Row]:
    """What all papers report, paper by paper."""
    return [row for slug in slugs() for row in read(slug)]


@functools.cache
def vocabulary() -> dict[str, frozenset[str]]:
    """The words that ``protocol``, ``unit``, ``metric`` and ``dataset`` may be, besides this suite's protocols."""
    table = tomllib.loads((paths.PACKAGE / "reported.toml").read_text(encoding="utf-8"))
    return {name: frozenset(words) for name, words in table.items()}


def _lines(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[list[str], str]]:
    """The cells of each line below the header, and where they are."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{file} cannot be read: {fault}") from None
    lines = csv.reader(io.StringIO(text), strict=True)
    try:
        if tuple(next(lines, [])) != columns:
            raise DataError(f"{file}, line 1: the columns should be {','.join(columns)}")
        for cells in lines:
            where = f"{file}, line {lines.line_num}"
            if cells and len(cells) != len(columns):
                raise DataError(f"{where}: {len(cells)} cells where {len(columns)} belong")
            if cells:
                yield cells, where
    except csv.Error as fault:
        raise DataError(f"{file}, line {lines.line_num}: {fault}") from None


def _row(cells: list[str], where: str) -> Row:
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
    for name, words in vocabulary().items():
        word = row[name]
        if word is None or word in words or (name == "protocol" and word in registry.protocols()):
            continue
        near = difflib.get_close_matches(word, words, n=1)
        raise DataError(
            f"{where}: {name} '{word}' is unknown",
            f"{f'Did you mean {near[0]}? ' if near else ''}A new word belongs in benchmark/mimbench/reported.toml",
        )
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
