"""Why two numbers differ: points attributed to settings, as ``results/explained/`` keeps them and the report shows.

``mimbench.explain`` makes them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mimbench import config, foreign, registry
from mimbench.environment import Facts
from mimbench.errors import ResultsError
from mimbench.record import (
    MethodUsed,
    ProtocolUsed,
    parse,
    protocol_code,
    stale_code,
    without_home,
    write_text,
)

SCHEMA = 1
MOST_PARTS = 64  # far more than a protocol has settings
EXACT = 1e-6  # points by which sums may be off, as floats are added in another order


@dataclass(frozen=True)
class End:
    """One of the two numbers."""

    name: str  # "knn:dino", "run 1a2b3c4d5e6f" or "reported:3"
    recipe: str  # empty for a reported number that names none
    settings: dict[str, Any]  # the protocol's Settings in full; empty for a reported number
    metric: str
    unit: str
    value: float
    low: float | None
    high: float | None
    chosen: dict[str, Any]  # what the protocol chose there, such as {"chosen_k": 20}
    run: str  # id of the record that it stands for, or empty


@dataclass(frozen=True)
class Stop:
    """A's settings with those of some parts replaced by B's, and the score there."""

    parts: list[int]  # positions in ``Explanation.parts``, ascending
    value: float


@dataclass(frozen=True)
class Part:
    """Settings that are changed together, and what the change is worth."""

    settings: dict[str, list[Any]]  # name: [in A, in B]
    points: float  # the mean of its gains over all orders in which the parts can be changed
    low: float | None  # 95 % interval over test items
    high: float | None


@dataclass(frozen=True)
class Apart:
    """Something in which the two differ and which cannot be changed on one encoder and its test images."""

    what: str  # "backbone"
    a: str
    b: str
    why: str
    walk: str  # the command that tells what it is worth, or empty


@dataclass(frozen=True)
class Gap:
    """B - A as a whole; None where the two numbers are not of the same test items and metric."""

    points: float | None
    low: float | None  # paired 95 % interval over test items, see stats.paired
    high: float | None
    p: float | None  # of no difference
    only_a: int | None  # items that only A has right
    only_b: int | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The gap from A to B. Points are of B - A: positive where B scores more."""

    command: str  # repeats it
    protocol: str
    version: int
    protocol_code: str  # record.protocol_code(protocol) when it was made
    method: str  # slug, or empty for features from elsewhere
    method_code: str
    encoder: str  # on which the settings were walked, for people
    key: str  # of its weights, or of the file of features
    data: str
    data_fingerprint: str
    note: str  # what a reader must know of the data
    n: int | None  # test items
    metric: str  # of the walk
    unit: str
    a: End
    b: End
    gap: Gap
    parts: list[Part]
    stops: list[Stop]
    apart: list[Apart]
    notes: list[str]
    test_reads: int  # predictions held against the labels of the test split for it; of a file's features none
    seconds: float
    environment: Facts
    git: Facts
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    @property
    def walked(self) -> float:
        """The points that the parts make up."""
        return self.stops[-1].value - self.stops[0].value

    @property
    def rest(self) -> float | None:
        """What of the gap no part accounts for: other weights. None where the gap is unknown."""
        return None if self.gap.points is None else self.gap.points - self.walked

    @property
    def id(self) -> str:
        """The same for the same question: protocol, both ends and the features between them."""
        ends = [
            [end.recipe, end.settings, end.run, end.name if not end.settings else ""]
            for end in (self.a, self.b)
        ]
        recipes = "-".join(_plain(text) for text in (self.protocol, self.a.recipe, self.b.recipe) if text)
        return f"{recipes}-{config.digest(self.protocol, ends, self.key, self.data_fingerprint, length=8)}"


def shares(stops: Mapping[frozenset[int], Any], parts: int) -> list[Any]:
    """What each of ``parts`` parts gains when they are changed one at a time, on average over all orders.

    ``stops`` maps sets of changed parts to scores (numbers or arrays); an order counts where it passes through
    nothing else. With all 2^n sets these are Shapley values (Contributions to the Theory of Games 2, 1953), with
    fewer those of a game with precedence (Faigle and Kern, Int. J. Game Theory 21, 1992); they always add up to
    ``stops[all] - stops[none]``. Raises ValueError where no order is possible.
    """
    everything = frozenset(range(parts))
    ahead = ways(stops, everything)
    behind = ways(
        (everything - held for held in stops), everything
    )  # of the other side: from the start to a set
    if not ahead.get(frozenset()):
        raise ValueError("no order of the parts is possible")
    found: list[Any] = [0.0] * parts
    for held in ahead:
        for part in sorted(everything - held):
            after = held | {part}
            if count := behind[everything - held] * ahead.get(after, 0):
                found[part] = found[part] + count / ahead[frozenset()] * (stops[after] - stops[held])
    return found


