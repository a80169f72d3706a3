"""The database: whatever happens to it, it ends up saying what the records say, and a query only reads."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import filelock
import pyarrow as pa
import pytest
import scipy.stats
from test_record import make_record

from mimbench import database, paths, record, registry, reported, speed, verdict
from mimbench.errors import DatabaseBusy, ResultsError
from mimbench.record import MethodUsed, Record
from mimbench.task import Metric


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder beside three methods, whose code is that of the records unless a test changes it."""
    cards = {
        slug: registry.Card(slug, tmp_path / slug, slug.upper(), family, (), year=2022)
        for slug, family in (("mae", "image-ssl"), ("simmim", "image-ssl"), ("random_init", "baseline"))
    }
    monkeypatch.setattr(registry, "methods", lambda: cards)
    monkeypatch.setattr(
        registry, "protocols", lambda: {"knn": registry.ProtocolCard("knn", tmp_path / "knn.py", 1, "", ())}
    )
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "papers.csv").write_text(
        "slug,title,arxiv,venue,year,family,code,licence\nmae,MAE,2111.06377,,2022,image-ssl,,\n"
        "cutout,Cutout,1708.04552,,2017,image-supervised,them/cutout,ECL-2.0\n"
    )
    monkeypatch.setattr(paths, "papers", lambda: papers)
    monkeypatch.setattr(record, "method_code", lambda slug: "0123456789ab")
    monkeypatch.setattr(record, "protocol_code", lambda name: "ba9876543210")
    return tmp_path / "results"


def ask(folder: Path, sql: str) -> list[Any]:
    return database.query(sql, folder)[1]


def test_every_part_of_a_record_is_in_its_table(folder: Path) -> None:
    run = make_record(overrides={"mask_ratio": 0.5})
    record.write(run, folder)
    assert database.update(folder) == []
    columns, rows = database.query("SELECT * FROM runs", folder)
    row = dict(zip(columns, rows[0], strict=True))
    assert (row["id"], row["method"], row["protocol"], row["seed"]) == (run.id, "mae", "knn", 0)
    assert (row["metric"], row["value"], row["low"], row["high"]) == ("top1", 61.25, 56.75, 65.75)
    assert row["created"].isoformat() == "2026-01-02T03:04:05"
    assert row["stale"] is None
    assert json.loads(row["overrides"]) == {"mask_ratio": 0.5}
    assert ask(folder, "SELECT config->>'mask_ratio' FROM runs") == [("0.75",)]
    assert ask(folder, "SELECT name, value, n, unit FROM metrics ORDER BY name") == [
        ("seconds", 1.5, None, "s"),
        ("top1", 61.25, 400, "%"),
    ]
    assert ask(folder, "SELECT step, name, value FROM curves ORDER BY step") == [
        (1.0, "loss", 1.5),
        (2.0, "loss", 0.1 + 0.2),
    ]
    assert ask(folder, "SELECT torch, cores, cuda FROM environments") == [("2.13.0", 2, None)]
    assert ask(folder, "SELECT slug, baseline, here, year, code FROM papers ORDER BY slug") == [
        ("cutout", False, False, 2017, "them/cutout"),
        ("mae", False, True, 2022, None),
        ("random_init", True, True, 2022, None),
        ("simmim", False, True, 2022, None),
    ]


def test_facts_of_another_kind_than_their_column_are_left_out(folder: Path) -> None:
    odd = make_record(
        git={"commit": 1.5, "dirty": "yes"}, environment={"torch": 2.13, "cores": "two", "memory_gib": True}
    )
    record.write(odd, folder)
    assert database.update(folder) == []
    assert ask(folder, "SELECT commit, dirty FROM runs") == [(None, None)]
    assert ask(folder, "SELECT torch, cores, memory_gib FROM environments") == [("2.13", None, None)]


def _content(folder: Path) -> list[Any]:
    tables = ("runs", "metrics", "curves", "environments", "papers", "reported")
    return [ask(folder, f"SELECT * FROM {table} ORDER BY ALL") for table in tables]


