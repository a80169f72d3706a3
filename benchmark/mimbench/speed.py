"""Side-by-side timings of our code and what a user would pick instead, on the same work in one run.

A script in ``benchmark/speed`` hands ``measure`` one call per contender, builds a ``Comparison`` from what comes
back and ends with ``main``. Single times say little on a shared machine, so contenders take turns, the first
round is dropped, and what is reported are medians, ratios, and the distance to a limit measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mimbench import config, foreign, paths
from mimbench.environment import Facts, environment
from mimbench.errors import MimbenchError, ResultsError
from mimbench.record import parse

SCHEMA = 1
ROUNDS = 6  # of which the first is dropped


@dataclass(frozen=True)
class Timing:
    """One contender's rounds."""

    name: str  # "faiss IndexFlatIP"
    seconds: list[float]  # wall time of each round that counts
    version: str = ""  # of the package it comes from
    note: str = ""  # what a reader must know, such as its accuracy

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Limit:
    """The least time that the machine allows, measured in the same run."""

    what: str  # "the float32 matrix product at 178 GFLOP/s"
    seconds: float


@dataclass(frozen=True)
class Bar:
    """What we set ourselves: ``against`` must take at least ``ratio`` times as long as ours."""

    against: str
    ratio: float


@dataclass(frozen=True)
class Scale:
    """Our time and memory at one size of the work."""

    size: str  # "2x: 100,000 x 192"
    seconds: float
    peak_bytes: int | None = None  # rise of memory during the call


@dataclass(frozen=True)
class Comparison:
    """What one script found on one machine; ``results/speed`` holds the latest of each as JSON."""

    name: str  # of the script and the variant: "knn"
    title: str
    work: str  # what is done, with every size
    ours: str  # name of our timing
    timings: list[Timing]
    agreement: list[str]  # what was checked to be equal before any time was taken
    limit: Limit | None = None
    bars: list[Bar] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # contender: why it did not run
    growth: list[Scale] = field(default_factory=list)
    device: str = "cpu"
    threads: int = 1
    created: str = ""
    environment: Facts = field(default_factory=dict)
    schema: int = SCHEMA

    def timing(self, name: str) -> Timing:
        return next(timing for timing in self.timings if timing.name == name)

    def ratio(self, name: str) -> float:
        """How many times as long as ours a contender takes."""
        return self.timing(name).median / self.timing(self.ours).median

    @property
    def of_limit(self) -> float | None:
        """How many times the limit we take."""
        return self.timing(self.ours).median / self.limit.seconds if self.limit else None

    @property
    def file(self) -> str:
        """One file for each comparison and machine."""
        known = self.environment
        machine = [known.get(key) for key in ("cpu", "gpu", "cores", "device")]
        return f"{self.name}-{config.digest(machine, self.threads, length=6)}.json"


