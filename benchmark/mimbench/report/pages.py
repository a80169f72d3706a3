"""All pages: everything that is shown is computed here as plain data; the templates only place it."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimbench import export, paths, registry, reported
from mimbench.certificate import Certificate
from mimbench.record import Record, place, stale, test_selected
from mimbench.report import comparing
from mimbench.report.ablations import ablations
from mimbench.report.board import boards, choices
from mimbench.report.drawings import charts, grids, heats, heats_of
from mimbench.report.explained import explained_views, recipe_figures
from mimbench.report.ledger import by_paper, ledger, verdicts
from mimbench.report.ranking import Table, tables, view_order
from mimbench.report.readings import readings
from mimbench.report.source import Source
from mimbench.report.speeds import speed_views
from mimbench.report.words import (
    INVISIBLE,
    count,
    day,
    duration,
    effort,
    flatten,
    how,
    number,
    page_name,
    prose,
    ratio,
    short,
    signed,
    view_name,
    when,
)

if TYPE_CHECKING:
    import jinja2

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")


def pages(source: Source, *, alone: bool = False) -> Iterator[tuple[str, bytes]]:
    """The whole site, file by file: its path below the folder, and content; the front page ``alone`` needs no other."""
    environment = _environment()
    ranked = tables(source.records, source.papers)
    for table in ranked:
        table.heats = heats_of(table)
    slugs = sorted({*registry.methods(), *(r.method.slug for r in source.records)})
    methods = [_method(slug, source.certificates) for slug in slugs]
    proofs = {method["slug"]: method["parity"] for method in methods}
    for table in ranked:
        for row in table.rows:
            row.parity = proofs[row.method]
    measured = {*(r.protocol.name for r in source.records), *(found.protocol for found in source.explained)}
    names = sorted({*registry.protocols(), *measured})
    newest = max(map(when, source.records), default=None)
    site = {
        "runs": len(source.records),
        "newest": newest,
        "methods": methods,
        "measured": len({r.method.slug for r in source.records}),
        "command": next((m["command"] for m in methods if not m["baseline"]), "mimbench list methods"),
    }
    inline = export.inline() if alone else None

    def page(path: str, template: str, **view: Any) -> tuple[str, bytes]:
        root = "../" * path.count("/")
        shared = {"site": site, "root": root, "here": Path(path).stem, "inline": inline}
        return path, environment.get_template(template).render(shared, **view).encode()

    sections = [_section(name, [t for t in ranked if t.protocol == name]) for name in names]
    shown = [section for section in sections if section["tables"]]
    held = boards(ranked, source.papers, proofs)
    front = page(
        "index.html", "index.html", sections=shown, boards=held, choices=choices(held), faults=source.faults
    )
    if alone:
        yield front[0], export.unlink(front[1].decode()).encode()
        return
    yield front
    for table in ranked:
        yield from export.files(table).items()
    comparable, scripts = comparing.comparisons(ranked, source.records)
    yield page("compare.html", "compare.html", views=comparable)
    yield from scripts.items()
    yield page("about.html", "about.html")
    yield page("findings.html", "findings.html", boards=held)
    timed = speed_views(source.comparisons)
    bars = [
        bar | {k: view[k] for k in ("title", "anchor", "device")} for view in timed for bar in view["bars"]
    ]
    yield page("speed.html", "speed.html", comparisons=timed, bars=bars)
    judged = verdicts(source, ranked)
    numbers = by_paper(judged)
    papers = [_paper(paper, source, numbers.get(paper.slug, [])) for paper in source.catalogue]
    places = {paper["slug"]: paper["href"] for paper in papers} | {m["slug"]: m["href"] for m in methods}
    yield page("verdicts.html", "verdicts.html", **ledger(judged, places))
    yield from export.verdicts(judged).items()
    yield page("odometer.html", "odometer.html", **readings(source.records))
    yield page("papers.html", "papers.html", papers=papers)
    for paper in papers:
        if not paper["here"]:
            yield page(paper["href"], "paper.html", paper=paper)
    spreads = recipe_figures(source.records)
    explained = explained_views(source.explained, (run.id for run in source.records), slugs)
    for section in sections:
        yield page(
            section["href"],
            "protocol.html",
            protocol=section,
            tables=section["tables"],
            settings=section["settings"],
            spread=spreads.get(section["name"]),
            explained=[view for view in explained if view["protocol"] == section["name"]],
        )
    for view in explained:
        yield page(view["href"], "explained.html", found=view)
    own_citation = export.own_citation(len(source.records), newest)
    for method in methods:
        runs = [r for r in source.records if r.method.slug == method["slug"]]
        runs.sort(key=lambda r: (r.protocol.name, r.data.name, r.fingerprint, r.preset, r.seed, r.id))
        yield page(
            method["href"],
            "method.html",
            method=method,
            results=[run_view(run) for run in runs],
            reported=numbers.get(method["slug"], []),
            charts=charts(runs),
            commands=list(dict.fromkeys(run.command for run in runs)),
            files=[{"name": view["file"], "href": view["href"]} for view in map(run_view, runs)],
            own_citation=own_citation,
            ablations=ablations(method["slug"], ranked),
        )
        yield from method["files"].items()
        badge = export.badge(method["slug"], method["protocols"], ranked, method["parity"])
        yield page(method["badge"], "badge.svg", badge=badge)
    for run in source.records:
        view = run_view(run)
        yield page(view["href"], "run.html", run=view, **_run_parts(run))
    for file in sorted(paths.static().iterdir()):
        yield f"static/{file.name}", file.read_bytes()


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.templates()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value.translate(INVISIBLE) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "count": count,
        "duration": duration,
        "ratio": ratio,
        "short": short,
        "view": view_name,
        "day": day,
    }
    return environment


def _method(slug: str, certificates: Sequence[Certificate]) -> dict[str, Any]:
    """A method's identity for its page; a record may outlive the folder of its method."""
    href = f"methods/{page_name(slug)}.html"
    card = registry.methods().get(slug)
    protocol = card.protocols[0] if card else "PROTOCOL"
    view: dict[str, Any] = {
        "slug": slug,
        "href": href,
        "badge": f"badges/{page_name(slug)}.svg",
        "citation": "",
        "protocols": card.protocols if card else (),
        "baseline": card is not None and card.family == "baseline",
        "title": slug,
        "facts": [],
        "summary": "",
        "deviations": (),
        "pictures": [],
        "files": {},
        "parity": _parity([found for found in certificates if found.method == slug]),
        "command": f"mimbench run --method {slug} --protocol {protocol}",
    }
    if card is None:
        return view | {"summary": "This method is known from its records alone: it has no folder here."}
    facts = [{"text": text, "href": ""} for text in (card.family, card.venue, card.licence) if text]
    if card.arxiv:
        facts.append({"text": f"arXiv {card.arxiv}", "href": f"https://arxiv.org/abs/{card.arxiv}"})
    if card.code:
        facts.append({"text": f"code: {card.code}", "href": _code_link(card.code)})
    readme = card.folder / "README.md"
    prose = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    drawn = [file for file in card.folder.iterdir() if file.suffix.lower() in PICTURES]
    places = {file: prose.find(f"({file.name})") for file in drawn}
    for file in sorted(drawn, key=lambda file: (places[file] < 0, places[file], file.name)):
        target = f"methods/pictures/{page_name(slug)}-{page_name(file.stem)}{file.suffix.lower()}"
        alt = re.search(rf"!\[([^\]]+)\]\((?:\./)?{re.escape(file.name)}\)", prose)
        view["pictures"].append({"href": target, "alt": alt[1] if alt else file.stem.replace("_", " ")})
        view["files"][target] = file.read_bytes()
    return view | {
        "title": card.title,
        "facts": facts,
        "summary": card.summary.strip(),
        "deviations": card.deviations,
        "citation": "" if view["baseline"] else export.citation(card),
    }