def test_new_changed_and_removed_records_are_followed_and_only_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [record.write(make_record(seed=seed), folder) for seed in range(4)]
    database.update(folder)
    opened = []
    read = record.read_in_place
    monkeypatch.setattr(record, "read_in_place", lambda file, top: opened.append(file) or read(file, top))
    files[0].unlink()
    record.write(make_record(seed=1, score=12.5, curve=[]), folder)
    added = record.write(make_record(seed=7, environment={"torch": "2.15.0"}), folder)
    database.update(folder)
    assert sorted(opened) == sorted([files[1], added])
    assert ask(folder, "SELECT seed, value FROM runs ORDER BY seed") == [
        *((1, 12.5), (2, 61.25), (3, 61.25), (7, 61.25))
    ]
    assert ask(folder, "SELECT count(*), count(DISTINCT run) FROM curves") == [(6, 3)]
    added.unlink()
    database.update(folder)
    assert ask(folder, "SELECT torch FROM environments") == [("2.13.0",)]

    followed = _content(folder)
    (folder / database.NAME).unlink()
    database.update(folder)
    assert _content(folder) == followed


def test_an_up_to_date_database_is_left_alone(folder: Path) -> None:
    record.write(make_record(), folder)
    database.update(folder)
    before = (folder / database.NAME).stat()
    database.update(folder)
    after = (folder / database.NAME).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_broken_files_are_reported_each_time_and_hide_nothing(folder: Path) -> None:
    file = record.write(make_record(), folder)
    file.with_name("torn.json").write_text("{")
    for _ in range(2):
        faults = database.update(folder)
        assert len(faults) == 1
        assert "torn.json is not JSON" in faults[0]
    assert ask(folder, "SELECT count(*) FROM runs") == [(1,)]
    file.with_name("torn.json").unlink()
    assert database.update(folder) == []


def _timed(ratio: float = 3.0, **changes: Any) -> speed.Comparison:
    """A comparison in which ours takes 0.5 s and a peer ``ratio`` times that."""
    values: dict[str, Any] = {
        "name": "knn",
        "title": "Neighbours",
        "work": "k = 20",
        "ours": "mimbench",
        "timings": [
            speed.Timing("mimbench", [0.25, 0.5, 0.75], "0.1.0"),
            speed.Timing("peer", [0.5 * ratio] * 3, "1.2", "brute force"),
        ],
        "agreement": ["all neighbours"],
        "limit": speed.Limit("the matrix product", 0.25),
        "bars": [speed.Bar("peer", 2.5), speed.Bar("absent", 1.0)],
        "skipped": {"absent": "it is not installed"},
        "growth": [speed.Scale("1x", 0.5, 100), speed.Scale("2x", 1.0)],
        "created": "2026-11-21T13:00:00+01:00",
        "environment": {"cpu": "A processor", "gpu": None, "cores": 2},
    }
    return speed.Comparison(**(values | changes))


def test_comparisons_of_speed_are_followed_like_records(folder: Path) -> None:
    record.write(make_record(), folder)
    file = speed.write(_timed())
    assert file.is_relative_to(folder)
    torn = file.with_name("torn.json")
    torn.write_text("{")
    faults = database.update(folder)
    assert len(faults) == 1
    assert "torn.json is no speed comparison" in faults[0]
    columns = "contender, version, ours, median, low, high, ratio, bar, reached, limit_seconds, times_limit, skipped"
    assert ask(folder, f"SELECT {columns} FROM speed ORDER BY median") == [
        ("mimbench", "0.1.0", True, 0.5, 0.25, 0.75, 1.0, None, None, 0.25, 2.0, None),
        ("peer", "1.2", False, 1.5, 1.5, 1.5, 3.0, 2.5, True, 0.25, 6.0, None),
        ("absent", None, False, None, None, None, None, 1.0, None, 0.25, None, "it is not installed"),
    ]
    assert ask(
        folder, "SELECT DISTINCT comparison, cpu, gpu, threads, limit_is, created::VARCHAR FROM speed"
    ) == [("knn", "A processor", None, 1, "the matrix product", "2026-11-21 12:00:00")]
    assert ask(folder, "SELECT size, seconds, peak_bytes FROM growth ORDER BY seconds") == [
        *(("1x", 0.5, 100), ("2x", 1.0, None))
    ]
    assert ask(folder, "SELECT count(*) FROM runs") == [(1,)]

    torn.unlink()
    speed.write(_timed(ratio=2.0, growth=[]))
    assert database.update(folder) == []
    assert ask(folder, "SELECT ratio, reached FROM speed WHERE contender = 'peer'") == [(2.0, False)]
    assert ask(folder, "SELECT count(*) FROM growth") == [(0,)]
    file.unlink()
    database.update(folder)
    assert ask(folder, "SELECT count(*) FROM speed") == [(0,)]
    assert ask(folder, "SELECT count(*) FROM runs") == [(1,)]


