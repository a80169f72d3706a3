"""The DuckDB database: built from the records and speed comparisons, never the only place of anything.

It is brought up to date in a copy that then takes its place, so a reader never sees half of it; a lock file
lets one process do so at a time. What is damaged or of another layout is built anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimbench import config, limits, paths, record, registry, reported, speed, verdict
from mimbench.curve import Curve
from mimbench.environment import Facts
from mimbench.errors import DatabaseBusy, ResultsError
from mimbench.record import MethodUsed, ProtocolUsed, Record
from mimbench.task import Metric

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

LAYOUT = 6  # raised with every change of a table or a view
NAME = "mimbench.duckdb"
PATIENCE = 30.0  # seconds to wait for another program that holds the lock or the database

_FACTS = {
    **dict.fromkeys(("python", "mimbench", "torch", "torchvision", "timm", "numpy", "duckdb"), "VARCHAR"),
    **dict.fromkeys(("os", "machine", "cpu"), "VARCHAR"),
    **dict.fromkeys(("cores", "threads"), "BIGINT"),
    "memory_gib": "DOUBLE",
    **dict.fromkeys(("device", "gpu", "driver", "cuda"), "VARCHAR"),
}
_NUMBER = {"value": "DOUBLE", "low": "DOUBLE", "high": "DOUBLE", "n": "BIGINT", "unit": "VARCHAR"}
TABLES: dict[str, dict[str, str]] = {
    "runs": {
        **dict.fromkeys(("id", "method", "preset", "backbone"), "VARCHAR"),
        "seed": "BIGINT",
        **dict.fromkeys(("protocol", "recipe", "dataset", "metric"), "VARCHAR"),
        **_NUMBER,
        "lower_is_better": "BOOLEAN",
        "stale": "VARCHAR",  # why, or NULL
        "created": "TIMESTAMP",  # UTC
        "pretrain_dataset": "VARCHAR",
        "epochs": "DOUBLE",
        **dict.fromkeys(("steps", "images"), "BIGINT"),
        **dict.fromkeys(("pretrain_seconds", "device_seconds"), "DOUBLE"),
        **dict.fromkeys(("resumed", "peak_memory"), "BIGINT"),
        "precision": "VARCHAR",
        "compiled": "BOOLEAN",
        "budget": "VARCHAR",  # of pretraining, or NULL
        "compared_by": "VARCHAR",  # what ranked rows have in common: 'epochs' or a budget
        **dict.fromkeys(("pretrain_key", "setting"), "VARCHAR"),
        "changed": "VARCHAR",  # what makes the method another than its preset's, or NULL
        **dict.fromkeys(("n_train", "n_test"), "BIGINT"),
        "data_note": "VARCHAR",
        **dict.fromkeys(("parameters", "dim", "input_size"), "BIGINT"),
        **dict.fromkeys(("readout", "fingerprint"), "VARCHAR"),
        "protocol_version": "BIGINT",
        **dict.fromkeys(("method_code", "protocol_code", "commit"), "VARCHAR"),
        "dirty": "BOOLEAN",
        "test_reads": "BIGINT",  # of test labels, over all repetitions
        "test_selected": "BOOLEAN",  # the best of several scores on the test split: no estimate
        **dict.fromkeys(("environment", "command"), "VARCHAR"),
        **dict.fromkeys(("overrides", "config", "settings", "seconds", "details", "warnings"), "JSON"),
    },
    "metrics": {"run": "VARCHAR", "name": "VARCHAR", **_NUMBER},
    "curves": {"run": "VARCHAR", "step": "DOUBLE", "name": "VARCHAR", "value": "DOUBLE"},
    "environments": {"id": "VARCHAR", **_FACTS},
    "papers": {
        **dict.fromkeys(("slug", "title", "family", "arxiv", "venue"), "VARCHAR"),
        "year": "BIGINT",
        **dict.fromkeys(("code", "licence", "summary"), "VARCHAR"),
        **dict.fromkeys(("baseline", "here"), "BOOLEAN"),  # here: runs today; else it is planned
    },
    "reported": {
        "slug": "VARCHAR",
        **dict.fromkeys(reported.COLUMNS, "VARCHAR"),
        **dict.fromkeys(("value", "pretrain_epochs"), "DOUBLE"),
    },
    "verdicts": verdict.COLUMNS,  # a row for each reported number
    # A row per contender of a comparison; one that did not run has no times but a reason.
    "speed": {
        **dict.fromkeys(("file", "comparison", "title", "work", "contender", "version"), "VARCHAR"),
        "ours": "BOOLEAN",
        **dict.fromkeys(("median", "low", "high", "ratio"), "DOUBLE"),  # seconds; ratio to ours
        "bar": "DOUBLE",  # the least that ratio should be, or NULL
        "reached": "BOOLEAN",
        **dict.fromkeys(("note", "skipped", "device"), "VARCHAR"),
        "threads": "BIGINT",
        **dict.fromkeys(("cpu", "gpu", "limit_is"), "VARCHAR"),
        **dict.fromkeys(("limit_seconds", "times_limit"), "DOUBLE"),
        "created": "TIMESTAMP",  # UTC
    },
    "growth": {
        **dict.fromkeys(("file", "comparison", "size"), "VARCHAR"),
        "seconds": "DOUBLE",
        "peak_bytes": "BIGINT",
    },
    "files": {
        "path": "VARCHAR",
        **dict.fromkeys(("inode", "modified", "size"), "BIGINT"),
        "run": "VARCHAR",
        "fault": "VARCHAR",  # why the file is no record or comparison, or NULL
    },
    "student": {"df": "BIGINT", "t": "DOUBLE"},  # 97.5 % points of Student's t
    "state": {"layout": "VARCHAR", "sources": "VARCHAR"},
}

VIEWS = """
-- The runs that a mean is taken over: the newest of each seed, and stale ones only where all are stale.
CREATE VIEW latest AS
WITH marked AS (
    SELECT *, bool_or(stale IS NULL) OVER (
        PARTITION BY setting, fingerprint, recipe, dataset, compared_by
    ) AS any_fresh
    FROM runs
)
SELECT * EXCLUDE (any_fresh) FROM marked
WHERE stale IS NULL OR NOT any_fresh
QUALIFY row_number() OVER (
    PARTITION BY setting, fingerprint, recipe, dataset, compared_by, seed ORDER BY created DESC, id
) = 1;

