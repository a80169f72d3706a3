"""The regression check: recorded metrics against baselines, each an interval written from earlier records."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mimbench import config, foreign, record, verify
from mimbench.errors import ConfigError, ResultsError
from mimbench.record import Record

SCHEMA = 1


@dataclass(frozen=True)
class Identity:
    """Which runs a baseline speaks of: one setting under some seeds."""

    method: str
    preset: str
    overrides: dict[str, Any]
    pretrain_dataset: str
    protocol: str
    recipe: str
    dataset: str
    seeds: list[int]

    def run_ids(self) -> list[str]:
        """The ids of the runs, in the order of the seeds."""
        same = {k: v for k, v in vars(self).items() if k != "seeds"}
        return [record.run_id(seed=seed, **same) for seed in self.seeds]

    @property
    def name(self) -> str:
        """A readable and unique name, used for the file."""
        same = {k: v for k, v in vars(self).items() if k != "seeds"}
        return f"{self.method}-{self.protocol}-{config.digest(same, length=8)}"


@dataclass(frozen=True)
class Origin:
    """How a baseline was obtained."""

    how: str
    created: str  # of the newest record
    fingerprint: str  # of the way in which the records were scored
    values: list[float]  # per seed
    commands: list[str]  # per seed: what repeats the run


@dataclass(frozen=True)
class Baseline:
    """The interval in which the mean over the seeds is expected."""

    identity: Identity
    metric: str
    unit: str
    low: float
    high: float
    origin: Origin
    schema: int = SCHEMA


@dataclass(frozen=True)
class Row:
    """What the check says of one baseline."""

    status: Literal["ok", "failed", "missing", "stale"]
    method: str
    protocol: str
    recipe: str
    dataset: str
    seeds: int
    metric: str
    value: float | None
    low: float | None
    high: float | None
    unit: str
    note: str  # what is wrong, or ""


def check(folder: Path, run: bool = False) -> list[Row]:
    """A row per baseline of a results folder; ``run`` first does the runs that are missing or stale.

    The caller exits with 1 when ``failed(rows)``. A stale row is inside its interval by records of other code.
    """
    rows = []
    for baseline in read_all(folder):
        fault = _run(baseline, folder) if run else ""
        rows.append(_row(baseline, "failed", None, fault) if fault else compare(baseline, folder))
    return rows


def failed(rows: Iterable[Row]) -> bool:
    """Whether any metric has left its interval or cannot be compared."""
    return any(row.status in ("failed", "missing") for row in rows)


def compare(baseline: Baseline, folder: Path) -> Row:
    """Sets the records of a results folder against one baseline."""
    try:
        found = {seed: _find(baseline, seed, folder) for seed in baseline.identity.seeds}
    except ResultsError as fault:
        return _row(baseline, "failed", None, str(fault))
    if lacking := [str(seed) for seed, made in found.items() if made is None]:
        return _row(baseline, "missing", None, f"no record for seed {', '.join(lacking)}")
    records = [made for made in found.values() if made is not None]
    if any(baseline.metric not in made.metrics for made in records):
        return _row(baseline, "failed", None, f"a record has no metric '{baseline.metric}'")
    value = math.fsum(made.metrics[baseline.metric].value for made in records) / len(records)
    old = next(filter(None, map(record.stale, records)), "")
    if not baseline.low <= value <= baseline.high:
        return _row(baseline, "failed", value, "outside the interval" + (f"; {old}" if old else ""))
    if any(made.fingerprint != baseline.origin.fingerprint for made in records):
        old = old or "scored in another way than the baseline"
    return _row(baseline, "stale" if old else "ok", value, old)


def baseline(records: Sequence[Record]) -> Baseline:
    """The baseline that records of one setting, which differ by their seed, give for their primary metric.

    With several seeds it is Student's interval of their mean, widened by the sampling error of the test
    images (root of the sum of squares); with one seed the interval over test images alone.
    Raises ResultsError where neither exists.
    """
    from mimbench.stats import seed_interval

    records = sorted(records, key=lambda made: made.seed)
    first = records[0]
    for made in records:
        if dataclasses.replace(_identity([made]), seeds=[]) != dataclasses.replace(
            _identity([first]), seeds=[]
        ):
            raise ResultsError(f"runs {first.id} and {made.id} differ by more than their seed")
    if len({made.fingerprint for made in records}) > 1:
        raise ResultsError(f"the runs of {_identity(records).name} were not all scored in the same way")
    scores = [made.metrics[first.primary] for made in records]
    mean, low, high = seed_interval([score.value for score in scores])
    below = [score.value - score.low for score in scores if score.low is not None]
    above = [score.high - score.value for score in scores if score.high is not None]
    if low is None or high is None:
        if not below or not above:
            raise ResultsError(
                f"{first.primary} of run {first.id} has no interval", "Run it with two seeds or more"
            )
        low = high = mean
        how = "1 seed: interval over test items"
    else:
        how = f"{len(records)} seeds: Student's t interval, widened by the error over test items"
    return Baseline(
        identity=_identity(records),
        metric=first.primary,
        unit=first.score.unit,
        low=mean - math.hypot(mean - low, _mean(below)),
        high=mean + math.hypot(high - mean, _mean(above)),
        origin=Origin(
            how=how,
            created=max(made.created for made in records),
            fingerprint=first.fingerprint,
            values=[score.value for score in scores],
            commands=[made.command for made in records],
        ),
    )


def update(folder: Path) -> tuple[list[Path], list[str]]:
    """Writes a baseline for every setting that has records by today's code.

    Returns the files written, and a sentence for each setting left out.
    """
    groups: dict[str, list[Record]] = {}
    records, faults = record.scan(folder)
    for made in records:
        groups.setdefault(_identity([made]).name, []).append(made)
    written, left_out = [], [str(fault) for fault in faults]
    for name, group in sorted(groups.items()):
        fresh = [made for made in group if record.stale(made) is None]
        if not fresh:
            left_out.append(f"{name}: {record.stale(group[0])}")
            continue
        try:
            written.append(write(baseline(fresh), folder))
        except ResultsError as fault:
            left_out.append(f"{name}: {fault}")
    return written, left_out


def write(found: Baseline, folder: Path) -> Path:
    """Writes a baseline to its place in a results folder, replacing an earlier one of the same setting."""
    file = folder / "baselines" / f"{found.identity.name}.json"
    text = json.dumps(dataclasses.asdict(found), sort_keys=True, indent=1, allow_nan=False) + "\n"
    try:
        record.write_text(file, text)
    except OSError as fault:
        raise ResultsError(f"{file} cannot be written: {fault.strerror or fault}") from None
    return file


def read(file: Path) -> Baseline:
    """A baseline from its file. Raises ResultsError that names the file and its fault."""
    try:
        content = foreign.decode_json(foreign.read_text(file))
    except (OSError, ValueError) as fault:
        raise ResultsError(f"{file} cannot be read: {fault}") from None
    if isinstance(content, dict) and content.get("schema") != SCHEMA:
        raise ResultsError(f"{file} has schema {content.get('schema')}, not {SCHEMA}")
    found: Baseline = record.parse(content, Baseline, str(file))
    if not found.identity.seeds or not found.low <= found.high:
        raise ResultsError(f"{file} holds no seed or no interval")
    for name in (found.identity.method, found.identity.protocol):  # they become folders
        if not foreign.is_name(name):
            raise ResultsError(f"{file}: '{name}' is no name of a method or protocol")
    if len(found.origin.commands) != len(found.identity.seeds):
        raise ResultsError(f"{file} does not hold a command for each seed")
    return found


def read_all(folder: Path) -> list[Baseline]:
    """All baselines of a results folder, in a stable order."""
    return [read(file) for file in sorted((folder / "baselines").glob("*.json"))]


def _identity(records: Sequence[Record]) -> Identity:
    first = records[0]
    return Identity(
        method=first.method.slug,
        preset=first.preset,
        overrides=first.overrides,
        pretrain_dataset=first.pretrain.dataset,
        protocol=first.protocol.name,
        recipe=first.protocol.recipe,
        dataset=first.data.name,
        seeds=[made.seed for made in records],
    )


def _find(baseline: Baseline, seed: int, folder: Path) -> Record | None:
    identity = dataclasses.replace(baseline.identity, seeds=[seed])
    file = folder / "runs" / identity.method / identity.protocol / f"{identity.run_ids()[0]}.json"
    return record.read_in_place(file, folder) if file.is_file() else None


def _run(baseline: Baseline, folder: Path) -> str:
    """Does the runs of a baseline that are missing or stale; what went wrong, or an empty string."""
    for seed, command in zip(baseline.identity.seeds, baseline.origin.commands, strict=True):
        made = _find(baseline, seed, folder)
        if made is not None and record.stale(made) is None:
            continue
        try:
            words = verify.words_of(command, f"the baseline {baseline.identity.name}")
        except ConfigError as fault:
            return str(fault)
        # What it prints goes to stderr: standard output belongs to the check's own table.
        done = subprocess.run(
            [sys.executable, "-m", "mimbench", *words],
            stdout=2,
            env={**os.environ, "MIMBENCH_RESULTS": str(folder)},
        )
        if code := done.returncode:
            return f"'{command}' ended with code {code}"
    return ""


def _row(
    baseline: Baseline, status: Literal["ok", "failed", "missing", "stale"], value: float | None, note: str
) -> Row:
    identity = baseline.identity
    return Row(
        status=status,
        method=identity.method,
        protocol=identity.protocol,
        recipe=identity.recipe,
        dataset=identity.dataset,
        seeds=len(identity.seeds),
        metric=baseline.metric,
        value=value,
        low=baseline.low,
        high=baseline.high,
        unit=baseline.unit,
        note=note,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