@pytest.mark.parametrize("damage", ["junk", "truncated", "flipped", "layout", "empty", "foreign"])
def test_a_damaged_or_foreign_database_is_built_anew(damage: str, folder: Path) -> None:
    record.write(make_record(), folder)
    database.update(folder)
    file = folder / database.NAME
    content = file.read_bytes()
    if damage == "junk":
        file.write_bytes(b"not a database" * 1000)
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 3])
    elif damage == "flipped":
        file.write_bytes(content[:12288] + bytes(b ^ 0xFF for b in content[12288:]))
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        with duckdb.connect(str(file)) as connection:
            if damage == "layout":
                connection.execute("UPDATE state SET layout = 'older'")
                connection.execute("DROP TABLE curves")
            else:
                for table in ("state", "files"):
                    connection.execute(f"DROP TABLE {table}")
    record.write(make_record(seed=1), folder)
    assert database.update(folder) == []
    assert ask(folder, "SELECT seed FROM runs ORDER BY seed") == [(0,), (1,)]
    assert ask(folder, "SELECT count(*) FROM curves") == [(4,)]
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [database.NAME, "runs"]


def test_what_a_killed_process_left_is_cleared_and_a_stale_log_is_not_replayed(folder: Path) -> None:
    record.write(make_record(), folder)
    database.update(folder)
    (folder / f"{database.NAME}.deadbeef.tmp").write_bytes(b"half")
    (folder / f"{database.NAME}.deadbeef.tmp.wal").write_bytes(b"half")
    with duckdb.connect(str(folder / database.NAME)) as connection:
        connection.execute("PRAGMA disable_checkpoint_on_shutdown")
        connection.execute("DELETE FROM runs")
    assert (folder / f"{database.NAME}.wal").is_file()
    record.write(make_record(seed=1), folder)
    database.update(folder)
    assert ask(folder, "SELECT seed FROM runs ORDER BY seed") == [(0,), (1,)]
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [database.NAME, "runs"]


