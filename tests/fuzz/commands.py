"""Command lines, settings, statements of SQL, and the commands that records carry."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from random import Random
from unittest import mock

from fuzz import draws, prepared, target
from mimbench import cli, config, database, record, registry, runner, verify
from mimbench.errors import MimbenchError

SECRET = "the-content-of-a-file-that-no-query-may-read"


def command(words: list[str]) -> tuple[int, str, str]:
    """The exit code, output and errors of a command line; both must be fit to be shown in a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", ["mimbench", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    said = err.getvalue()
    assert code in (0, 1, 2), f"exit code {code}: {said[-300:]}"
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code == 2) == (len(errors) == 1), (
        f"exit code {code} with {len(errors)} error lines: {said[-300:]}"
    )
    for text in (out.getvalue(), said):
        assert "\x1b" not in text, "an escape sequence reaches the terminal"
    return code, out.getvalue(), said


OPTIONS = {
    name: tuple(f"--{option}" for option in options.split())
    for name, options in {
        "run": "method protocol dataset eval-dataset preset seed seeds set budget weights device force json quiet",
        "evaluate": "method protocol dataset preset seed set weights device",
        "pretrain": "method dataset preset seed seeds set budget device",
        "list": "json",
        "show": "",
        "verify": "reuse json quiet",
        "compare": "protocol dataset preset json",
        "explain": "features method dataset preset seed set weights device json",
        "verdicts": "json",
        "query": "json",
        "check": "update json",
        "score": "protocol set device json",
        "parity": "method case cases all json",
        "weights": "method set names json",
        "picture": "out preset set",
        "data": "quiet",
        "doctor": "",
        "report": "",
        "sweep": "executor workers json",
    }.items()
}
GOOD = {
    "--method": (
        "mae",
        "random_init",
        "simsiam",
        "mae,simsiam",
        "timm:resnet18",
        "timm:hf-hub:a/b",
        "timm:local-dir:/tmp",
    ),
    "--protocol": ("knn", "linear", "knn:lightly", "throughput:quick", "knn,linear"),
    "--dataset": ("digits", "digit-scenes", "imagefolder:.", "parquet:.", "cifar10"),
    "--preset": ("smoke", "cifar", "paper", "laptop"),
    "--seed": ("0", "1", "-1", str(2**63), str(10**40)),
    "--seeds": ("1", "2", "0", "-1", "1000", "1000000000", str(10**40)),
    "--set": (
        "recipe.epochs=1",
        "mask_ratio=0.5",
        "knn.ks=[1]",
        "recipe.batch_size=0",
        "mask_ratio=2",
        "recipe=1",
    ),
    "--budget": ("1s", "2img", "0s", "1e9h", "99999999999999999999img", "-1m"),
    "--device": ("cpu", "cuda", "cuda:99", "cuda:-1", "mps", "meta"),
    "--weights": ("nowhere.pth", "/dev/null", "/", "."),
    "--out": ("x.png", "nowhere/x.png", "/proc/x.png"),
}


def settings(rng: Random) -> str:
    """A ``key=value`` of some method or protocol, with a value of any kind."""
    keys = (
        "recipe.epochs",
        "recipe.batch_size",
        "recipe.base_lr",
        "mask_ratio",
        "image_size",
        "backbone.width",
        "knn.ks",
    )
    keys += (
        "backbone",
        "recipe",
        "recipe.betas",
        "recipe.budget",
        "teacher",
        "tokenizer_weights",
        "name",
        "knn",
        "a.b.c",
        "",
    )
    key = rng.choice(keys) if rng.random() < 0.8 else draws.text(rng)
    values = (
        "1",
        "-1",
        "0",
        "1e400",
        "nan",
        "[1, 2]",
        "{a = 1}",
        "none",
        "true",
        "'x'",
        "[" * 3000,
        "1" * 5000,
    )
    return f"{key}={rng.choice(values) if rng.random() < 0.5 else draws.text(rng)}"


class WouldTrain(MimbenchError):
    """Every check has passed."""


