"""From the settings of one recipe to those of another: every mixture that an order of changing them passes through.

Pure but for the scores: what a mixture is worth is asked of a function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimbench import config
from mimbench.errors import ConfigError
from mimbench.explanation import ways
from mimbench.progress import Progress
from mimbench.task import Result

FEW = 6  # settings up to which all orders are walked: at most 64 scores; beyond it one order
Names = frozenset[str]


@dataclass
class Walk:
    """A walk from the settings ``a`` to ``b``: which settings changed together, and what was found on the way."""

    parts: list[tuple[str, ...]]
    results: dict[frozenset[int], Result]  # by the parts that have b's settings
    refused: list[str]  # why some combinations do not exist
    idle: list[str]  # settings that differ and move nothing

    @property
    def ends(self) -> tuple[Result, Result]:
        return self.results[frozenset()], self.results[frozenset(range(len(self.parts)))]


@dataclass
class _Space:
    """All mixtures of two settings of a protocol, and the scores of those that were tried."""

    a: Any
    b: Any
    tables: tuple[dict[str, Any], dict[str, Any]]
    score: Callable[[Any], Result]
    reasons: dict[Names, str] = field(default_factory=dict)  # of mixtures that do not exist
    found: dict[Names, Result] = field(default_factory=dict)

    def settings(self, names: Names) -> Any:
        """The settings ``a`` with those called ``names`` from ``b``. Raises ConfigError for what is refused."""
        mixed = {name: self.tables[name in names][name] for name in self.tables[0]}
        return config.build(type(self.a), _nested(mixed))

    def exists(self, names: Names) -> bool:
        if names not in self.reasons and names not in self.found:
            try:
                self.settings(names)
            except ConfigError as fault:
                self.reasons[names] = fault.problem
        return names not in self.reasons

    def tried(self, names: Names) -> bool:
        """Scores a mixture; False where the protocol refuses it."""
        if names not in self.found:
            try:
                self.found[names] = self.score(self.settings(names))
            except ConfigError as fault:
                self.reasons[names] = fault.problem
        return names in self.found


def walk(
    a: Any,
    b: Any,
    score: Callable[[Any], Result],
    idle: Callable[[Any], Sequence[str]] = lambda settings: (),
    progress: Progress | None = None,
) -> Walk:
    """Scores every mixture of the settings ``a`` and ``b`` that an order of changing them passes through.

    ``a`` and ``b`` are instances of one protocol's Settings, ``idle`` names those of an instance that move nothing
    beside the others: where they differ, that is no difference. A mixture that the protocol refuses is passed by;
    settings that can then not be changed one at a time are changed together, as few as possible. With more than
    ``FEW`` parts they are changed in the order in which they stand in Settings.
    """
    names, tables, without = differing(a, b, idle)
    space = _Space(a, b, tables, score)
    while True:
        parts, needed = plan(names, space.exists)
        ahead = [held for held in needed if _names(parts, held) not in space.found]
        label = f"{len(needed)} mixtures of {len(parts)} settings"
        for held in progress.track(ahead, label) if progress and len(ahead) > 2 else ahead:
            mixture = _names(parts, held)
            if not space.tried(mixture) and len(held) in (0, len(parts)):
                raise ConfigError(f"one of the two cannot be scored: {space.reasons[mixture]}")
            if mixture in space.reasons:
                break  # then another way must be found
        else:
            break
    results = {
        held: space.found[_names(parts, held)] for held in sorted(needed, key=lambda s: (len(s), sorted(s)))
    }
    return Walk(parts, results, list(dict.fromkeys(space.reasons.values())), without)


def plan(
    names: Sequence[str], exists: Callable[[Names], bool]
) -> tuple[list[tuple[str, ...]], set[frozenset[int]]]:
    """Into which parts settings are grouped, and which sets of changed parts some order passes through.

    As many parts as allow any order in which each mixture ``exists``; with more than ``FEW`` names one order only.
    """
    if len(names) > FEW:
        return _in_line(names, exists)
    for parts in _partitions(names):
        sets = {
            frozenset(held)
            for size in range(len(parts) + 1)
            for held in itertools.combinations(range(len(parts)), size)
            if exists(_names(parts, held))
        }
        everything = frozenset(range(len(parts)))
        ahead, behind = ways(sets, everything), ways((everything - held for held in sets), everything)
        if ahead.get(frozenset()):
            return parts, {held for held in sets if ahead[held] and behind[everything - held]}
    raise ConfigError("the settings of one of the two do not exist any more")


def _in_line(
    names: Sequence[str], exists: Callable[[Names], bool]
) -> tuple[list[tuple[str, ...]], set[frozenset[int]]]:
    """One order: the first setting that can be changed is, and where none can, the fewest that can together."""
    parts: list[tuple[str, ...]] = []
    left = list(names)
    while left:
        changed = frozenset(itertools.chain(*parts))
        groups = itertools.chain.from_iterable(
            itertools.combinations(left, size) for size in range(1, len(left) + 1)
        )
        parts.append(next(group for group in groups if exists(changed | set(group))))
        left = [name for name in left if name not in parts[-1]]
    return parts, {frozenset(range(count)) for count in range(len(parts) + 1)}


def _partitions(names: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """All ways of grouping a few names, those with many groups first."""

    def grow(left: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
        if not left:
            yield []
            return
        for rest in grow(left[1:]):
            yield [(left[0],), *rest]
            for i, group in enumerate(rest):
                yield [*rest[:i], (left[0], *group), *rest[i + 1 :]]

    return sorted(grow(names), key=lambda groups: -len(groups))


def _names(parts: Sequence[tuple[str, ...]], held: Any) -> Names:
    return frozenset(name for part in held for name in parts[part])


def differing(
    a: Any, b: Any, idle: Callable[[Any], Sequence[str]]
) -> tuple[list[str], tuple[dict[str, Any], dict[str, Any]], list[str]]:
    """The dotted names of the settings in which two differ; all settings of both; and what differs but is ``idle``.

    In the tables, what moves nothing in one is as in the other.
    """
    ours, theirs = leaves(config.to_dict(a)), leaves(config.to_dict(b))
    without = []
    for name in ours:
        if ours[name] != theirs[name] and (name in idle(a) or name in idle(b)):
            source, target = (theirs, ours) if name in idle(a) else (ours, theirs)
            target[name] = source[name]
            without.append(name)
    names = [name for name in ours if name != "recipe" and ours[name] != theirs[name]]
    return names, (ours, theirs), without


def leaves(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; lists are one value."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= leaves(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return found


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split(".")
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return table