def _paper(paper: reported.Paper, source: Source, numbers: list[dict[str, Any]]) -> dict[str, Any]:
    """A paper of the catalogue: what is here of it, and the ``numbers`` that it reports."""
    here = paper.slug in registry.methods()
    runs = [run for run in source.records if run.method.slug == paper.slug]
    return {
        **vars(paper),
        "here": here,
        "href": f"{'methods' if here else 'papers'}/{page_name(paper.slug)}.html",
        "runs": len(runs),
        "protocols": len({run.protocol.name for run in runs}),
        "numbers": numbers,
        "verified": sum(row["confidence"] == "verified" for row in numbers),
        "code_link": _code_link(paper.code),
    }


def _code_link(code: str) -> str:
    """Where the authors' code is; empty for what is neither OWNER/NAME on GitHub nor an address."""
    link = f"https://github.com/{code}" if re.fullmatch(r"[\w.-]+/[\w.-]+", code) else code
    return link if re.match("https?://", link) else ""


def _parity(certificates: Sequence[Certificate]) -> dict[str, Any] | None:
    """How near a method's outputs are to its authors' code, over all its cases."""
    if not certificates:
        return None
    return {
        "passed": all(found.passed for found in certificates),
        "fresh": all(found.fresh for found in certificates),
        "worst": max(found.worst for found in certificates),
        "cases": certificates,
    }