def ways(sets: Iterable[frozenset[int]], everything: frozenset[int]) -> dict[frozenset[int], int]:
    """In how many orders what is missing from each of ``sets`` can be added, one at a time, within ``sets``."""
    found: dict[frozenset[int], int] = {}
    for held in sorted(sets, key=len, reverse=True):
        further = (found.get(held | {part}, 0) for part in everything - held)
        found[held] = 1 if held == everything else sum(further)
    return found


def stale(found: Explanation) -> str | None:
    """Why an explanation no longer speaks of today's code, or None."""
    used = ProtocolUsed(found.protocol, found.version, found.a.recipe, found.protocol_code, {})
    if found.method:
        return stale_code(MethodUsed(found.method, found.method_code), used)
    if found.protocol not in registry.protocols():
        return f"protocol {found.protocol} is no longer here"
    now = registry.protocol(found.protocol).version, protocol_code(found.protocol)
    return None if (used.version, used.code_hash) == now else f"the code of {found.protocol} has changed"


def place(found: Explanation, folder: Path) -> Path:
    """Where an explanation lies in a results folder."""
    return folder / "explained" / f"{found.id}.json"


def write(found: Explanation, folder: Path) -> Path:
    """Writes an explanation to its place, in place of an earlier one of the same question.

    Raises ResultsError when it cannot be written or holds what none may.
    """
    file = place(found, folder)
    text = dumps(found)
    loads(text, str(file))
    try:
        write_text(file, text)
    except OSError as fault:
        raise ResultsError(
            f"{file} cannot be written: {fault.strerror or fault}",
            "Set MIMBENCH_RESULTS to a folder that can be written",
        ) from None
    return file


def dumps(found: Explanation) -> str:
    """An explanation as JSON. Raises ResultsError for NaN, infinities and what is no JSON."""
    try:
        content = without_home(dataclasses.asdict(found))
        return json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as fault:
        raise ResultsError(f"the explanation cannot be written as JSON: {fault}") from None


def loads(text: str, where: str) -> Explanation:
    """An explanation from JSON; ``where`` names its source in errors. Raises ResultsError for anything unsound:
    points that do not follow from the scores, or do not add up."""
    try:
        content = foreign.decode_json(text)
    except ValueError as fault:
        raise ResultsError(f"{where} is not JSON that an explanation may be: {fault}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ResultsError(
            f"{where} is no explanation of schema {SCHEMA}", "Make it again: mimbench explain --record"
        )
    found: Explanation = parse(content, Explanation, where)
    if reason := _unsound(found):
        raise ResultsError(f"{where} is unsound: {reason}", "Make it again: mimbench explain --record")
    return found


def _unsound(found: Explanation) -> str | None:
    """What does not follow from the rest of an explanation, or None."""
    count = len(found.parts)
    if count > MOST_PARTS:
        return f"it has {count} parts, more than can be walked"
    stops = {frozenset(stop.parts): stop.value for stop in found.stops}
    everything = frozenset(range(count))
    if not found.stops or found.stops[0].parts or set(found.stops[-1].parts) != everything:
        return "its scores do not begin at A and end with all parts changed"
    if len(stops) < len(found.stops) or not all(held <= everything for held in stops):
        return "its scores name parts twice, or parts that are not there"
    if not ways(stops, everything).get(frozenset()):
        return "its scores connect no order of the parts"
    due = shares(stops, count)
    if not all(_near(part.points, points) for part, points in zip(found.parts, due, strict=True)):
        return "the points of its parts do not follow from its scores"
    if not _near(found.a.value, found.stops[0].value):
        return "its walk does not begin at A"
    if found.gap.points is not None and not _near(found.gap.points, found.b.value - found.a.value):
        return "its gap is not B - A"
    if not found.apart and not _near(found.b.value, found.stops[-1].value):
        return "its walk does not end at B, and nothing says why"
    sound = foreign.is_moment(found.created)
    return None if sound else f"created is '{found.created}', not a time with its zone"


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= EXACT * max(1.0, abs(a), abs(b))


def read(file: Path) -> Explanation:
    """The explanation in a file. Raises ResultsError that names the file and what is wrong in it."""
    try:
        return loads(foreign.read_text(file), str(file))
    except (OSError, UnicodeDecodeError) as fault:
        raise ResultsError(f"{file} cannot be read: {fault}") from None


def scan(folder: Path) -> tuple[list[Explanation], list[ResultsError]]:
    """All explanations of a results folder, by name, and what is wrong with the files that are none."""
    found, faults = [], []
    for file in sorted((folder / "explained").glob("*.json")):
        try:
            explanation = read(file)
            if place(explanation, folder) != file:
                raise ResultsError(f"{file} lies in the wrong place", f"It belongs to {explanation.id}.json")
            found.append(explanation)
        except ResultsError as fault:
            faults.append(fault)
    return found, faults


def _plain(text: str) -> str:
    """A name for a file: lower case, digits and _, at most 24 letters."""
    return re.sub(r"[^a-z0-9_]+", "_", text.lower())[:24]
