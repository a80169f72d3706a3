"""What replays of golden vectors found, as ``results/parity/`` keeps it and the report shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mimbench import registry
from mimbench.errors import DataError


@dataclass(frozen=True)
class Comparison:
    """One array of a case: how far ours is from the official one, and how far it may be."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """What a replay found, to be kept in ``results/parity/``."""

    case: str
    method: str
    code: str  # code_of(method) when it ran
    repository: str  # of the authors' code
    commit: str
    torch: str  # its version here
    rows: list[Comparison]

    @property
    def worst(self) -> float:
        """The largest relative difference of an output."""
        return max(row.difference for row in self.rows if not row.name.startswith("grad_norm"))

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def fresh(self) -> bool:
        """Whether it speaks of today's code."""
        return self.method in registry.methods() and self.code == code_of(self.method)


def code_of(slug: str) -> str:
    """The hash of a method's code with its ``official.py``."""
    return registry.code_hash(*registry.method_code(slug), registry.method(slug).folder / "official.py")


def certificates(results: Path) -> list[Certificate]:
    """The certificates that are kept, by case. Raises DataError for a damaged one."""
    found = []
    for file in sorted((results / "parity").glob("*.json")):
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            found.append(Certificate(**table | {"rows": [Comparison(**row) for row in table["rows"]]}))
        except (ValueError, TypeError, KeyError, OSError) as fault:
            raise DataError(
                f"{file} cannot be read: {fault}", "Make it again: mimbench parity --record"
            ) from None
    return found
