"""What the site is rendered from."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from mimbench import certificate, explanation, paths, reported, speed
from mimbench.certificate import Certificate
from mimbench.errors import DataError, MimbenchError
from mimbench.explanation import Explanation
from mimbench.record import Record, scan


@dataclass
class Source:
    """What the site is rendered from."""

    records: list[Record] = field(default_factory=list)
    papers: list[reported.Row] = field(default_factory=list)  # the reported numbers
    faults: list[str] = field(default_factory=list)  # one sentence for each file that could not be read
    comparisons: list[speed.Comparison] = field(default_factory=list)  # of speed
    certificates: list[Certificate] = field(default_factory=list)  # of parity
    catalogue: list[reported.Paper] = field(default_factory=list)  # papers that are here or planned
    explained: list[Explanation] = field(default_factory=list)  # gaps between two numbers


def load(folder: Path) -> Source:
    """All records and speed comparisons of a results folder and all reported numbers; what cannot be read becomes
    a fault."""
    records, damaged = scan(folder)
    comparisons, unread = speed.scan(folder)
    explained, unsound = explanation.scan(folder)
    certificates, illegible = certificate.scan(folder)
    faults: list[MimbenchError] = [*damaged, *unread, *unsound, *illegible]
    rows: list[reported.Row] = []
    for slug in reported.slugs():
        try:
            rows += reported.read(slug)
        except DataError as fault:
            faults.append(fault)
    catalogue: list[reported.Paper] = []
    try:
        catalogue = reported.catalogue()
    except DataError as fault:
        faults.append(fault)
    # The site is published: paths begin at the results or at the methods, not at the user's folders.
    places = (f"{folder}/", f"{paths.methods()}/", f"{paths.papers()}/")
    texts = [
        functools.reduce(lambda text, place: text.replace(place, ""), places, str(fault)) for fault in faults
    ]
    return Source(records, rows, texts, comparisons, certificates, catalogue, explained)