-- A row per setting, best first within one way of scoring and one rule of training (by epochs, or a budget). Ranks
-- need paired tests: the report and its CSV have them. A floor was trained by no rule and stands under each.
CREATE VIEW leaderboard AS
WITH known AS (
    SELECT latest.*, coalesce(papers.baseline, false) AS baseline,
        coalesce(papers.baseline AND images = 0 AND epochs = 0, false) AS untrained
    FROM latest LEFT JOIN papers ON slug = method
), rules AS (
    SELECT DISTINCT protocol, recipe, dataset, fingerprint, metric, compared_by AS rule FROM known WHERE NOT untrained
), placed AS (
    SELECT k.* REPLACE (CASE WHEN untrained THEN coalesce(rule, 'epochs') ELSE compared_by END AS compared_by)
    FROM known AS k LEFT JOIN rules AS r ON untrained AND r.protocol = k.protocol AND r.recipe = k.recipe
        AND r.dataset = k.dataset AND r.fingerprint = k.fingerprint AND r.metric = k.metric
), means AS (
    SELECT
        protocol, recipe, dataset, fingerprint, metric, any_value(unit) AS unit, method, preset, setting,
        any_value(backbone) AS backbone, any_value(pretrain_dataset) AS pretrain_dataset,
        compared_by, any_value(budget) AS budget, any_value(changed) AS changed,
        avg(epochs) AS epochs, avg(images) AS images,
        avg(pretrain_seconds) AS pretrain_seconds, bool_or(compiled) AS compiled,
        string_agg(DISTINCT precision, ' or ' ORDER BY precision) AS precision,
        any_value(input_size) AS input_size, count(*) AS seeds,
        avg(value) AS mean, stddev_samp(value) / sqrt(count(*)) AS error,
        any_value(low) AS run_low, any_value(high) AS run_high, any_value(n) AS n,
        bool_or(stale IS NOT NULL) AS stale, any_value(lower_is_better) AS lower_is_better,
        any_value(baseline) AS baseline
    FROM placed
    GROUP BY protocol, recipe, dataset, fingerprint, metric, method, preset, setting, compared_by
), ends AS (
    SELECT means.*,
        CASE WHEN seeds = 1 THEN run_low ELSE mean - coalesce(t, 1.96) * error END AS low,
        CASE WHEN seeds = 1 THEN run_high ELSE mean + coalesce(t, 1.96) * error END AS high
    FROM means LEFT JOIN student ON df = seeds - 1
)
SELECT protocol, recipe, dataset, metric, compared_by, method, preset,
    mean, low, high, unit, seeds, n, backbone, pretrain_dataset, budget, epochs, images,
    pretrain_seconds, precision, compiled, input_size, changed, stale, fingerprint, setting
