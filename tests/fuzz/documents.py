"""Records and the other JSON files of a results folder, and everything that is made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import html.parser
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import duckdb

from fuzz import draws, prepared, target
from mimbench import check, database, explanation, paths, record, registry, report, speed
from mimbench.errors import MimbenchError
from mimbench.record import DataUsed, EncoderUsed, ProtocolUsed

pages = importlib.import_module("mimbench.report.pages")  # the package has a function of that name
FIXTURES = Path(__file__).parents[1] / "fixtures" / "records"
IDENTITY = ("id", "fingerprint", "schema")
BY_CLASS = {"accuracy": {"cat": 50.0, "dog": 61.5}, "iou": {"sky": 0.5}}
BY_SEVERITY = {
    "accuracy": {"fog": [60.0, 50.0], "snow": [70.0, 40.0]},
    "chosen_on": "test",
    "test_top1": {"10": 1.0},
}


def base(rng: Random) -> dict[str, Any]:
    """A sound record as JSON gives it, of any schema."""
    found: dict[str, Any] = json.loads((FIXTURES / f"schema{rng.choice((1, 2, 3, 3, 3))}.json").read_text())
    found["details"] = rng.choice((found["details"], BY_CLASS, BY_SEVERITY))
    return found


def identified(document: dict[str, Any]) -> dict[str, Any]:
    """A record whose id and fingerprint follow from its content, as far as that has the right types."""
    with contextlib.suppress(Exception):  # it has not
        found = dict(document)
        found["id"] = record.run_id(
            method=found["method"]["slug"],
            preset=found["preset"],
            overrides=found["overrides"],
            pretrain_dataset=found["pretrain"]["dataset"],
            protocol=found["protocol"]["name"],
            recipe=found["protocol"]["recipe"],
            dataset=found["data"]["name"],
            seed=found["seed"],
        )
        parts = ProtocolUsed(**found["protocol"]), DataUsed(**found["data"]), EncoderUsed(**found["encoder"])
        found["fingerprint"] = record.fingerprint(*parts)
        return found
    return document


def name_of(document: Any) -> str:
    """The file's name that belongs to a record's content."""
    return str(document["id"]) if isinstance(document, dict) and "id" in document else "0" * 12


def put(file: Path, text: str | bytes) -> None:
    """Writes what may be no text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


@contextlib.contextmanager
def few_methods(folder: Path) -> Iterator[None]:
    """Two methods and no papers: pages of others take time and show nothing of the input."""
    cards = {slug: card for slug, card in registry.methods().items() if slug in ("mae", "random_init")}
    with (
        mock.patch.object(registry, "methods", return_value=cards),
        mock.patch.object(paths, "papers", return_value=folder / "no papers"),
        mock.patch.object(pages, "_environment", return_value=templates()),
    ):
        yield


@prepared
def templates() -> Any:
    """The report's templates, compiled."""
    environment = pages._environment()
    for name in environment.list_templates():
        environment.get_template(name)
    return environment


@target("record.bytes", 6)
def record_bytes(rng: Random, folder: Path) -> None:
    """Files of records with damaged bytes or one part changed: read, or refused in one line each."""
    document = base(rng)
    written = draws.as_json(rng, draws.change(rng, document) if rng.random() < 0.6 else document)
    content = written.encode("utf-8", "surrogatepass")
    file = folder / "results" / "runs" / "mae" / "knn" / f"{name_of(document)}.json"
    put(file, draws.damage(rng, content) if rng.random() < 0.5 else content)
    records, faults = record.scan(folder / "results")
    assert len(records) + len(faults) == 1
    assert all("\n" not in str(fault) for fault in faults)


