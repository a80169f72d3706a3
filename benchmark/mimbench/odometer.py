"""How often the labels of each test split were read, and how much the best of several reads flatters.

A read is one set of predictions held against the test labels: one for each evaluation, and one for each candidate
where the labels chose among several. Repetitions add up (``Record.test_reads``). Not counted are a run whose record was
deleted, one that was interrupted before its record was written, and what leaves no record of a run: ``mimbench score``,
and ``mimbench explain``, which states its own reads.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mimbench import stats
from mimbench.record import Record, setting, stale, test_selected, unpack

# Settings in which a recipe that chooses on the test split may differ from one that chooses before.
_CHOICE = ("recipe", "selection_images")


@dataclass
class Count:
    """Reads by what was asked for: code that changed since makes no new encoder."""

    method: str
    preset: str
    backbone: str
    data: str  # pretrained on
    seed: int
    reads: int = 0
    runs: int = 0
    protocols: Counter[str] = field(default_factory=Counter)  # reads by protocol


@dataclass
class Dial:
    """The reads of one test split."""

    data: str
    n: int  # test images
    reads: int = 0
    accuracies: int = 0  # reads that gave one, which is what flattery bounds
    runs: int = 0
    protocols: Counter[str] = field(default_factory=Counter)
    encoders: list[Count] = field(default_factory=list)  # most read first

    @property
    def flattery(self) -> float:
        """By how many points the best of all accuracies exceeds its true score in expectation, at most.

        The expected maximum of R errors of standard deviation s is below s sqrt(2 ln R) however they depend (errors
        with tails like a normal distribution's), and s is at most 50 / sqrt(n) points.
        """
        if not self.accuracies or not self.n:
            return 0.0
        return 50 / math.sqrt(self.n) * math.sqrt(2 * math.log(self.accuracies))


def dials(records: Iterable[Record]) -> list[Dial]:
    """One for each test split of which labels were read, the most read first."""
    found: dict[str, Dial] = {}
    encoders: dict[tuple[str, str, int], Count] = {}
    for run in sorted(records, key=lambda run: run.id):
        if not run.test_reads:
            continue
        place = run.data.name
        dial = found.setdefault(place, Dial(place, run.data.n_test))
        dial.n = max(dial.n, run.data.n_test)
        key = (place, setting(run), run.seed)
        if key not in encoders:
            told = (run.method.slug, run.preset, run.backbone, run.pretrain.dataset, run.seed)
            encoders[key] = Count(*told)
            dial.encoders.append(encoders[key])
        dial.accuracies += run.test_reads if run.correct is not None else 0
        for count in (dial, encoders[key]):
            count.reads += run.test_reads
            count.runs += 1
            count.protocols[run.protocol.name] += run.test_reads
    for dial in found.values():
        dial.encoders.sort(key=lambda count: (-count.reads, count.method, count.preset, count.seed))
    return sorted(found.values(), key=lambda dial: (-dial.reads, dial.data))


@dataclass(frozen=True)
class Optimism:
    """One encoder scored by the best of several settings on the test split, and by the one chosen before."""

    best: Record
    ours: Record
    paired: stats.Paired  # best - ours, over the same test images

    @property
    def candidates(self) -> dict[str, float]:
        """The scores that the test labels chose from, by name."""
        found: dict[str, float] = self.best.details.get("test_top1", {})
        return dict(sorted(found.items(), key=lambda pair: (len(pair[0]), pair[0])))  # 20 before 100

    @property
    def spread(self) -> float:
        """Points between the best and the worst candidate."""
        values = self.candidates.values()
        return max(values) - min(values) if values else 0.0

    @property
    def stale(self) -> str:
        """Why the two no longer speak of today's code, or empty."""
        return "; ".join(dict.fromkeys(filter(None, map(stale, (self.best, self.ours)))))


def optimism(records: Iterable[Record]) -> list[Optimism]:
    """Every encoder that was scored in both ways, by data set, method and seed."""
    chosen: dict[tuple[Any, ...], Record] = {}
    best: list[Record] = []
    for run in records:
        if run.correct is None:
            continue
        if test_selected(run):
            best.append(run)
        else:
            chosen[_yardstick(run)] = run
    best.sort(
        key=lambda run: (run.protocol.name, run.data.name, run.method.slug, run.preset, run.seed, run.id)
    )
    found = []
    for run in best:
        ours = chosen.get(_yardstick(run))
        if ours is None or ours.correct is None or run.correct is None:
            continue
        sides = unpack(run.correct), unpack(ours.correct)
        if len(sides[0]) == len(sides[1]) > 1:
            found.append(Optimism(run, ours, stats.paired(*sides)))
    return found


def _yardstick(run: Record) -> tuple[Any, ...]:
    """What two runs share that differ in how they choose alone: the weights, the data and all other settings."""
    protocol = run.protocol
    rest = {name: value for name, value in protocol.settings.items() if name not in _CHOICE}
    others = json.dumps(rest, sort_keys=True)  # with all that there is to choose from
    scored = (run.pretrain.key, run.seed, run.data.fingerprint, run.encoder.input_size)
    return *scored, protocol.name, protocol.version, others
