"""What replays of golden vectors found, as ``results/parity/`` keeps it and the report shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mimbench import foreign, record, registry
from mimbench.errors import ResultsError


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


def read(file: Path) -> Certificate:
    """The certificate in a file. Raises ResultsError for a damaged one."""
    try:
        found: Certificate = record.parse(foreign.decode_json(foreign.read_text(file)), Certificate, "it")
        if all(row.name.startswith("grad_norm") for row in found.rows):
            raise ValueError("it compares no output")
    except (OSError, ValueError, ResultsError) as fault:
        why = fault.problem if isinstance(fault, ResultsError) else fault
        remedy = "Make it again: mimbench parity --record"
        raise ResultsError(f"{file} cannot be read: {why}", remedy) from None
    return found


def scan(results: Path) -> tuple[list[Certificate], list[ResultsError]]:
    """The certificates that are kept, by case, and what is wrong with the files that are none."""
    found, faults = [], []
    for file in sorted((results / "parity").glob("*.json")):
        try:
            found.append(read(file))
        except ResultsError as fault:
            faults.append(fault)
    return found, faults