class Scripts(html.parser.HTMLParser):
    """Refuses a page on which a script of somebody else could run."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in KNOWN_TAGS, f"<{tag}> comes from a record"
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} runs a script"
            if name in ("href", "src", "action", "formaction"):
                assert not (value or "").strip().lower().startswith(("javascript:", "data:", "vbscript:")), (
                    value
                )
            if tag == "script":
                assert name != "src" or (value or "").startswith(("static/", "../static/")), value


KNOWN_TAGS = frozenset(
    [
        "html",
        "head",
        "meta",
        "title",
        "link",
        "script",
        "style",
        "body",
        "a",
        "header",
        "div",
        "nav",
        "main",
        "footer",
        "p",
        "h1",
        "h2",
        "h3",
        "section",
        "article",
        "aside",
        "form",
        "label",
        "select",
        "option",
        "input",
        "span",
        "button",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "strong",
        "em",
        "small",
        "svg",
        "g",
        "line",
        "text",
        "circle",
        "polyline",
        "polygon",
        "path",
        "rect",
        "figure",
        "figcaption",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
        "pre",
        "code",
        "bdi",
        "details",
        "summary",
        "br",
        "img",
        "colgroup",
        "col",
        "defs",
        "pattern",
        "use",
        "symbol",
        "desc",
        "legend",
        "fieldset",
        "time",
        "abbr",
        "sup",
        "sub",
        "i",
        "b",
        "var",
        "noscript",
    ]
)


@target("record.sound", 5)
def record_sound(rng: Random, folder: Path) -> None:
    """Records that may well be read, through everything that reads them; nothing is written elsewhere."""
    inner = folder / "a" / "b" / "c"
    results = inner / "results"
    for _ in range(rng.choice((1, 2, 3))):
        document = base(rng)
        for _ in range(rng.choice((1, 2, 4, 8))):
            kind = rng.random()
            changed = (
                draws.change(rng, document, spared=IDENTITY) if kind < 0.05 else draws.nudge(rng, document)
            )
            document = changed if isinstance(changed, dict) else document
        if rng.random() < 0.1 and isinstance(document, dict) and isinstance(document.get("method"), dict):
            document["method"] = {
                **document["method"],
                "slug": rng.choice(("../../../../x", "/x", "..", "a/b")),
            }
        document = identified(document)
        written = draws.as_json(rng, document) if rng.random() < 0.1 else json.dumps(document)
        slug, name = "mae", "knn"
        with contextlib.suppress(MimbenchError):
            made = record.loads(written, "it")
            slug, name = made.method.slug, made.protocol.name
        put(results / "runs" / slug / name / f"{name_of(document)}.json", written)
    with (
        few_methods(folder),
        mock.patch.dict("os.environ", MIMBENCH_RESULTS=str(results), MIMBENCH_CACHE=str(inner / "cache")),
    ):
        read_everything(results, inner / "site")
    strangers = [f for f in folder.rglob("*") if f.is_file() and not f.is_relative_to(inner)]
    assert not strangers, f"{strangers[0]} was written outside the results, the site and the cache"


def read_everything(results: Path, site: Path) -> None:
    """The database, the site, and the reading commands."""
    from fuzz.commands import command

    records, _ = record.scan(results)
    database.update(results)
    for view in ("leaderboard", "latest", "comparison", "odometer", "verdicts", "curves", "metrics"):
        database.query(f"SELECT * FROM {view}", results)
    report.report(results, site)
    for page in site.rglob("*.html"):
        Scripts().feed(page.read_text(encoding="utf-8"))
    with duckdb.connect(str(site / "data" / "mimbench.duckdb"), read_only=True) as published:
        assert published.execute("SELECT count(*) FROM runs").fetchone() == (len(records),)
    names = [made.id for made in records]
    lines = [["list", "runs"], ["list", "runs", "--json"], ["verdicts"], ["check", "--update"], ["check"]]
    lines += [["show", name] for name in names] + [["compare", *names]] * (len(names) > 1)
    for words in lines:
        command(words)


@target("documents.other", 6)
def others(rng: Random, folder: Path) -> None:
    """Explanations, comparisons of speed, baselines and certificates of parity."""
    results = folder / "results"
    kind = rng.choice(("explained", "speed", "baselines", "parity"))
    document = OTHERS[kind]()
    for _ in range(rng.choice((1, 2, 4))):
        document = draws.change(rng, document) if rng.random() < 0.15 else draws.nudge(rng, document)
    written = draws.as_json(rng, document).encode("utf-8", "surrogatepass")
    name = "it.json"
    if kind == "explained":
        with contextlib.suppress(MimbenchError):
            name = f"{explanation.loads(written.decode('utf-8', 'replace'), 'it').id}.json"
    put(results / kind / name, draws.damage(rng, written) if rng.random() < 0.2 else written)
    with few_methods(folder):
        if kind == "baselines":
            check.check(results)
        else:
            report.report(results, folder / "site")
            for page in (folder / "site").rglob("*.html"):
                Scripts().feed(page.read_text(encoding="utf-8"))


def _baseline() -> dict[str, Any]:
    made = record.read(FIXTURES / "schema3.json")
    return json.loads(json.dumps(dataclasses.asdict(check.baseline([made]))))


def _comparison() -> dict[str, Any]:
    made = speed.Comparison(
        name="knn",
        title="Neighbours",
        work="k = 20",
        ours="mimbench",
        timings=[
            speed.Timing("mimbench", [0.25, 0.5], "0.1.0"),
            speed.Timing("peer", [1.5, 1.25], "1.2", "brute"),
        ],
        agreement=["all neighbours"],
        limit=speed.Limit("the matrix product", 0.25),
        bars=[speed.Bar("peer", 2.5), speed.Bar("absent", 1.0)],
        skipped={"absent": "it is not installed"},
        growth=[speed.Scale("1x", 0.5, 100), speed.Scale("2x", 1.0)],
        created="2026-11-21T13:00:00+01:00",
        environment={"cpu": "A processor", "gpu": None, "cores": 2},
    )
    return json.loads(json.dumps(dataclasses.asdict(made)))


def _certificate() -> dict[str, Any]:
    rows = [
        {"name": "loss", "difference": 1e-7, "tolerance": 1e-5},
        {"name": "grad_norm", "difference": 0.0, "tolerance": 1e-4},
    ]
    named = {"case": "mae", "method": "mae", "code": "0", "repository": "a/b", "commit": "0", "torch": "2.13"}
    return {**named, "rows": rows}


def _explanation() -> dict[str, Any]:
    end = {"recipe": "dino", "settings": {"k": 10}, "low": 1.0, "high": 3.0, "chosen": {"k": 10}, "run": ""}
    return {
        **{
            "command": "mimbench explain knn:dino knn:lightly",
            "protocol": "knn",
            "version": 1,
            "protocol_code": "0",
        },
        **{
            "method": "mae",
            "method_code": "0",
            "encoder": "mae",
            "key": "0",
            "data": "digits",
            "data_fingerprint": "0",
        },
        **{"note": "", "n": 100, "metric": "top1", "unit": "%", "notes": [], "test_reads": 2, "seconds": 1.0},
        "a": {**end, "name": "knn:dino", "value": 60.0},
        "b": {**end, "name": "knn:lightly", "value": 63.0, "recipe": "lightly"},
        "gap": {"points": 3.0, "low": 1.0, "high": 5.0, "p": 0.01, "only_a": 1, "only_b": 4},
        "parts": [
            {"settings": {"k": [10, 20]}, "points": 1.5, "low": 0.5, "high": 2.5},
            {"settings": {"temperature": [0.07, 0.1]}, "points": 1.5, "low": None, "high": None},
        ],
        "stops": [
            *({"parts": [], "value": 60.0}, {"parts": [0], "value": 61.0}, {"parts": [1], "value": 61.0}),
            {"parts": [0, 1], "value": 63.0},
        ],
        "apart": [{"what": "seed", "a": "0", "b": "1", "why": "other weights", "walk": ""}],
        **{
            "environment": {"cpu": "x"},
            "git": {"commit": None},
            "created": "2026-01-01T00:00:00+00:00",
            "schema": 1,
        },
    }


OTHERS = {"explained": _explanation, "speed": _comparison, "baselines": _baseline, "parity": _certificate}


@target("report.folder")
def foreign_site(rng: Random, folder: Path) -> None:
    """A site that came from elsewhere: rendering into it removes and writes nothing outside."""
    mine, site = folder / "mine.txt", folder / "site"
    mine.write_text("keep")
    site.mkdir()
    names = [
        "../mine.txt",
        str(mine),
        "a/../../mine.txt",
        "index.html",
        draws.text(rng),
        "../",
        ".",
        "static",
    ]
    put(site / report.LISTING, "\n".join(rng.sample(names, 4)))
    if rng.random() < 0.5:
        linked = site / rng.choice(("index.html", "about.html", report.LISTING, report.LOCK, report.PART))
        linked.unlink(missing_ok=True)
        linked.symlink_to(mine)
    with few_methods(folder), contextlib.redirect_stdout(io.StringIO()):
        try:
            report.report(folder / "results", site)
        finally:
            assert mine.read_text() == "keep", "a site's own list of pages reached outside"