FROM ends AS e
ORDER BY protocol, dataset, recipe, fingerprint, metric, compared_by <> 'epochs', compared_by,
    CASE WHEN lower_is_better THEN mean ELSE -mean END;

-- How often the labels of a test split were read for an encoder: a method, its settings and a seed.
CREATE VIEW odometer AS
SELECT dataset, method, preset, any_value(backbone) AS backbone, pretrain_dataset, seed, setting,
    sum(test_reads)::BIGINT AS reads, count(*) AS runs, max(n_test) AS n_test
FROM runs
WHERE test_reads > 0
GROUP BY dataset, method, preset, pretrain_dataset, seed, setting
ORDER BY reads DESC, dataset, method, preset, setting, seed;

CREATE MACRO plain(name) AS CASE regexp_replace(lower(name), '[^a-z0-9]', '', 'g')
    WHEN 'imagenet' THEN 'imagenet1k' WHEN 'resnet18cifarstem' THEN 'resnet18cifar'
    ELSE regexp_replace(lower(name), '[^a-z0-9]', '', 'g') END;

CREATE MACRO differs(ours, theirs) AS CASE WHEN plain(ours) IS NOT DISTINCT FROM plain(theirs) THEN NULL
    ELSE 'ours ' || coalesce(ours, 'unknown') || ', reported ' || coalesce(theirs, 'not said') END;

-- Ours beside what the method's own paper reports under the same protocol and metric. Each difference of
-- setting has a column, NULL where there is none; a gap has a meaning only where all are NULL.
CREATE VIEW comparison AS
WITH pairs AS (
    SELECT l.method, l.preset, l.protocol, l.metric, l.compared_by, l.mean AS ours, l.low, l.high, l.seeds,
        r.value AS reported, r.unit,
        differs(l.dataset, r.dataset) AS data, differs(l.pretrain_dataset, r.pretrain_data) AS pretrain_data,
        differs(l.backbone, r.backbone) AS backbone,
        differs(printf('%g', l.epochs), printf('%g', r.pretrain_epochs)) AS epochs,
        differs(l.input_size::VARCHAR, r.image_size) AS image_size,
        -- A paper scores by its own recipe: ours is that one where it bears the paper's name.
        CASE WHEN plain(l.recipe) <> plain(l.method) THEN 'ours ' || l.recipe END AS recipe,
        CASE WHEN l.unit IS DISTINCT FROM r.unit THEN 'ours ' || l.unit || ', reported ' ||
            coalesce(r.unit, 'not said') END AS units,
        l.changed, l.stale, r.source, r.locator, r.confidence
    FROM leaderboard AS l JOIN reported AS r
        ON r.slug = l.method AND r.method = l.method AND r.protocol = l.protocol
        AND plain(r.metric) = plain(l.metric)
)
SELECT * EXCLUDE (units, changed, stale, source, locator, confidence),
    CASE WHEN coalesce(data, pretrain_data, backbone, epochs, image_size, recipe, units, changed) IS NULL
        THEN ours - reported END AS gap,
    changed, stale, source, locator, confidence
