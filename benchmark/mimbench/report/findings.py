"""What the boards show: pictures, and what each column can and cannot tell."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mimbench import reported, stats
from mimbench.report.drawings import scatter
from mimbench.report.ranking import Row, machine, p_values, separated
from mimbench.report.words import count, duration, number

if TYPE_CHECKING:
    from mimbench.report.board import Board, Column, Line

LEAST = 3  # points that make a picture, or an order worth a word
IMAGENET = "imagenet-1k"  # on which most papers report


@dataclass(frozen=True)
class Tau:
    """Kendall's rank correlation with its 95 % interval, which fewer than five pairs do not have."""

    tau: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        interval = "no interval from so few" if self.low is None else f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.tau:.2f} ({interval}, {self.n} methods)".replace("-", "−")

    @property
    def settled(self) -> bool:
        """Whether the interval leaves out zero: the two orders agree, or oppose, by more than chance."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def _tau(x: Sequence[float], y: Sequence[float]) -> Tau | None:
    if len(x) < LEAST or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return Tau(*stats.kendall(x, y), len(x))


@dataclass(frozen=True)
class Finding:
    """What one column tells of the methods in it: of each its plainest setting, by today's code."""

    column: Column
    methods: int
    seeds: int  # the fewest of any
    most: int  # and the most
    pairs: int
    apart: int  # pairs that a corrected test tells apart
    first: list[str]  # whom no test puts behind another
    above: list[str]  # the floor of their backbone, by a corrected test
    with_floor: int  # methods that have such a floor
    backbone: str  # of the reported numbers
    reported: Tau | None  # our order against the papers'
    cost: Tau | None  # score against device seconds of pretraining, on one machine


def findings(board: Board, numbers: Mapping[str, list[reported.Row]]) -> list[Finding]:
    """A finding for each column with three methods or more; what an encoder costs is none."""
    found = []
    for place, column in enumerate(board.columns):
        lines = [(line, row) for line, row in plain_lines(board, place) if not line.row.role]
        if len(lines) < LEAST or column.protocol == "throughput":
            continue
        rows = [row for _, row in lines]
        sign = -1 if column.lower else 1
        apart = separated(rows)
        behind = [
            any(
                far and sign * other.mean > sign * row.mean for far, other in zip(apart[i], rows, strict=True)
            )
            for i, row in enumerate(rows)
        ]
        above, with_floor = _above_floor(board, place, rows, sign)
        backbone, pairs = against_papers(board, place, numbers)
        _, same = on_one_machine(board, place)
        same = [(line, row) for line, row in same if not line.row.role]
        found.append(
            Finding(
                column=column,
                methods=len(rows),
                seeds=min(len(row.seeds) for row in rows),
                most=max(len(row.seeds) for row in rows),
                pairs=len(rows) * (len(rows) - 1) // 2,
                apart=int(np.triu(apart).sum()),
                first=sorted(row.method for row, later in zip(rows, behind, strict=True) if not later),
                above=sorted(above),
                with_floor=with_floor,
                backbone=backbone,
                reported=_tau(
                    [theirs["value"] for *_, theirs in pairs], [sign * row.mean for _, row, _ in pairs]
                )
                if column.unit == "%"
                else None,
                cost=_tau(
                    [line.device_seconds or 0.0 for line, _ in same], [sign * row.mean for _, row in same]
                ),
            )
        )
    return found


def _above_floor(board: Board, place: int, rows: Sequence[Row], sign: int) -> tuple[list[str], int]:
    """Who is better than the untrained network of the same backbone, corrected for their number (Holm)."""
    floors = {
        line.row.backbone: cell.row
        for line in board.lines
        if line.row.role == "floor" and (cell := line.cells[place]) and not cell.row.stale
    }
    tested = [(row, p_values([row, floors[row.backbone]])[0, 1]) for row in rows if row.backbone in floors]
    known = [(row, float(p)) for row, p in tested if not np.isnan(p)]
    corrected = stats.holm([p for _, p in known])
    better = [
        row.method
        for (row, _), p in zip(known, corrected, strict=True)
        if p < 0.05 and sign * row.mean > sign * floors[row.backbone].mean
    ]
    return better, len(known)


def pictures(board: Board, numbers: Mapping[str, list[reported.Row]]) -> list[dict[str, Any]]:
    """Score against cost, ours against reported, and robust against clean, where three methods or more have both."""
    found = [_cost(board), *_beside_papers(board, numbers), _robust(board)]
    return [picture for picture in found if picture]


def _main_column(board: Board) -> int | None:
    """The accuracy that most lines have, the linear probe before others."""
    filled = {
        place: sum(line.cells[place] is not None for line in board.lines)
        for place, column in enumerate(board.columns)
        if column.unit == "%" and not column.lower
    }
    return max(filled, key=lambda p: (filled[p], board.columns[p].protocol == "linear"), default=None)


def plain_lines(board: Board, place: int) -> list[tuple[Line, Row]]:
    """Trained lines of today's code with their score in a column; of a method the plainest setting, never the best."""
    found: dict[str, tuple[Line, Row]] = {}
    plainest = sorted(board.lines, key=lambda line: (len(line.row.overrides), -line.seeds, line.key))
    for line in plainest:
        cell = line.cells[place]
        if cell and not cell.row.stale and line.row.role != "floor" and not line.row.published:
            found.setdefault(line.row.method, (line, cell.row))
    return list(found.values())