@target("cli", 12)
def command_line(rng: Random, folder: Path) -> None:
    """Any words after ``mimbench``: exit code 0, 1 or 2, at most one line of error, no training."""
    name = rng.choice(list(OPTIONS)) if rng.random() < 0.97 else draws.text(rng)
    words = [name]
    options = OPTIONS.get(name, ())
    if name in ("run", "evaluate", "pretrain", "picture") and rng.random() < 0.8:
        words += ["--method", rng.choice(GOOD["--method"])]
        words += ["--protocol", rng.choice(GOOD["--protocol"])] if name in ("run", "evaluate") else []
    if name in (
        "show",
        "verify",
        "compare",
        "explain",
        "query",
        "score",
        "weights",
        "verdicts",
        "list",
        "data",
    ):
        subjects = (
            "mae",
            "knn:dino",
            "knn:lightly",
            "0" * 12,
            "SELECT 1",
            "nowhere.npz",
            "digits",
            "runs",
            "/dev/null",
        )
        words += [
            rng.choice(subjects) if rng.random() < 0.6 else draws.text(rng)
            for _ in range(rng.choice((0, 1, 1, 2)))
        ]
    for _ in range(rng.choice((0, 1, 2, 4))):
        if not options:
            break
        option = rng.choice(options)
        words.append(option)
        if option == "--set":
            words.append(settings(rng) if rng.random() < 0.7 else rng.choice(GOOD["--set"]))
        elif option in GOOD:
            words.append(rng.choice(GOOD[option]) if rng.random() < 0.6 else draws.text(rng))
        elif option.startswith("--") and option[2:] not in (
            "json",
            "quiet",
            "force",
            "reuse",
            "update",
            "all",
            "names",
        ):
            words.append(draws.text(rng))
    if name == "report":
        words += ["--out", str(folder / "site")]
    if rng.random() < 0.05:
        words.append(draws.text(rng))
    words = [word.replace("\0", "") for word in words]  # no system hands that over

    def refuse(*_: object, **__: object) -> None:
        raise WouldTrain("all that was asked for is sound")

    places = {"RESULTS": "results", "CACHE": "cache", "DATA": "data"}
    held = {f"MIMBENCH_{name}": str(folder / place) for name, place in places.items()}
    held |= {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    with (
        mock.patch.dict(os.environ, held),
        mock.patch.object(runner, "pretrain", refuse),
        contextlib.chdir(folder),
    ):
        command(words)


@target("settings", 6)
def overrides(rng: Random, folder: Path) -> None:
    """``--set`` on every method's Config and every protocol's Settings."""
    given = [settings(rng) for _ in range(rng.choice((1, 2, 3)))]
    table = config.parse_overrides(given)
    if rng.random() < 0.7:
        kind = registry.load_method(rng.choice(sorted(registry.methods()))).Config
    else:
        kind = registry.load_protocol(rng.choice(sorted(registry.protocols()))).Settings
    given_as = rng.random()
    if given_as < 0.3:
        fields = list(kind.__dataclass_fields__)
        table = {rng.choice(fields): draws.value(rng) for _ in range(rng.choice((1, 2)))}
    elif given_as < 0.6:
        table = draws.nudge(rng, config.to_dict(kind()))
    config.to_dict(config.build(kind, table))


TABLES = (
    "runs",
    "leaderboard",
    "latest",
    "curves",
    "metrics",
    "files",
    "reported",
    "range(10)",
    "range(1000000000000)",
)
CALLS = (
    *(
        "read_text('{secret}')",
        "read_csv('{secret}')",
        "read_blob('{secret}')",
        "glob('{folder}/*')",
        "'{secret}'",
    ),
    *(
        "read_parquet('{secret}')",
        "read_json_auto('{secret}')",
        "sniff_csv('{secret}')",
        "parquet_metadata('{secret}')",
    ),
    *(
        "query('SELECT * FROM read_text(''{secret}'')')",
        "query_table('runs')",
        "duckdb_settings()",
        "duckdb_secrets()",
    ),
    *(
        "duckdb_extensions()",
        "pragma_database_list",
        "duckdb_logs",
        "duckdb_temporary_files()",
        "duckdb_databases()",
    ),
    *(
        "json_execute_serialized_sql(json_serialize_sql('SELECT * FROM ''{secret}'''))",
        "repeat('x', 1000)",
        "test_all_types()",
    ),
)
FORMS = (
    *(
        "SELECT * FROM {table}",
        "FROM {table}",
        "SELECT {cell} FROM {table}",
        "SELECT {cell}",
        "SUMMARIZE {table}",
    ),
    *(
        "SELECT count(*) FROM {table} a, {table} b",
        "WITH RECURSIVE r AS (SELECT 1 x UNION ALL SELECT x + 1 FROM r) FROM r",
    ),
    *(
        "COPY (SELECT 1) TO '{out}'",
        "COPY runs FROM '{secret}'",
        "ATTACH '{out}'",
        "ATTACH '{secret}' AS s (TYPE sqlite)",
    ),
    *(
        "EXPORT DATABASE '{out}'",
        "IMPORT DATABASE '{folder}'",
        "INSTALL httpfs",
        "LOAD '{secret}'",
        "FORCE INSTALL spatial",
    ),
    *(
        "CREATE TABLE x AS FROM {table}",
        "CREATE TEMP TABLE x (a INT)",
        "CREATE MACRO m() AS 1",
        "CREATE SECRET s (TYPE s3)",
    ),
    *(
        "SET enable_external_access = true",
        "SET temp_directory = '{folder}'",
        "SET home_directory = '{folder}'",
    ),
    *(
        "PRAGMA database_list",
        "CALL pragma_version()",
        "SET VARIABLE v = 1",
        "PREPARE p AS SELECT 1",
        "EXECUTE p",
    ),
    *(
        "EXPLAIN ANALYZE FROM {table}",
        "DESCRIBE {table}",
        "SHOW ALL TABLES",
        "CHECKPOINT",
        "VACUUM",
        "BEGIN",
        "USE memory",
    ),
    *(
        "SELECT 1; COPY (SELECT 1) TO '{out}'",
        "SELECT 1 /*",
        "SELECT 'a",
        'SELECT "',
        "(((((",
        "SELECT " + "(" * 2000,
    ),
    *(
        "DELETE FROM runs",
        "UPDATE runs SET value = 1",
        "INSERT INTO runs SELECT * FROM runs",
        "DROP VIEW leaderboard",
    ),
    *(
        "SELECT * FROM {table} ORDER BY random()",
        "SELECT repeat('x', 4000000000)",
        "SELECT list(a) FROM range(100000000) t(a)",
    ),
)
CELLS = (
    *(
        "*",
        "count(*)",
        "getenv('HOME')",
        "current_setting('temp_directory')",
        "1/0",
        "'a'::INT",
        "version()",
        "nextval('s')",
    ),
    *(
        "sleep_ms(100000)",
        "repeat('x', 1000000000)",
        "range(1000000000)",
        "[x for x in range(1000000000)]",
        "columns('.*')",
    ),
    *(
        "regexp_matches(repeat('a', 30) || 'b', '(a+)+$')",
        "10::BIGINT ** 400",
        "map()",
        "'\\x00'::BLOB",
        "now()",
        "NULL",
    ),
    *(
        "write_log('x')",
        "{{'a': 1}}",
        "INTERVAL 1 DAY",
        "0.1::DECIMAL(38, 37)",
        "uuid()",
        "'infinity'::TIMESTAMP",
        "1e308 * 10",
    ),
)


@prepared
def small_database() -> bytes:
    """A database of one record."""
    from fuzz.documents import FIXTURES, few_methods

    with tempfile.TemporaryDirectory() as place, few_methods(Path(place)):
        record.write(record.read(FIXTURES / "schema3.json"), Path(place))
        database.update(Path(place))
        return (Path(place) / database.NAME).read_bytes()


@target("sql", 8)
def statement(rng: Random, folder: Path) -> None:
    """Statements that would write, reach a file, or take for ever."""
    results, secret, out = folder / "results", folder / "secret.csv", folder / "out"
    secret.write_text(f"a\n{SECRET}\n")
    results.mkdir()
    (results / database.NAME).write_bytes(small_database())
    before = sorted(str(f) for f in folder.rglob("*"))
    held = (results / database.NAME).read_bytes()
    table = rng.choice(TABLES if rng.random() < 0.5 else CALLS)
    sql = rng.choice(FORMS).replace("{table}", table).replace("{cell}", rng.choice(CELLS))
    for name, place in (("secret", secret), ("folder", folder), ("out", out)):
        sql = sql.replace(f"{{{name}}}", str(place))
    if rng.random() < 0.15:
        place = rng.randrange(len(sql) + 1)
        sql = sql[:place] + draws.text(rng) + sql[place + rng.choice((0, 1, 5)) :]
    try:
        with mock.patch.object(database, "QUERY_SECONDS", 3.0):
            _, rows = database.query(sql, results)
        assert SECRET not in str(rows), "a query read a file"
    finally:
        assert sorted(str(f) for f in folder.rglob("*")) == before, "a query wrote a file"
        assert (results / database.NAME).read_bytes() == held, "a query wrote to the database"


@target("verify.command", 4)
def foreign_command(rng: Random, folder: Path) -> None:
    """A record's own command is ``mimbench run`` with the options that records have, or is not run."""
    from fuzz.documents import FIXTURES

    made = record.read(FIXTURES / "schema3.json")
    words = made.command.split()
    for _ in range(rng.choice((0, 1, 2))):
        odd = (
            "--out",
            "--help",
            "--json",
            "--single-file=/x",
            "-o",
            "--",
            "report",
            "--seeds 99",
            "'",
            '"',
            "\\",
            "\0",
            "\n",
        )
        words.insert(
            rng.randrange(len(words) + 1), rng.choice(odd) if rng.random() < 0.7 else draws.text(rng)
        )
    started: list[list[str]] = []

    def start(given: list[str], **_: object) -> mock.Mock:
        started.append(given)
        return mock.Mock(returncode=1)

    with mock.patch.object(verify.subprocess, "run", start), tempfile.TemporaryDirectory(dir=folder):
        import dataclasses

        verify.verify(dataclasses.replace(made, command=" ".join(words)), quiet=True)
    for given in started:
        assert given[3] == "run"