FROM pairs;
"""


class _HeldError(ResultsError):
    """Another program holds the database."""


@dataclass
class _Rows:
    """Rows to insert, by table."""

    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    curves: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in TABLES["curves"]}
    )  # long

    def add(self, table: str, **row: Any) -> None:
        self.tables.setdefault(table, []).append(row)


def update(folder: Path, patience: float = PATIENCE) -> list[str]:
    """Brings ``mimbench.duckdb`` in a results folder up to date with its files and the methods' folders.

    Reads only records and speed comparisons that are new or changed. Returns a sentence for each file that is
    no sound one.
    Raises ResultsError when another program holds the database for ``patience`` seconds, or when the folder
    cannot be written (DatabaseBusy when that program is another update); the records are not touched by either.
    """
    import duckdb
    import filelock

    main = folder / NAME
    deadline = time.monotonic() + patience
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=patience):
            for orphan in folder.glob(f"{NAME}.*.tmp*"):  # of a process that was killed
                orphan.unlink()
            copy = folder / f"{NAME}.{secrets.token_hex(4)}.tmp"
            try:
                if not _begin(main, copy, folder, deadline):
                    return _faults(main, deadline)
                try:
                    faults = _apply(copy, folder)
                except duckdb.Error:
                    copy.unlink(missing_ok=True)  # damaged where opening did not show it
                    faults = _apply(copy, folder)
                Path(f"{main}.wal").unlink(missing_ok=True)  # belongs to the file that goes
                os.replace(copy, main)
            finally:
                copy.unlink(missing_ok=True)
                Path(f"{copy}.wal").unlink(missing_ok=True)
            return faults
    except filelock.Timeout:
        raise DatabaseBusy(
            f"{main} is being brought up to date by another process since more than {patience:.0f} s",
            "Nothing is lost: the next run or query catches up with all records",
        ) from None
    except (OSError, duckdb.Error) as fault:
        why = getattr(fault, "strerror", None) or _one_line(fault)
        raise ResultsError(
            f"{main} cannot be written: {why}",
            "The records are complete without it. Set MIMBENCH_RESULTS to a folder that can be written",
        ) from None


def catch_up(folder: Path, say: Callable[[str], object], patience: float = PATIENCE) -> None:
    """Updates after a run. What goes wrong is only said: the record is safe, and the next update catches up.

    That others have been updating all the while is not said; where many processes share a machine that is usual.
    """
    try:
        update(folder, patience)
    except DatabaseBusy:
        pass
    except ResultsError as fault:
        say(f"warning: the database was not brought up to date: {fault}")


def publish(
    file: Path,
    records: Iterable[Record],
    comparisons: Iterable[speed.Comparison],
    catalogue: Iterable[reported.Paper],
    numbers: Iterable[reported.Row],
) -> None:
    """Writes a database to hand on: it holds what is given, and of no file its place on this machine.

    DuckDB stamps each file that it makes with a random number, so equal content has other bytes: a file whose
    content would not change is left alone. For one process at a time. Raises OSError or ResultsError where it cannot be
    written.
    """
    import duckdb

    records, comparisons = sorted(records, key=lambda made: made.id), list(comparisons)
    catalogue, numbers = list(catalogue), list(numbers)
    content = hashlib.sha256(repr((_layout(), duckdb.__version__, catalogue, numbers, comparisons)).encode())
    cards = (dataclasses.replace(card, folder=Path()) for card in registry.methods().values())
    for part in (*cards, *((made, record.stale(made)) for made in records)):
        content.update(repr(part).encode())
    if _content(file) == content.hexdigest():
        return
    copy = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for orphan in (copy, Path(f"{copy}.wal")):  # of a process that was killed
            orphan.unlink(missing_ok=True)
        # One thread keeps the order of rows. The file is a copy until it is whole, so each part may be committed.
        with duckdb.connect(config={"threads": 1, "memory_limit": "64MB"}) as connection:
            place = str(copy).replace("'", "''")
            connection.execute(
                f"ATTACH '{place}' AS published (BLOCK_SIZE 16384)"
            )  # a third of the default's size
            connection.execute("USE published")
            _create(connection)
            for start in range(0, len(records), 100):  # curves are long: not all in memory at once
                rows = _Rows()
                for made in records[start : start + 100]:
                    _add_run(rows, made)
                    rows.add("files", path=record.place(made, Path()).as_posix(), run=made.id)
                _insert(connection, rows)
            rows = _Rows()
            for comparison in comparisons:
                _add_comparison(rows, comparison, f"speed/{comparison.file}")
            _insert(connection, rows)
            _refresh_sources(connection, catalogue, numbers, content.hexdigest())
            connection.execute("USE memory")
            connection.execute("DETACH published")
        os.replace(copy, file)
    except duckdb.Error as fault:
        raise ResultsError(f"{file} cannot be written: {_one_line(fault)}") from None
    finally:
        copy.unlink(missing_ok=True)
        Path(f"{copy}.wal").unlink(missing_ok=True)


def _content(file: Path) -> str:
    """What a published database says that it holds; empty where there is none that can be read."""
    import duckdb

    try:
        with _open(file, 0.0) as reader:
            return str((reader.execute("SELECT sources FROM state").fetchone() or [""])[0])
    except (ResultsError, duckdb.Error):
        return ""


_SEALED = {
    "enable_external_access": "false",  # no other file, database or extension
    "python_enable_replacements": "false",  # no variable of this process as a table
    "memory_limit": "512MB",
    "temp_directory": "",  # what does not fit is not written elsewhere
    "threads": "2",  # each reserves memory of its own
    "lock_configuration": "true",  # and no way to change that
}
QUERY_SECONDS = 60.0  # that one may take
QUERY_ROWS = 100_000  # that are answered
QUERY_MIB = 768  # DuckDB's own limit does not count all that it takes


def query(sql: str, folder: Path, patience: float = 5.0) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and rows of one select statement, which can neither write nor reach any other file.

    Raises ResultsError with one line that says what is wrong with the statement or the database, or that it takes
    more than ``QUERY_SECONDS``, ``QUERY_ROWS`` or ``QUERY_MIB``.
    """
    import duckdb

    connection = _open(folder / NAME, time.monotonic() + patience, _SEALED)
    alarm = threading.Timer(QUERY_SECONDS, connection.interrupt)
    alarm.daemon = True
    alarm.start()
    try:
        with limits.memory(QUERY_MIB):
            return _answer(connection, sql)
    except ResultsError:
        raise
    except duckdb.InterruptException:
        raise ResultsError(
            f"the query took longer than {QUERY_SECONDS:.0f} s", f"Open {folder / NAME} with DuckDB itself"
        ) from None
    except (duckdb.OutOfMemoryException, MemoryError):
        raise ResultsError(
            f"the query needs more than {QUERY_MIB} MiB", f"Open {folder / NAME} with DuckDB itself"
        ) from None
    except duckdb.Error as fault:
        raise ResultsError(_one_line(fault)) from None
    except (
        ValueError,
        TypeError,
        OverflowError,
        ImportError,
    ) as fault:  # of a value that Python has no form for
        raise ResultsError(f"the query cannot be answered: {_one_line(fault)}") from None
    finally:
        alarm.cancel()
        connection.interrupt()  # what has more rows goes on making them, and closing would wait for the last
        connection.close()