def test_a_run_is_silent_about_another_update_and_not_about_a_folder_that_is_none(
    folder: Path, tmp_path: Path
) -> None:
    record.write(make_record(seed=0), folder)
    said: list[str] = []
    with filelock.FileLock(folder / ".lock"):
        with pytest.raises(DatabaseBusy, match="by another process since more than 0 s"):
            database.update(folder, patience=0.0)
        database.catch_up(folder, said.append, patience=0.0)
    assert not (folder / database.NAME).exists()
    database.catch_up(folder, said.append)
    assert not said
    assert ask(folder, "SELECT seed FROM runs") == [(0,)]
    (tmp_path / "file").touch()
    database.catch_up(tmp_path / "file", said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: the database was not brought up to date: ")


RUN = """
import sys
from pathlib import Path
from mimbench import database, record
print("ready", flush=True)
record.write(record.loads(sys.stdin.read(), "stdin"), Path(sys.argv[1]))
database.update(Path(sys.argv[1]), patience=60)
"""


def _start(script: str, argument: Path) -> subprocess.Popen[str]:
    """A Python process that has said it is ready, and waits for the end of its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(argument)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_eight_runs_at_once_all_end_up_in_the_database(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    workers = [_start(RUN, folder) for _ in range(8)]
    for seed, worker in enumerate(workers):
        assert worker.stdin is not None
        worker.stdin.write(record.dumps(make_record(seed=seed)))
        worker.stdin.close()
    for worker in workers:
        with worker:
            assert worker.wait(100) == 0
    assert ask(folder, "SELECT seed FROM runs ORDER BY seed") == [(seed,) for seed in range(8)]


WRITER = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1])
connection.execute("CREATE TABLE mine (a INTEGER)")
print("ready", flush=True)
sys.stdin.read()
"""

READER = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1], read_only=True)
print("ready", flush=True)
sys.stdin.read()
print(connection.execute("SELECT count(*) FROM runs").fetchone())
"""


def test_a_database_held_by_another_program_is_named_after_a_bounded_wait(folder: Path) -> None:
    record.write(make_record(), folder)
    database.update(folder)
    with _start(WRITER, folder / database.NAME) as holder:
        file = record.write(make_record(seed=1), folder)
        for action in (
            lambda: database.update(folder, 0.2),
            lambda: database.query("FROM runs", folder, 0.2),
        ):
            with pytest.raises(ResultsError, match=r"held by another program.*Nothing is lost"):
                action()
        assert record.read(file).seed == 1
        holder.communicate(timeout=60)
    database.update(folder)
    assert ask(folder, "SELECT count(*) FROM runs") == [(2,)]


def test_an_update_does_not_disturb_who_is_reading(folder: Path) -> None:
    record.write(make_record(), folder)
    database.update(folder)
    with _start(READER, folder / database.NAME) as reader:
        record.write(make_record(seed=1), folder)
        database.update(folder, 0.2)
        assert ask(folder, "SELECT count(*) FROM runs") == [(2,)]
        assert reader.communicate(timeout=60)[0] == "(1,)\n"


def test_two_updates_at_once_wait_only_so_long(folder: Path) -> None:
    import filelock

    folder.mkdir()
    with (
        filelock.FileLock(folder / ".lock"),
        pytest.raises(ResultsError, match=r"another process since more than 0 s.*Nothing is lost"),
    ):
        database.update(folder, 0.1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"cannot be written.*records are complete without it"):
        database.update(tmp_path / "file")


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE x (a INTEGER)",
        "DELETE FROM runs",
        "UPDATE runs SET value = 100",
        "DROP VIEW leaderboard",
        "COPY runs TO '{out}'",
        "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
        "EXPLAIN ANALYZE DELETE FROM runs",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}' AS other",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_blob('{secret}')",
        "SELECT * FROM read_json('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM glob('{secret}')",
        "SELECT * FROM sniff_csv('{secret}')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET enable_external_access",
        "PRAGMA enable_external_access = true",
        "PRAGMA threads = 1",
        "CALL force_checkpoint()",
        "SELECT 1; SELECT 2",
        "SELECT * FROM private_table",
        "",
        "; ;",
    ],
)
def test_a_query_can_only_read_the_database(sql: str, folder: Path, tmp_path: Path) -> None:
    private_table = pa.table({"a": [1]})  # noqa: F841 - DuckDB offers such variables as tables by default
    record.write(make_record(), folder)
    database.update(folder)
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("password\n1234\n")
    before = (folder / database.NAME).read_bytes()
    with pytest.raises(ResultsError) as raised:
        database.query(sql.format(secret=secret, out=out), folder)
    assert "\n" not in str(raised.value)
    assert not out.exists()
    assert (folder / database.NAME).read_bytes() == before


def test_a_query_without_end_is_ended(folder: Path) -> None:
    record.write(make_record(), folder)
    database.update(folder)
    began = time.process_time()
    with pytest.raises(ResultsError, match=r"more than 100,000 rows. Add a limit to it\."):
        database.query("WITH RECURSIVE r AS (SELECT 1 x UNION ALL SELECT x + 1 FROM r) FROM r", folder)
    assert time.process_time() - began < 4, "it went on after the rows were refused"


def test_a_query_with_a_mistake_gets_one_line_with_what_there_is(folder: Path) -> None:
    record.write(make_record(), folder)
    database.update(folder)
    with pytest.raises(ResultsError, match=r'column "methd" not found.*"method"') as raised:
        database.query("SELECT methd FROM runs", folder)
    assert "\n" not in str(raised.value)
    with pytest.raises(ResultsError, match="Run 'mimbench run' first"):
        database.query("SELECT 1", folder / "nowhere")
    assert ask(folder, "EXPLAIN FROM runs")
    assert ask(folder, "WITH a AS (SELECT 3 AS b) FROM a") == [(3,)]
    assert ask(folder, "DESCRIBE metrics")[0][0] == "run"


def _scored(method: str, values: list[float], **changes: Any) -> list[Record]:
    return [
        make_record(method=method, seed=seed, score=value, **changes) for seed, value in enumerate(values)
    ]


def test_the_leaderboard_averages_seeds_best_first(folder: Path) -> None:
    mae, simmim = [61.0, 62.5, 60.2], [70.0, 70.1, 69.9]
    for run in [*_scored("mae", mae), *_scored("simmim", simmim), *_scored("random_init", [40.0])]:
        record.write(run, folder)
    record.write(make_record(method="mae", seed=0, score=55.0, preset="smoke"), folder)
    record.write(
        make_record(data=dataclasses.replace(make_record().data, fingerprint="other", name="cifar10-x")),
        folder,
    )
    database.update(folder)
    board = ask(
        folder,
        "SELECT method, preset, seeds, mean, low, high FROM leaderboard WHERE dataset = 'cifar10'",
    )
    assert [row[:3] for row in board] == [
        *(("simmim", "cifar", 3), ("mae", "cifar", 3), ("mae", "smoke", 1)),
        ("random_init", "cifar", 1),
    ]
    reference = scipy.stats.ttest_1samp(mae, 0).confidence_interval(0.95)
    assert board[1][3:] == pytest.approx((sum(mae) / 3, reference.low, reference.high))
    assert board[2][3:] == (55.0, 50.5, 59.5)
    assert ask(folder, "SELECT method FROM leaderboard WHERE dataset = 'cifar10-x'") == [("mae",)]


def test_the_leaderboard_holds_each_budget_and_epochs_apart(folder: Path) -> None:
    for budget in (None, "2m", "200000img"):
        recipe = {"recipe": {"epochs": 100.0, "budget": budget}}
        for method, value in (("mae", 61.0), ("simmim", 80.0)):
            value -= 20 if budget == "2m" else 0
            run = make_record(method=method, score=value, config=recipe, overrides={"budget": budget})
            record.write(run, folder)
    floor = dataclasses.replace(make_record().pretrain, images=0, steps=0, epochs=0.0, seconds=0.0)
    record.write(make_record(method="random_init", score=10.0, pretrain=floor), folder)
    database.update(folder)
    board = ask(folder, "SELECT compared_by, method, budget, precision, compiled, images FROM leaderboard")
    expected = []
    for view, budget in (
        ("epochs", None),
        ("200000img", "200000img"),
        ("2m on an unnamed processor, threads: None", "2m"),
    ):
        rows = [("simmim", budget), ("mae", budget)]
        expected += [(view, *row, "fp32", True, 4500) for row in rows]
        expected.append((view, "random_init", None, "fp32", True, 0))
    assert board == expected
    assert ask(folder, "SELECT compared_by, count(*) FROM runs GROUP BY ALL ORDER BY ALL") == [
        *(("200000img", 2), ("2m on an unnamed processor, threads: None", 2), ("epochs", 3))
    ]


def test_where_lower_is_better_the_lowest_comes_first(folder: Path) -> None:
    for method, value in (("mae", 50.0), ("simmim", 70.0)):
        metrics = {"mce": Metric(value, value - 1, value + 1, 400)}
        record.write(make_record(method=method, metrics=metrics, primary="mce"), folder)
    database.update(folder)
    assert ask(folder, "SELECT method FROM leaderboard") == [("mae",), ("simmim",)]


def test_stale_runs_are_marked_when_code_changes_and_leave_the_means(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [
        dataclasses.replace(r, method=MethodUsed("mae", "older")) for r in _scored("mae", [10.0, 20.0, 30.0])
    ]
    for run in [*old[:2], make_record(seed=2, score=60.0)]:
        record.write(run, folder)
    database.update(folder)
    assert ask(folder, "SELECT seed, stale FROM runs ORDER BY seed") == [
        *((0, "the code of mae has changed"), (1, "the code of mae has changed"), (2, None))
    ]
    assert ask(folder, "SELECT seed FROM latest") == [(2,)]
    assert ask(folder, "SELECT mean, seeds, stale FROM leaderboard") == [(60.0, 1, False)]

    monkeypatch.setattr(record, "method_code", lambda slug: "newest")
    monkeypatch.setattr(database, "_sources", lambda: "other files")
    database.update(folder)
    assert ask(folder, "SELECT count(*) FROM runs WHERE stale IS NULL") == [(0,)]
    assert ask(folder, "SELECT seeds, stale FROM leaderboard") == [(3, True)]


def test_the_newest_of_two_equal_runs_counts(folder: Path) -> None:
    first = make_record(score=50.0)
    second = make_record(score=60.0, overrides={"mask_ratio": 0.75}, created="2026-05-01T00:00:00+00:00")
    assert record.setting(first) == record.setting(second)
    for run in (first, second):
        record.write(run, folder)
    database.update(folder)
    assert ask(folder, "SELECT value FROM latest") == [(60.0,)]


def test_a_gap_to_a_paper_needs_the_same_setting_in_every_respect(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"backbone": "vit-b/16", "epochs": 100.0}
    same = {
        **{"slug": "mae", "method": "mae", "backbone": "ViT-B/16", "pretrain_data": "CIFAR-10"},
        **{"pretrain_epochs": 100.0, "image_size": "32", "protocol": "knn", "dataset": "cifar-10"},
        **{"metric": "top1", "value": 60.0, "unit": "%", "source": "arXiv", "locator": "Table 1"},
        "confidence": "verified",
    }
    changes: list[dict[str, Any]] = [
        *({}, {"dataset": "imagenet-1k"}, {"pretrain_data": None}, {"backbone": "vit-l/16"}),
        *({"pretrain_epochs": 800.0}, {"image_size": "224"}, {"unit": "fraction"}),
        *({"metric": "top5"}, {"protocol": "linear"}, {"method": "dino"}),  # these are not set beside ours
    ]
    rows = [same | change | {"locator": f"{i}"} for i, change in enumerate(changes)]
    monkeypatch.setattr(reported, "read_all", lambda: rows)
    base = make_record()
    for recipe in ("mae", "dino"):
        run = make_record(
            backbone=ours["backbone"],
            pretrain=dataclasses.replace(base.pretrain, epochs=100.0),
        )
        run = dataclasses.replace(run, protocol=dataclasses.replace(run.protocol, recipe=recipe))
        record.write(run, folder)
    database.update(folder)
    columns, found = database.query("FROM comparison WHERE recipe IS NULL ORDER BY locator", folder)
    table = [dict(zip(columns, row, strict=True)) for row in found]
    assert [row["gap"] for row in table] == [1.25, *[None] * 6]
    differing = ("data", "pretrain_data", "backbone", "epochs", "image_size")
    assert [[name for name in differing if row[name]] for row in table] == [
        *([], ["data"], ["pretrain_data"], ["backbone"], ["epochs"], ["image_size"], [])
    ]
    assert table[1]["data"] == "ours cifar10, reported imagenet-1k"
    assert table[2]["pretrain_data"] == "ours cifar10, reported not said"
    assert table[4]["epochs"] == "ours 100, reported 800"
    assert ask(folder, "SELECT DISTINCT recipe, gap FROM comparison WHERE recipe IS NOT NULL") == [
        ("ours dino", None)
    ]


def test_verdicts_are_those_of_the_records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {
        **{"slug": "mae", "method": "mae", "backbone": "vit 12x192/4", "pretrain_data": "CIFAR-10"},
        **{"pretrain_epochs": 1.5, "image_size": "32", "protocol": "knn", "dataset": "cifar-10"},
        **{"metric": "top1", "value": 61.0, "unit": "%", "source": "arXiv", "locator": "Table 1"},
        "confidence": "verified",
    }
    changes: list[dict[str, Any]] = [
        *({}, {"backbone": None}, {"method": "simmim"}, {"protocol": "linear"}, {"method": "gone"}),
        *({"value": 99.0, "source": "another"}, {"slug": "simmim"}),
    ]
    numbers = [same | change for change in changes]
    monkeypatch.setattr(reported, "read_all", lambda: numbers)
    runs = []
    half = {"mask_ratio": 0.5}
    ablation = {"overrides": half, "config": make_record().config | half}
    for seed in range(3):
        for more in ({}, ablation):
            run = make_record(seed=seed, score=61.0 + seed / 10, **more)
            runs.append(dataclasses.replace(run, protocol=dataclasses.replace(run.protocol, recipe="mae")))
            record.write(runs[-1], folder)
    database.update(folder)
    columns, found = database.query("FROM verdicts ORDER BY ALL", folder)
    table = [dict(zip(columns, row, strict=True)) for row in found]
    rows = [verdict.measured(runs[start::2]) for start in (0, 1)]
    expected = [each.content() for each in verdict.verdicts(numbers, rows)]
    assert sorted(table, key=str) == sorted(expected, key=str)
    assert [each["verdict"] for each in expected] == [
        "reproduced",
        *["untestable"] * 4,
        "different",
        "untestable",
    ]
    assert ask(
        folder, "SELECT preset, seeds, round(difference, 6), margin FROM verdicts WHERE p_within < 0.05"
    ) == [("cifar", 3, 0.1, 1.0)]
    record.place(runs[0], folder).unlink()
    database.update(folder)
    assert ask(folder, "SELECT seeds FROM verdicts WHERE difference IS NOT NULL") == [(2,), (2,)]


def test_reads_of_test_labels_are_counted_by_encoder(folder: Path) -> None:
    for run in (
        make_record(test_reads=4, details={"chosen_on": "test"}),
        make_record(seed=1, test_reads=2),
        make_record(seed=1, preset="laptop"),
        make_record(seed=2, test_reads=0),
    ):
        record.write(run, folder)
    other = make_record(seed=1, test_reads=3)
    record.write(
        dataclasses.replace(other, protocol=dataclasses.replace(other.protocol, recipe="solo")), folder
    )
    database.update(folder)
    assert ask(folder, "SELECT dataset, preset, seed, reads, runs, n_test FROM odometer") == [
        ("cifar10", "cifar", 1, 5, 2, 400),
        ("cifar10", "cifar", 0, 4, 1, 400),
        ("cifar10", "laptop", 1, 1, 1, 400),
    ]
    assert ask(folder, "SELECT test_reads FROM runs WHERE test_selected") == [(4,)]


def test_the_real_papers_and_their_numbers_load(tmp_path: Path) -> None:
    database.update(tmp_path)
    rows = ask(tmp_path, "SELECT count(*) FROM reported")
    assert rows == [(len(reported.read_all()),)]
    papers = {*registry.methods(), *(paper.slug for paper in reported.catalogue())}
    assert ask(tmp_path, "SELECT count(*), count(DISTINCT slug) FROM papers") == [(len(papers), len(papers))]
    assert math.isclose(ask(tmp_path, "SELECT t FROM student WHERE df = 2")[0][0], 4.302652729911275)