def _section(name: str, ranked: list[Table]) -> dict[str, Any]:
    """A protocol with its tables, for the index and for its own page."""
    card = registry.protocols().get(name)
    text = ast.get_docstring(ast.parse(card.file.read_text(encoding="utf-8"))) if card else None
    facts = [f"version {card.version}", f"needs {', '.join(card.needs)}"] if card and card.needs else []
    recipes = dict.fromkeys(t.recipe for t in ranked)
    facts += [f"recipes run: {', '.join(recipes)}"] if recipes else ["not run yet"]
    return {
        "name": name,
        "anchor": f"p-{page_name(name)}",
        "views": sorted({t.view for t in ranked}, key=view_order),
        "href": f"protocols/{page_name(name)}.html",
        "summary": card.summary if card else "",
        "text": prose(text or ""),
        "facts": facts,
        "tables": ranked,
        "settings": _settings(ranked),
    }


def _settings(ranked: Sequence[Table]) -> dict[str, Any] | None:
    """Every setting of every fingerprint, side by side."""
    columns = {t.fingerprint: t for t in ranked}
    if not columns:
        return None
    flat = [dict(flatten(table.settings)) for table in columns.values()]
    rows = []
    for name in dict.fromkeys(name for settings in flat for name in settings):
        values = [settings.get(name, "–") for settings in flat]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    heads = [{"recipe": t.recipe, "fingerprint": t.fingerprint} for t in columns.values()]
    return {"heads": heads, "rows": rows}


def run_view(run: Record) -> dict[str, Any]:
    """The headline of a run."""
    return {
        "id": run.id,
        "href": f"runs/{page_name(run.id)}.html",
        "method": run.method.slug,
        "method_href": f"methods/{page_name(run.method.slug)}.html",
        "protocol": run.protocol.name,
        "protocol_href": f"protocols/{page_name(run.protocol.name)}.html",
        "recipe": run.protocol.recipe,
        "version": run.protocol.version,
        "data": run.data.name,
        "metric": run.primary,
        "value": run.score.value,
        "low": run.score.low,
        "high": run.score.high,
        "unit": run.score.unit,
        "seed": run.seed,
        "preset": run.preset,
        "backbone": run.backbone,
        "dataset": run.pretrain.dataset if run.pretrain.images else "none",
        "effort": effort([run], seconds=True),
        "how": how([run]),
        "date": when(run),
        "stale": stale(run) or "",
        "test_selected": test_selected(run),
        "warnings": run.warnings,
        "command": run.command,
        "file": place(run, Path()).as_posix(),
    }


def _run_parts(run: Record) -> dict[str, Any]:
    """All else of a record; of what it holds only the bits of ``correct`` are not for reading."""
    seconds = {"pretraining": run.pretrain.seconds, **run.seconds}
    if "total" in seconds:
        seconds["evaluation in all"] = seconds.pop("total")
    longest = max(seconds.values()) or 1.0
    drawn = tuple(f"{name}." for name in grids(run.details))
    parts = {
        "Evaluation": {"fingerprint": run.fingerprint, **dataclasses.asdict(run.protocol)},
        "Evaluation data": {**dataclasses.asdict(run.data), "reads of test labels": run.test_reads},
        "Details": run.details,
        "Encoder": {"backbone": run.backbone, **dataclasses.asdict(run.encoder)},
        "Pretraining": dataclasses.asdict(run.pretrain),
        f"Changed from the {run.preset} preset": run.overrides,
        "Method": {**dataclasses.asdict(run.method), "preset": run.preset},
        "Configuration": run.config,
        "Machine and versions": run.environment,
        "Code": {**run.git, "record schema": run.schema, "created": run.created},
    }
    shown = {title: flatten(table) for title, table in parts.items() if table}
    shown["Details"] = [pair for pair in shown.get("Details", []) if not pair[0].startswith(drawn)]
    return {
        "metrics": [
            {**dataclasses.asdict(metric), "name": name, "primary": name == run.primary}
            for name, metric in run.metrics.items()
        ],
        "stages": [
            {"name": name, "seconds": taken, "share": round(100 * taken / longest, 1)}
            for name, taken in seconds.items()
        ],
        "heats": heats(run.details),
        "charts": charts([run]),
        "parts": [{"title": title, "items": items} for title, items in shown.items() if items],
    }
