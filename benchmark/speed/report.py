"""The site and the database from many records: ours beside the few lines of pandas or DuckDB one would write.

The records are made up: five methods under six protocols with five seeds per row, each with a curve of 100 points.
The peers give one table of all runs, or a bare page for each; ours ranks seeds' means with intervals, compares with
papers, and draws. The database is checked row by row in both directions.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import duckdb
import numpy as np
import pandas
import torch

from mimbench import database, machine, record, registry, report
from mimbench.errors import MimbenchError
from mimbench.record import DataUsed, EncoderUsed, MethodUsed, Pretraining, ProtocolUsed, Record
from mimbench.report import ranking, words
from mimbench.speed import Bar, Comparison, Limit, Scale, Timing, main, measure, version
from mimbench.task import Metric

METHODS = ("mae", "simmim", "cropmae", "simsiam", "supervised")
SEEDS = 5
CPU = torch.device("cpu")
Calls = dict[str, Callable[[], object]]


def made(number: int) -> Record:
    """A record; each number has its own run."""
    draw = np.random.default_rng(number)
    rest, seed = divmod(number, SEEDS)
    rest, which = divmod(rest, len(METHODS))
    protocols = sorted(registry.protocols())
    rest, scored = divmod(rest, len(protocols))
    slug, protocol, preset = METHODS[which], protocols[scored], f"p{rest}"
    value = 50 + 5 * which + rest % 7 + draw.normal()
    correct = draw.random(10_000) < value / 100
    value = 100 * float(correct.mean())
    return Record(
        command=f"mimbench run --method {slug} --protocol {protocol} --dataset cifar10 --preset {preset} --seed {seed}",
        method=MethodUsed(slug, record.method_code(slug)),
        protocol=ProtocolUsed(protocol, 1, "plain", record.protocol_code(protocol), {"k": [10, 20], "lr": 0.1}),
        config={"mask_ratio": 0.75, "recipe": {"epochs": 100, "budget": None, "lr": 1e-3}, "vit": {"depth": 12}},
        preset=preset,
        overrides={},
        seed=seed,
        pretrain=Pretraining("cifar10", "c", f"{slug}{preset}{seed}", 5_000_000, 1200, 100, 700.0, 700.0, 0, 1 << 30,
                             "bf16", True),
        data=DataUsed("cifar10", "c+t", "", 50_000, 10_000),
        encoder=EncoderUsed(5_400_000, "mean of the patch tokens", 192, 32, [0.5] * 3, [0.25] * 3),
        backbone="vit-192x12/4",
        environment={"python": "3.11", "torch": "2.13", "cpu": "A processor", "gpu": None, "device": "cpu"},
        git={"commit": "0" * 40, "dirty": False},
        seconds={"features": 3.5, "classify": 1.25, "total": 4.75},
        curve=[{"step": 12 * i, "epoch": float(i), "lr": 1e-3, "loss": 1 / (1 + i)} for i in range(100)],
        metrics={name: Metric(value + more, value + more - 1, value + more + 1, 10_000)
                 for name, more in (("top1", 0.0), ("top5", 20.0))},
        primary="top1",
        details={"chosen": 20, "accuracy": {f"class {i}": value + i for i in range(10)}},
        correct=record.pack(correct),
        created=f"2026-01-{1 + number % 28:02d}T12:00:00+00:00",
    )  # fmt: skip


def fill(folder: Path, stop: int, start: int = 0) -> list[Record]:
    """Writes the records numbered ``start`` to ``stop`` without waiting for the disk."""
    records = [made(number) for number in range(start, stop)]
    for each in records:
        file = record.place(each, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record.dumps(each))
    return records


def render(folder: Path) -> Path:
    """Our site of a results folder, in a new folder below it."""
    return report.report(folder, Path(tempfile.mkdtemp(dir=folder))).parent


def build(folder: Path) -> None:
    """Our database of a results folder, from scratch."""
    (folder / database.NAME).unlink(missing_ok=True)
    database.update(folder)


def sites(folder: Path, records: list[Record]) -> tuple[Calls, list[str]]:
    """What renders ``folder``, ours first, and what was found to agree."""

    def read() -> pandas.DataFrame:
        return pandas.json_normalize(
            [json.loads(file.read_text()) for file in record.files(folder)], max_level=2
        )

    def one_table() -> Path:
        place = Path(tempfile.mkdtemp(dir=folder))
        read().to_html(place / "index.html")
        return place

    def page_each() -> Path:
        place = one_table()
        for name, row in read().set_index("id").iterrows():
            row.to_frame().to_html(place / f"{name}.html")
        return place

    place, ids = render(folder), {each.id for each in records}
    if {file.stem for file in (place / "runs").glob("*.html")} != ids:
        raise MimbenchError("the site lacks runs or has too many")
    table = read()
    if set(table["id"]) != ids or len(list(page_each().glob("*.html"))) != len(ids) + 1:
        raise MimbenchError("the tables of pandas lack runs")
    means = table.groupby(["method.slug", "protocol.name", "preset"])["metrics.top1.value"].mean().to_dict()
    rows = {
        (row.method, t.protocol, row.preset): row.mean for t in ranking.tables(records, []) for row in t.rows
    }
    if rows.keys() != means.keys() or not all(math.isclose(rows[key], means[key]) for key in rows):
        raise MimbenchError("the means in our tables are not those that pandas computes")
    shown = (place / "index.html").read_text()
    if any(f">{words.number(mean, '%')}<" not in shown for mean in means.values()):
        raise MimbenchError("a mean is not on the front page")
    return {
        "mimbench": lambda: render(folder),
        "pandas to_html": one_table,
        "pandas to_html, a page a run": page_each,
    }, [
        f"{len(ids):,} runs in all of them, a page for each in ours",
        f"the {len(means):,} means over seeds equal those of a pandas groupby, and each is on our front page",
    ]


def databases(folder: Path, records: list[Record]) -> tuple[Calls, list[str]]:
    """What builds a database of ``folder`` or brings it up to date, ours first, and what was found to agree."""
    changed = record.place(records[0], folder)
    other = folder / "plain.duckdb"

    def one_changed() -> None:
        changed.touch()
        database.update(folder)

    def plain() -> None:
        other.unlink(missing_ok=True)
        with duckdb.connect(str(other), config={"threads": 1}) as connection:
            pattern = f"{glob.escape(str(folder))}/runs/*/*/*.json"
            connection.execute("CREATE TABLE runs AS FROM read_json_auto(?, union_by_name = true)", [pattern])

    for step in (lambda: build(folder), one_changed, plain):
        step()
    counts = "SELECT count(DISTINCT id), sum({}) FROM runs"
    ours = database.query(counts.format("value"), folder)[1][0]
    with duckdb.connect(str(other), read_only=True) as connection:
        theirs = connection.execute(counts.format("metrics.top1.value")).fetchone()
    if ours[0] != len(records) or not np.allclose(ours, theirs, rtol=1e-12):
        raise MimbenchError(f"our database holds {ours}, that of DuckDB alone {theirs}")
    points = database.query("SELECT count(*) FROM curves", folder)[1][0][0]
    if points != sum(len(point) - 1 for each in records for point in each.curve):
        raise MimbenchError(f"{points} points of curves are not all")
    return {
        "mimbench, from scratch": lambda: build(folder),
        "mimbench, one record changed": one_changed,
        "mimbench, nothing changed": lambda: database.update(folder),
        "DuckDB read_json_auto": plain,
    }, [f"{ours[0]:,} runs in both, with the same sum of scores; {points:,} points of curves in rows of ours"]


NOTES = {
    "mimbench": "ranked tables with intervals, a page for each protocol, method and run, curves drawn",
    "pandas to_html": "one table of all runs, unranked, long cells cut short",
    "pandas to_html, a page a run": "that table, and a bare one for each run",
    "mimbench, from scratch": "every field of each record checked; runs, metrics and curves in rows of their own",
    "DuckDB read_json_auto": "one table with nested columns, unchecked",
}


def run(options: argparse.Namespace) -> Iterable[Comparison]:
    size = 10 if options.quick else 500
    for name, title, prepare, ours, against in (
        ("report-site", "The site rendered from records", sites, render, "pandas to_html, a page a run"),
        ("report-database", "The database built from records", databases, build, "DuckDB read_json_auto"),
    ):
        yield compare(name, title, prepare, ours, against, size, options.rounds)


def compare(
    name: str,
    title: str,
    prepare: Callable[[Path, list[Record]], tuple[Calls, list[str]]],
    ours: Callable[[Path], object],
    against: str,
    size: int,
    rounds: int,
) -> Comparison:
    """Times what ``prepare`` gives, and ``ours`` alone on one, two and four times as many records."""
    growth: list[Scale] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        calls, agreement = prepare(folder, fill(folder, size))
        files = record.files(folder)
        calls["json"] = lambda: [json.loads(file.read_text()) for file in files]
        found = measure(calls, rounds)
        kilobytes = sum(file.stat().st_size for file in files) / size / 1e3
        for times in (1, 2, 4):
            fill(folder, times * size, start=times // 2 * size)
            seconds = machine.seconds(lambda: ours(folder), CPU)
            growth.append(Scale(f"{times}x: {times * size:,} records", seconds))
    limit = Limit("parsing the same files with Python's json module", statistics.median(found.pop("json")))
    packages = {"mimbench": "mimbench", "pandas": "pandas", "DuckDB": "duckdb"}
    return Comparison(
        name=name,
        title=title,
        work=f"{size:,} records of {kilobytes:.0f} kB, each with a curve of 100 points",
        ours=next(iter(found)),
        timings=[
            Timing(
                label, seconds, version(packages[label.replace(",", " ").split()[0]]), NOTES.get(label, "")
            )
            for label, seconds in found.items()
        ],
        agreement=agreement,
        limit=limit,
        bars=[Bar(against, 1.0)],
        growth=growth,
    )


if __name__ == "__main__":
    main(run, __doc__)
