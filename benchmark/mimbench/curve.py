"""A long list of logged points, held as columns: a tenth of the memory of as many dictionaries."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import overload


class Curve(Sequence[Mapping[str, float]]):
    """Points by their place, each a dictionary of what was logged there; equal to a list of the same points."""

    def __init__(self, points: Sequence[Mapping[str, float]]) -> None:
        self._length = len(points)
        self._columns: dict[str, array[float] | array[int]] = {}
        for name in dict.fromkeys(name for point in points for name in point):
            values = [point.get(name, math.nan) for point in points]  # no record holds a NaN
            whole = all(type(value) is int for value in values)
            self._columns[name] = array("q", values) if whole else array("d", values)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> dict[str, float]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, float]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, float] | list[dict[str, float]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._length))]
        found = {name: column[place] for name, column in self._columns.items()}
        return {name: value for name, value in found.items() if value == value}

    def __iter__(self) -> Iterator[dict[str, float]]:
        return (self[i] for i in range(self._length))

    @classmethod
    def of(cls, points: Sequence[Mapping[str, float]]) -> Curve:
        """The same points as columns."""
        return points if isinstance(points, cls) else cls(points)

    @property
    def names(self) -> list[str]:
        """What was logged at one point at least."""
        return list(self._columns)

    def series(self, name: str) -> list[tuple[float, float]]:
        """Step, or place where none was logged, and value of all points with ``name``; faster than point by point."""
        if name not in self._columns:
            return []
        steps = self._columns.get("step", range(self._length))
        pairs = enumerate(zip(steps, self._columns[name], strict=True))
        return [(step if step == step else place, value) for place, (step, value) in pairs if value == value]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Curve({self._columns!r})"