def measure(
    calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call in each round but the first.

    In a round every call runs once; each round starts with another one, so that none always follows the same.
    """
    import torch

    from mimbench import machine

    assert rounds >= 2, "the first round is dropped"
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = machine.seconds(calls[name], torch.device(device))
            if number:
                found[name].append(taken)
    return found


def version(package: str) -> str:
    """The installed version of a distribution, or ''."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(script: Callable[[argparse.Namespace], Iterable[Comparison]], doc: str | None) -> None:
    """Runs a script from the command line: pins threads, prints each comparison and writes its record."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of every contender (default 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"the first is dropped (default {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; not saved")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):
        # Read once, when a library is loaded: only a fresh process obeys it everywhere.
        os.environ |= dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads)
        )
        os.execv(sys.executable, [sys.executable, *sys.argv])
    try:
        for comparison in script(options):
            done = dataclasses.replace(
                comparison,
                device=options.device,
                threads=options.threads,
                created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                environment=environment(options.device),
            )
            loads(dumps(done))  # a record that could not be read again must fail in quick mode too
            show(done)
            if not options.quick:
                write(done)
    except MimbenchError as fault:
        sys.exit(f"error: {fault}")


def show(comparison: Comparison) -> None:
    """Prints a comparison as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\n[bold]{comparison.title}[/bold]\n{comparison.work}")
    threads = f"{comparison.threads} thread{'s' * (comparison.threads > 1)}"
    count = len(comparison.timings[0].seconds) if comparison.timings else 0
    console.print(f"{comparison.device}, {threads}, median of {count} interleaved rounds")
    table = Table()
    for heading in ("", "seconds", "range", "x ours", "note"):
        table.add_column(heading, justify="left" if heading in ("", "note") else "right")
    for timing in sorted(comparison.timings, key=lambda timing: timing.median):
        name = f"{timing.name} {timing.version}".rstrip()
        table.add_row(
            f"[bold]{name}[/bold]" if timing.name == comparison.ours else name,
            f"{timing.median:.4g}",
            f"{min(timing.seconds):.3g} to {max(timing.seconds):.3g}",
            f"{comparison.ratio(timing.name):.2f}",
            timing.note,
        )
    console.print(table)
    if comparison.limit and comparison.of_limit:
        limit = comparison.limit
        console.print(
            f"limit: {limit.seconds:.4g} s, {limit.what}; ours takes {comparison.of_limit:.2f} times that"
        )
    for bar in comparison.bars:
        if bar.against in comparison.skipped:
            console.print(f"bar: {bar.ratio:g}x {bar.against}: not run")
            continue
        ratio = comparison.ratio(bar.against)
        verdict = "reached" if ratio >= bar.ratio else "[red]missed[/red]"
        console.print(f"bar: {bar.ratio:g}x {bar.against}: {verdict} ({ratio:.2f}x)")
    for scale in comparison.growth:
        memory = "" if scale.peak_bytes is None else f", {scale.peak_bytes / 2**20:.0f} MiB more at its peak"
        console.print(f"growth: {scale.size}: {scale.seconds:.4g} s{memory}")
    for line in comparison.agreement:
        console.print(f"agreement: {line}")
    for name, reason in comparison.skipped.items():
        console.print(f"skipped: {name}: {reason}")


def folder() -> Path:
    """Where comparisons are kept."""
    return paths.results() / "speed"


def write(comparison: Comparison) -> Path:
    """Keeps a comparison, in place of an earlier one from the same machine."""
    file = folder() / comparison.file
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(dumps(comparison), encoding="utf-8")
        partial.replace(file)
    except OSError as fault:
        raise ResultsError(f"{file} cannot be written: {fault.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return file


def read(file: Path) -> Comparison:
    """A comparison from its file. Raises ResultsError that names the file and what is wrong in it."""
    try:
        return loads(foreign.read_text(file))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ResultsError) as fault:
        why = fault.problem if isinstance(fault, ResultsError) else f"{type(fault).__name__}: {fault}"
        raise ResultsError(
            f"{file} is no speed comparison: {why}", "Delete it and run 'make bench'"
        ) from None


def dumps(comparison: Comparison) -> str:
    """A comparison as JSON."""
    return json.dumps(dataclasses.asdict(comparison), indent=1) + "\n"


def loads(text: str) -> Comparison:
    """A comparison from JSON. Raises ResultsError, ValueError, KeyError or TypeError for anything else."""

    table: dict[str, Any] = foreign.decode_json(text)
    if table["schema"] != SCHEMA:
        raise ValueError(f"its schema is {table['schema']}, not {SCHEMA}")
    limit = parse(table["limit"], Limit, "limit") if table["limit"] else None
    found = dataclasses.replace(parse(table | {"limit": None}, Comparison, "it"), limit=limit)
    if not foreign.is_moment(found.created):
        raise ValueError(f"created is '{found.created}', no time or one without its zone")
    names = [timing.name for timing in found.timings]
    if found.ours not in names or len(set(names)) < len(names):
        raise ValueError("its timings lack ours, or name one contender twice")
    if not {bar.against for bar in found.bars} <= {*names, *found.skipped}:
        raise ValueError("a bar is set against a contender that is not there")
    times = [*(timing.seconds for timing in found.timings), [limit.seconds if limit else 1.0]]
    if not all(seconds and min(seconds) > 0 for seconds in times):
        raise ValueError("a time is missing or not above 0")
    return found


def files(results: Path) -> list[Path]:
    """The files of all comparisons in a results folder, by name."""
    return sorted((results / "speed").glob("*.json"))


def scan(results: Path) -> tuple[list[Comparison], list[ResultsError]]:
    """All comparisons of a results folder, by name, and what is wrong with the files that are none."""
    found, faults = [], []
    for file in files(results):
        try:
            found.append(read(file))
        except ResultsError as fault:
            faults.append(fault)
    return found, faults