def _answer(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    import duckdb

    statements = connection.extract_statements(sql)
    allowed = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    if len(statements) != 1 or statements[0].type not in allowed:
        raise ResultsError("a query is one select statement", "The database is for reading only")
    answer = connection.execute(statements[0])
    rows = answer.fetchmany(QUERY_ROWS + 1)
    if len(rows) > QUERY_ROWS:
        raise ResultsError(f"the query has more than {QUERY_ROWS:,} rows", "Add a limit to it")
    return [column[0] for column in answer.description or ()], rows


def _one_line(fault: Exception) -> str:
    """What DuckDB says, without the excerpt of the statement."""
    text = str(fault).partition("\nLINE ")[0]
    return " ".join(text.split())


def _open(file: Path, deadline: float, settings: dict[str, Any] | None = None) -> duckdb.DuckDBPyConnection:
    """A reading connection; waits until ``deadline`` for a program that holds the file for writing."""
    import duckdb

    if not file.is_file():
        raise ResultsError(f"there is no results database at {file}", "Run 'mimbench run' first")
    while True:
        try:
            return duckdb.connect(str(file), read_only=True, config=settings or {})
        except duckdb.Error as fault:
            if not _is_lock(fault):
                raise ResultsError(
                    f"{file} cannot be opened: {_one_line(fault)}", "'mimbench query' builds it anew"
                ) from None
            if time.monotonic() > deadline:
                raise _HeldError(
                    f"{file} is held by another program",
                    "Close it and try again. Nothing is lost: the records are the truth",
                ) from None
        time.sleep(0.1)


def _is_lock(fault: Exception) -> bool:
    text = str(fault)
    held = ("Could not set lock", "being used by another process", "with a different configuration")
    return any(words in text for words in held)


def _begin(main: Path, copy: Path, folder: Path, deadline: float) -> bool:
    """Copies a sound database that is out of date. False when it is up to date.

    Without a sound one no copy is made, and all is built from the records.
    """
    import duckdb

    if not main.is_file():
        return True
    try:
        reader = _open(main, deadline)
    except _HeldError:
        raise
    except ResultsError:
        return True
    try:  # the open reader keeps any writer out while the file is copied
        layout, sources = reader.execute("SELECT layout, sources FROM state").fetchone() or ("", "")
        if layout != _layout():
            return True
        known = {row[0]: row[1:] for row in reader.execute(_KNOWN).fetchall()}
        if known == _listing(folder) and sources == _sources():
            return False
        shutil.copyfile(main, copy)
    except duckdb.Error:
        return True
    finally:
        reader.close()
    return True


_KNOWN = "SELECT path, inode, modified, size FROM files"


def _faults(main: Path, deadline: float) -> list[str]:
    with _open(main, deadline) as reader:
        return [row[0] for row in reader.execute(_FAULTS).fetchall()]


_FAULTS = "SELECT fault FROM files WHERE fault IS NOT NULL ORDER BY path"


def _apply(file: Path, folder: Path) -> list[str]:
    """Brings the database ``file`` up to date, creating it where it does not exist."""
    import duckdb

    fresh = not file.is_file()
    with duckdb.connect(str(file)) as connection:
        connection.execute("BEGIN")
        if fresh:
            _create(connection)
        known = {row[0]: row[1:] for row in connection.execute(_KNOWN).fetchall()}
        present = _listing(folder)
        gone = [path for path in known if present.get(path) != known[path]]
        if gone:
            _forget(connection, gone)
        rows = _Rows()
        for path, (inode, modified, size) in present.items():
            if known.get(path) != (inode, modified, size):
                run, fault = _add_file(rows, folder / path, folder)
                rows.add("files", path=path, inode=inode, modified=modified, size=size, run=run, fault=fault)
        _insert(connection, rows)
        connection.execute("DELETE FROM environments WHERE id NOT IN (SELECT environment FROM runs)")
        _refresh_sources(connection, reported.catalogue(), reported.read_all(), _sources())
        connection.execute("COMMIT")
        connection.execute("CHECKPOINT")
        return [row[0] for row in connection.execute(_FAULTS).fetchall()]


def _layout() -> str:
    return config.digest(LAYOUT, record.SCHEMA, verdict.VERSION, TABLES, VIEWS)


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, time of change and size of every file read; a rewritten one has another inode."""
    found = {}
    for file in (*record.files(folder), *speed.files(folder)):
        try:
            facts = file.stat()
        except FileNotFoundError:
            continue
        inode = facts.st_ino & (2**63 - 1)  # Windows fills all 64 bits
        found[file.relative_to(folder).as_posix()] = (inode, facts.st_mtime_ns, facts.st_size)
    return found


def _sources() -> str:
    """Changes with any file that papers, reported numbers and staleness are read from."""
    files = [
        *(f for f in paths.methods().glob("*/*") if f.suffix in (".py", ".toml", ".csv")),
        *paths.protocols().glob("*.py"),
        *paths.papers().glob("papers.csv"),
        *paths.papers().glob("reported/*.csv"),
    ]
    return config.digest(*((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in sorted(files)))


def _create(connection: duckdb.DuckDBPyConnection) -> None:
    from scipy.special import stdtrit

    for table, columns in TABLES.items():
        cells = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
        connection.execute(f"CREATE TABLE {table} ({cells})")
    connection.execute(VIEWS)
    connection.executemany(
        "INSERT INTO student VALUES (?, ?)", [(df, float(stdtrit(df, 0.975))) for df in range(1, 61)]
    )
    connection.execute("INSERT INTO state VALUES (?, '')", [_layout()])


def _forget(connection: duckdb.DuckDBPyConnection, files: list[str]) -> None:
    run = "SELECT run FROM files WHERE path IN (SELECT unnest(?))"
    for table, column in (("runs", "id"), ("metrics", "run"), ("curves", "run")):
        connection.execute(f"DELETE FROM {table} WHERE {column} IN ({run})", [files])
    for table, column in (("speed", "file"), ("growth", "file"), ("files", "path")):
        connection.execute(f"DELETE FROM {table} WHERE {column} IN (SELECT unnest(?))", [files])


def _add_file(rows: _Rows, file: Path, folder: Path) -> tuple[str | None, str | None]:
    """Adds the rows of a record or a comparison; a record's id, and what is wrong with the file."""
    try:
        if file.parent == folder / "speed":
            _add_comparison(rows, speed.read(file), file.relative_to(folder).as_posix())
            return None, None
        made = record.read_in_place(file, folder)
    except ResultsError as fault:
        return None, str(fault)
    _add_run(rows, made)
    return made.id, None


def _add_comparison(rows: _Rows, made: speed.Comparison, file: str) -> None:
    bars = {bar.against: bar.ratio for bar in made.bars}
    shared = {
        **{"file": file, "comparison": made.name, "title": made.title, "work": made.work},
        **{"device": made.device, "threads": made.threads, "created": _moment(made.created)},
        **{name: _fact(made.environment, name) for name in ("cpu", "gpu")},
        "limit_is": made.limit.what if made.limit else None,
        "limit_seconds": made.limit.seconds if made.limit else None,
    }
    for timing in made.timings:
        ratio, bar = made.ratio(timing.name), bars.get(timing.name)
        rows.add(
            "speed",
            **shared,
            contender=timing.name,
            version=timing.version,
            ours=timing.name == made.ours,
            median=timing.median,
            low=min(timing.seconds),
            high=max(timing.seconds),
            ratio=ratio,
            bar=bar,
            reached=None if bar is None else ratio >= bar,
            note=timing.note,
            times_limit=timing.median / made.limit.seconds if made.limit else None,
        )
    for name, reason in made.skipped.items():
        rows.add("speed", **shared, contender=name, ours=False, bar=bars.get(name), skipped=reason)
    for scale in made.growth:
        rows.add("growth", file=file, comparison=made.name, **vars(scale))


def _moment(created: str) -> datetime:
    """An ISO time with its zone as DuckDB takes it: in UTC, without."""
    return datetime.fromisoformat(created).astimezone(UTC).replace(tzinfo=None)


def _add_run(rows: _Rows, made: Record) -> None:
    from mimbench.report.ranking import LOWER_IS_BETTER, compared_by

    pretrain, data, encoder, protocol, score = (
        *(made.pretrain, made.data, made.encoder, made.protocol, made.score),
    )
    environment = config.digest(made.environment)
    rows.add("environments", id=environment, **{name: _fact(made.environment, name) for name in _FACTS})
    rows.add(
        "runs",
        id=made.id,
        method=made.method.slug,
        preset=made.preset,
        backbone=made.backbone,
        seed=made.seed,
        protocol=protocol.name,
        recipe=protocol.recipe,
        dataset=data.name,
        metric=made.primary,
        **vars(score),
        lower_is_better=bool(LOWER_IS_BETTER.search(made.primary)),
        stale=None,
        created=_moment(made.created),
        pretrain_dataset=pretrain.dataset,
        epochs=pretrain.epochs,
        steps=pretrain.steps,
        images=pretrain.images,
        pretrain_seconds=pretrain.seconds,
        device_seconds=pretrain.device_seconds,
        resumed=pretrain.resumed,
        peak_memory=pretrain.peak_memory,
        precision=pretrain.precision,
        compiled=pretrain.compiled,
        budget=made.budget,
        compared_by=compared_by(made),
        pretrain_key=pretrain.key,
        setting=record.setting(made),
        changed=", ".join(verdict.changed(made.overrides)) or None,
        n_train=data.n_train,
        n_test=data.n_test,
        data_note=data.note,
        parameters=encoder.parameters,
        dim=encoder.dim,
        input_size=encoder.input_size,
        readout=encoder.readout,
        fingerprint=made.fingerprint,
        protocol_version=protocol.version,
        method_code=made.method.code_hash,
        protocol_code=protocol.code_hash,
        commit=_of(str, made.git.get("commit")),
        dirty=_of(bool, made.git.get("dirty")),
        test_reads=made.test_reads,
        test_selected=record.test_selected(made),
        environment=environment,
        command=made.command,
        overrides=json.dumps(made.overrides),
        config=json.dumps(made.config),
        settings=json.dumps(protocol.settings),
        seconds=json.dumps(made.seconds),
        details=json.dumps(made.details),
        warnings=json.dumps(made.warnings),
    )
    for name, metric in made.metrics.items():
        rows.add("metrics", run=made.id, name=name, **vars(metric))
    curves, before = rows.curves, len(rows.curves["run"])
    curve = Curve.of(made.curve)
    for name in curve.names:
        if name != "step" and (points := curve.series(name)):
            curves["name"] += [name] * len(points)
            steps, values = zip(*points, strict=True)
            curves["step"] += map(float, steps)
            curves["value"] += map(float, values)
    curves["run"] += [made.id] * (len(curves["name"]) - before)


def _of(kind: type, value: Any) -> Any:
    """A fact of the one kind that its column takes; None where it is of another."""
    return value if type(value) is kind else None


def _fact(facts: Facts, name: str) -> Any:
    """A fact of an environment, as its column takes it; None where it is of another kind."""
    value = facts.get(name)
    if _FACTS[name] == "VARCHAR":
        return None if value is None else str(value)
    return value if type(value) in ((int,) if _FACTS[name] == "BIGINT" else (int, float)) else None


def _insert(connection: duckdb.DuckDBPyConnection, rows: _Rows) -> None:
    """Inserts rows, table by table; an environment that is known already is left out."""
    import pyarrow as pa

    held = {table: arrow(content, TABLES[table]) for table, content in rows.tables.items()}
    curves = pa.table(rows.curves, schema=_schema(TABLES["curves"]))
    for table, content in {**held, "curves": curves}.items():
        connection.register("incoming", content)
        chosen = "*"
        if table == "environments":
            chosen = "DISTINCT * FROM incoming WHERE id NOT IN (SELECT id FROM environments)"
        connection.execute(
            f"INSERT INTO {table} SELECT {chosen}" + (" FROM incoming" if chosen == "*" else "")
        )
        connection.unregister("incoming")


def arrow(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> pa.Table:
    """Rows as an Arrow table with ``columns``, each with its type in SQL; what a row lacks is NULL."""
    import pyarrow as pa

    decimals = [name for name, kind in columns.items() if kind == "DOUBLE"]
    for row in rows:  # Arrow takes no whole number for a decimal that does not hold it exactly
        row |= {name: float(row[name]) for name in decimals if type(row.get(name)) is int}
    return pa.Table.from_pylist(rows, schema=_schema(columns))


def _schema(columns: Mapping[str, str]) -> pa.Schema:
    import pyarrow as pa

    kinds = {
        **{"VARCHAR": pa.string(), "JSON": pa.string(), "DOUBLE": pa.float64(), "BIGINT": pa.int64()},
        **{"BOOLEAN": pa.bool_(), "TIMESTAMP": pa.timestamp("us")},
    }
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


def _refresh_sources(
    connection: duckdb.DuckDBPyConnection,
    catalogue: Iterable[reported.Paper],
    numbers: Iterable[reported.Row],
    sources: str,
) -> None:
    """Papers, reported numbers and verdicts on them anew, and which runs are stale by today's code."""
    rows = _Rows()
    for slug, card in registry.methods().items():
        texts = {
            name: getattr(card, name) or None for name in ("arxiv", "venue", "code", "licence", "summary")
        }
        rows.add(
            "papers",
            **{"slug": slug, "title": card.title, "family": card.family, "year": card.year or None},
            **texts,
            baseline=card.family == "baseline",
            here=True,
        )
    for paper in catalogue:
        if paper.slug not in registry.methods():
            known = {name: value or None for name, value in vars(paper).items()}
            rows.add("papers", **known, baseline=False, here=False)
    numbers = list(numbers)
    for row in numbers:
        rows.add("reported", **row)
    for table in ("papers", "reported", "verdicts"):
        connection.execute(f"DELETE FROM {table}")
    _insert(connection, rows)
    codes = "SELECT DISTINCT method, method_code, protocol, protocol_version, protocol_code FROM runs"
    for slug, method_code, protocol, version, protocol_code in connection.execute(codes).fetchall():
        why = record.stale_code(
            MethodUsed(slug, method_code), ProtocolUsed(protocol, version, "", protocol_code, {})
        )
        connection.execute(
            "UPDATE runs SET stale = ? WHERE method = ? AND method_code = ? AND protocol = ?"
            " AND protocol_version = ? AND protocol_code = ? AND stale IS DISTINCT FROM ?",
            [why, slug, method_code, protocol, version, protocol_code, why],
        )
    rows = _Rows()
    for found in verdict.verdicts(numbers, _measured(connection, {row["method"] for row in numbers})):
        rows.add("verdicts", **found.content())
    _insert(connection, rows)
    connection.execute("UPDATE state SET sources = ?", [sources])


def _measured(connection: duckdb.DuckDBPyConnection, methods: set[str]) -> list[verdict.Measured]:
    """The rows of these methods that reported numbers are held against, as ``verdict.measured`` makes them."""
    columns = (
        *("setting", "fingerprint", "recipe", "dataset", "compared_by", "id", "method", "protocol", "preset"),
        *(
            "seed",
            "metric",
            "unit",
            "pretrain_dataset",
            "backbone",
            "input_size",
            "epochs",
            "overrides",
            "stale",
        ),
    )
    wanted = [sorted(methods)]
    scores: dict[str, dict[str, Metric]] = {}
    for run, name, *metric in connection.execute(
        "SELECT run, name, m.value, m.low, m.high, m.n, m.unit FROM metrics AS m JOIN latest ON id = run"
        " WHERE method IN (SELECT unnest(?))",
        wanted,
    ).fetchall():
        scores.setdefault(run, {})[name] = Metric(*metric)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cells in connection.execute(
        f"SELECT {', '.join(columns)} FROM latest WHERE method IN (SELECT unnest(?)) ORDER BY seed", wanted
    ).fetchall():
        groups.setdefault(cells[:5], []).append(dict(zip(columns, cells, strict=True)))
    found = []
    for runs in groups.values():
        first = runs[0]
        found.append(
            verdict.Measured(
                method=first["method"],
                protocol=first["protocol"],
                preset=first["preset"],
                setting=verdict.Setting(
                    metric=first["metric"],
                    data=first["dataset"],
                    pretrain_data=first["pretrain_dataset"],
                    backbone=first["backbone"],
                    image_size=first["input_size"],
                    recipe=first["recipe"],
                    epochs=sum(run["epochs"] for run in runs) / len(runs),
                    unit=first["unit"],
                    changed=verdict.changed(json.loads(first["overrides"])),
                ),
                seeds=tuple(run["seed"] for run in runs),
                runs=tuple(run["id"] for run in runs),
                stale="; ".join(dict.fromkeys(run["stale"] for run in runs if run["stale"])),
                scores=verdict.scores([scores[run["id"]] for run in runs]),
            )
        )
    return found
