"""The front page: one table over all methods that were trained by one rule, with a column for each protocol."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimbench import config, registry, reported
from mimbench.record import Record, setting, test_selected
from mimbench.report.findings import Finding, findings, pictures
from mimbench.report.ranking import Row, Table, factor_out, reported_view, view_order
from mimbench.report.words import page_name


@dataclass
class Column:
    """A protocol on a data set, scored in one way."""

    anchor: str  # of the table that it is taken from, on the protocol's page
    href: str
    protocol: str
    data: str
    recipe: str
    metric: str
    unit: str
    lower: bool
    others: int  # further tables of the same protocol and data, scored in other ways


@dataclass
class Cell:
    """A score, and where its interval lies on the scale of its column, in percent of the width."""

    row: Row
    start: float | None
    width: float | None


@dataclass
class Line:
    """A method in one setting, over all protocols."""

    key: str  # names the line in links
    row: Row  # one of its cells, for what they share
    title: str
    family: str
    cells: list[Cell | None]
    seeds: int  # the fewest of any cell
    most: int  # and the most
    device_seconds: float | None  # of pretraining, mean of the seeds
    rate: float | None  # images per second of pretraining
    parameters: int  # of the encoder
    flops: float | None  # of the encoder and an image, where its throughput was measured
    headline: dict[str, Any] | None  # the first number of the paper's own list
    stale: str
    changed: str = ""  # of the preset, beside what all lines share
    parity: dict[str, Any] | None = None


@dataclass
class Board:
    """All lines of one view, see ``ranking.compared_by``."""

    anchor: str
    view: str
    columns: list[Column]
    lines: list[Line]
    shared: str  # changes of presets that all trained lines have in common
    pictures: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def choices(boards: Sequence[Board]) -> dict[str, list[str]]:
    """What the lines of all boards can be filtered by."""
    lines = [line for board in boards for line in board.lines]
    columns = [column for board in boards for column in board.columns]
    found = {
        "family": {line.family for line in lines},
        "backbone": {line.row.backbone for line in lines},
        "preset": {line.row.preset for line in lines},
        "protocol": {column.protocol for column in columns},
        "dataset": {column.data for column in columns},
    }
    return {name: sorted(values) for name, values in found.items()}


def boards(
    ranked: Sequence[Table],
    papers: Sequence[reported.Row],
    parity: Mapping[str, dict[str, Any] | None],
) -> list[Board]:
    """A board for each view of ``ranked``, that first which most images were scored for by today's code."""
    found = []
    numbers = {slug: [r for r in papers if r["slug"] == r["method"] == slug] for slug in registry.methods()}
    for view in sorted({table.view for table in ranked}, key=view_order):
        board = _board(view, [table for table in ranked if table.view == view], numbers, parity)
        board.pictures, board.findings = pictures(board, numbers), findings(board, numbers)
        found.append(board)
    return sorted(found, key=_images, reverse=True)


def _images(board: Board) -> int:
    """Test images of the largest set that each method was scored on, over all methods."""
    largest: dict[str, int] = {}
    for line in board.lines:
        sizes = [cell.row.runs[0].data.n_test for cell in line.cells if cell and not cell.row.stale]
        if not line.row.role:
            largest[line.row.method] = max(largest.get(line.row.method, 0), *sizes, 0)
    return sum(largest.values())


def _board(
    view: str,
    ranked: Sequence[Table],
    numbers: Mapping[str, list[reported.Row]],
    parity: Mapping[str, dict[str, Any] | None],
) -> Board:
    kinds: dict[tuple[str, str], list[Table]] = {}
    for table in ranked:
        kinds.setdefault((table.protocol, table.data), []).append(table)
    shown = [max(tables, key=_weight) for tables in kinds.values()]
    most = {data: max(len(t.rows) for t in shown if t.data == data) for data in {t.data for t in shown}}
    usual = max((card.protocols for card in registry.methods().values()), key=len, default=())
    places = {name: place for place, name in enumerate(usual)}
    shown.sort(key=lambda t: (-most[t.data], t.data, places.get(t.protocol, len(places)), t.protocol))
    columns = [
        Column(
            anchor=table.anchor,
            href=f"protocols/{page_name(table.protocol)}.html#{table.anchor}-caption",
            protocol=table.protocol,
            data=table.data,
            recipe=table.recipe,
            metric=table.metric,
            unit=table.unit,
            lower=table.lower,
            others=len(kinds[table.protocol, table.data]) - 1,
        )
        for table in shown
    ]
    by_setting: dict[str, list[Cell | None]] = {}
    for place, table in enumerate(shown):
        for row in table.rows:
            cells = by_setting.setdefault(setting(row.runs[0]), [None] * len(shown))
            cells[place] = _cell(row, table)
    flops = {
        setting(run): run.metrics["flops_inference"].value * 1e9  # protocols/throughput.py gives GFLOP
        for run in _runs(ranked)
        if "flops_inference" in run.metrics
    }
    lines = [_line(key, cells, numbers, flops.get(key), parity) for key, cells in by_setting.items()]
    lines.sort(key=lambda line: _order(line, columns))
    shared, changed = factor_out([line.row for line in lines])
    for line, own in zip(lines, changed, strict=True):
        line.changed = own
    return Board("b-" + config.digest("board", view), view, columns, lines, shared)


def _weight(table: Table) -> tuple[Any, ...]:
    """Of several ways of scoring that of most methods is shown; the best on the test split only where there is none."""
    fresh = sum(not row.stale for row in table.rows if not row.role)
    honest = not any(map(test_selected, _runs([table])))
    return honest, fresh, len(table.rows), table.fingerprint


def _runs(ranked: Iterable[Table]) -> Iterable[Record]:
    return (run for table in ranked for row in table.rows for run in row.runs)


def _order(line: Line, columns: Sequence[Column]) -> tuple[Any, ...]:
    """By the first column in which a line has a score, best first."""
    for place, (cell, column) in enumerate(zip(line.cells, columns, strict=True)):
        if cell:
            return place, cell.row.mean if column.lower else -cell.row.mean, line.key
    raise ValueError("a line has at least one cell")


def _cell(row: Row, table: Table) -> Cell:
    if row.low is None or row.high is None:
        return Cell(row, None, None)
    scale = 100 / (table.right - table.left)
    start, stop = (min(max(scale * (end - table.left), 0.0), 100.0) for end in (row.low, row.high))
    return Cell(row, round(start, 1), round(max(stop - start, 1.5), 1))


def _line(
    key: str,
    cells: list[Cell | None],
    numbers: Mapping[str, list[reported.Row]],
    flops: float | None,
    parity: Mapping[str, dict[str, Any] | None],
) -> Line:
    rows = [cell.row for cell in cells if cell]
    row = rows[0]
    card = registry.methods().get(row.method)
    trained = [run.pretrain for run in row.runs if run.pretrain.images]
    seconds = statistics.mean(p.device_seconds for p in trained) if trained else None
    own = numbers.get(row.method)
    return Line(
        key=key[:8],
        row=row,
        title=card.title if card else row.method,
        family=card.family if card else "unknown",
        cells=cells,
        seeds=min(len(each.seeds) for each in rows),
        most=max(len(each.seeds) for each in rows),
        device_seconds=seconds,
        rate=statistics.mean(p.images for p in trained) / seconds if seconds else None,
        parameters=row.runs[0].encoder.parameters,
        flops=flops,
        headline=reported_view(own[0]) if own and not row.role else None,
        stale="; ".join(dict.fromkeys(each.stale for each in rows if each.stale)),
        parity=parity.get(row.method),
    )