def _cost(board: Board) -> dict[str, Any] | None:
    place = _main_column(board)
    if place is None:
        return None
    column, (name, same) = board.columns[place], on_one_machine(board, place)
    if len(same) < LEAST:
        return None
    front, best = set(), float("-inf")
    for line, row in sorted(same, key=lambda pair: (pair[0].device_seconds or 0, -pair[1].mean)):
        if row.mean > best:
            best = row.mean
            front.add(line.key)
    return scatter(
        title="Score against cost",
        note=f"{len(same)} methods pretrained on {name}; the line joins those that nothing cheaper beats",
        x_label="device seconds of pretraining",
        y_label=f"{column.protocol} {column.metric} on {column.data}, {column.unit}",
        points=[
            _point(line, row, line.device_seconds or 1.0, duration(line.device_seconds)) for line, row in same
        ],
        times=True,
        front=front,
    )


def on_one_machine(board: Board, place: int) -> tuple[str, list[tuple[Line, Row]]]:
    """The machine that most methods of a column were pretrained on, and those methods."""
    by_machine: dict[str, list[tuple[Line, Row]]] = {}
    for line, row in plain_lines(board, place):
        if line.device_seconds:
            by_machine.setdefault(machine(row.runs[0]), []).append((line, row))
    return max(by_machine.items(), key=lambda item: (len(item[1]), item[0]), default=("", []))


def _point(line: Line, row: Row, x: float, x_text: str) -> dict[str, Any]:
    label = f"{line.row.method}: {number(row.mean, row.unit)} {row.unit}, {x_text}"
    return {
        **{"key": line.key, "name": line.row.method, "href": line.row.href, "label": label},
        **{"x": x, "y": row.mean, "low": row.low, "high": row.high, "role": line.row.role},
    }


def _beside_papers(board: Board, numbers: Mapping[str, list[reported.Row]]) -> list[dict[str, Any]]:
    """For each protocol, ours against what the papers report on ImageNet with the backbone that most of them share."""
    found = []
    done = set()
    for place, column in enumerate(board.columns):
        if column.unit != "%" or column.protocol in done:
            continue
        backbone, pairs = against_papers(board, place, numbers)
        tau = _tau([theirs["value"] for *_, theirs in pairs], [row.mean for _, row, _ in pairs])
        if tau is None:
            continue
        done.add(column.protocol)
        found.append(
            scatter(
                title=f"Ours against reported, {column.protocol}",
                note=f"Kendall’s tau {tau}. Ours on {column.data}, small;"
                f" theirs on {IMAGENET} with {backbone}: only the order can be compared",
                x_label=f"reported {column.metric} on {IMAGENET}, {column.unit}",
                y_label=f"ours on {column.data}, {column.unit}",
                points=[
                    _point(line, row, theirs["value"], f"reported {number(theirs['value'], '%')} %")
                    for line, row, theirs in pairs
                ],
            )
        )
    return found


def against_papers(
    board: Board, place: int, numbers: Mapping[str, list[reported.Row]]
) -> tuple[str, list[tuple[Line, Row, reported.Row]]]:
    """The backbone that most papers with a line here report for, and each line with its paper's number on ImageNet."""
    column = board.columns[place]
    theirs: dict[str, dict[str, reported.Row]] = {}
    for slug, rows in numbers.items():
        for row in sorted(filter(lambda r: _at_scale(r, column), rows), key=_trust):
            theirs.setdefault(row["backbone"], {}).setdefault(slug, row)
    points = [(line, row) for line, row in plain_lines(board, place) if not line.row.role]
    known = {
        backbone: [(line, row, held[line.row.method]) for line, row in points if line.row.method in held]
        for backbone, held in theirs.items()
    }
    return max(known.items(), key=lambda item: (len(item[1]), item[0]), default=("", []))


def _at_scale(row: reported.Row, column: Column) -> bool:
    return bool(
        row["protocol"] == column.protocol
        and row["metric"] == column.metric
        and row["dataset"] == row["pretrain_data"] == IMAGENET
        and row["unit"] == "%"
        and row["backbone"]
    )


def _trust(row: reported.Row) -> tuple[Any, ...]:
    """Of several numbers of one paper: verified, at 224 pixels, after the longest pretraining."""
    return row["confidence"] != "verified", row["image_size"] != "224", -(row["pretrain_epochs"] or 0)


def _robust(board: Board) -> dict[str, Any] | None:
    """Accuracy on corrupted against clean images, of the protocols that measure both."""
    for place, column in enumerate(board.columns):
        pairs = [
            (line, row, statistics.mean(run.metrics["clean"].value for run in row.runs))
            for line, row in plain_lines(board, place)
            if column.metric == "corrupted" and all("clean" in run.metrics for run in row.runs)
        ]
        if len(pairs) >= LEAST:
            return scatter(
                title="Corrupted against clean",
                note=f"{count(len(pairs))} methods, {column.protocol} on {column.data}",
                x_label="clean accuracy, %",
                y_label="accuracy on corrupted images, %",
                points=[
                    _point(line, row, clean, f"clean {number(clean, '%')} %") for line, row, clean in pairs
                ],
            )
    return None
