"""What the report offers beside its pages: tables as CSV and Parquet, badges, citations, one page in one file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mimbench import __version__, database, paths, verdict
from mimbench.record import setting, test_selected

if TYPE_CHECKING:
    from datetime import datetime

    from mimbench.registry import Card
    from mimbench.report.ranking import Row, Table
    from mimbench.verdict import Verdict

DATABASE = "data/mimbench.duckdb"  # below the site's folder
# Those of the database's view 'leaderboard' and its types, with the first and the last place that tests leave open.
COLUMNS = {
    **dict.fromkeys(("protocol", "recipe", "dataset", "metric", "compared_by"), "VARCHAR"),
    **dict.fromkeys(("rank", "rank_to"), "BIGINT"),
    **dict.fromkeys(("method", "preset"), "VARCHAR"),
    **dict.fromkeys(("mean", "low", "high"), "DOUBLE"),
    "unit": "VARCHAR",
    **dict.fromkeys(("seeds", "n"), "BIGINT"),
    **dict.fromkeys(("backbone", "pretrain_dataset", "budget"), "VARCHAR"),
    **dict.fromkeys(("epochs", "images", "pretrain_seconds"), "DOUBLE"),
    "precision": "VARCHAR",
    "compiled": "BOOLEAN",
    "input_size": "BIGINT",
    "stale": "BOOLEAN",
    **dict.fromkeys(("fingerprint", "setting"), "VARCHAR"),
}
_TEX = {
    **{ord(sign): f"\\{sign}" for sign in "&%$#_"},
    **{ord("{"): r"\textbraceleft{}", ord("}"): r"\textbraceright{}", ord("\\"): r"\textbackslash{}"},
    **{ord("~"): r"\textasciitilde{}", ord("^"): r"\textasciicircum{}"},
}
WIDTHS = {**dict.fromkeys("fijlrtI.,:;'|()[] -", 4.1), **dict.fromkeys("mwMW%", 10.4)}  # of 11 px; others 6.9


def files(table: Table) -> dict[str, bytes]:
    """A ranking as CSV and as Parquet, by path below the site's folder: a row a row, floats in full."""
    return _as_files(f"data/{table.anchor}", [_cells(table, row) for row in table.rows], COLUMNS)


def verdicts(found: Sequence[Verdict]) -> dict[str, bytes]:
    """The ledger as CSV and as Parquet: a row a reported number."""
    return _as_files("data/verdicts", [each.content() for each in found], verdict.COLUMNS)


def _as_files(name: str, rows: list[dict[str, Any]], columns: Mapping[str, str]) -> dict[str, bytes]:
    import pyarrow.csv
    import pyarrow.parquet

    held = database.arrow(rows, columns)
    csv, parquet = io.BytesIO(), io.BytesIO()
    pyarrow.csv.write_csv(held, csv)
    pyarrow.parquet.write_table(held, parquet)
    return {f"{name}.csv": csv.getvalue(), f"{name}.parquet": parquet.getvalue()}


def _cells(table: Table, row: Row) -> dict[str, Any]:
    first, last = _places(row.rank)
    runs, one = row.runs, row.runs[0]
    return {
        **{"protocol": table.protocol, "recipe": table.recipe, "dataset": table.data, "metric": table.metric},
        **{
            "compared_by": table.view,
            "rank": first,
            "rank_to": last,
            "method": row.method,
            "preset": row.preset,
        },
        **{"mean": row.mean, "low": row.low, "high": row.high, "unit": row.unit},
        **{
            "seeds": len(row.seeds),
            "n": one.score.n,
            "backbone": row.backbone,
            "pretrain_dataset": row.dataset,
        },
        "budget": one.budget,
        "epochs": row.epochs,
        "images": sum(run.pretrain.images for run in runs) / len(runs),
        "pretrain_seconds": row.seconds,
        "precision": " or ".join(sorted({run.pretrain.precision for run in runs})),
        "compiled": any(run.pretrain.compiled for run in runs),
        "input_size": one.encoder.input_size,
        "stale": bool(row.stale),
        "fingerprint": table.fingerprint,
        "setting": setting(one),
    }


def _places(rank: str) -> tuple[int | None, int | None]:
    """First and last place of a rank as shown: "2–4", "3", "–" for the only method, "" for a baseline."""
    if not rank:
        return None, None
    first, _, last = rank.partition("–")
    return int(first or 1), int(last or first or 1)


# Badges -----------------------------------------------------------------------------------------------


def badge(slug: str, protocols: Sequence[str], tables: Sequence[Table], parity: dict[str, Any] | None) -> Any:
    """What a method's badge says, and its drawing's widths.

    Its value under the first of ``protocols`` (those of its card, the usual first) that it was run under: of
    several rows the one of most seeds, then of most test images, never the best, and never one whose score is the
    best of several on the test split. Without a value of today's
    code its parity with the authors' code is said, where that was tested.
    """
    from mimbench.report.words import number

    rows = ((table, row) for table in tables for row in table.rows if row.method == slug)
    found = [pair for pair in rows if not test_selected(pair[1].runs[0])]
    order = {name: place for place, name in enumerate(protocols)}
    found.sort(
        key=lambda pair: (
            bool(pair[1].stale),
            order.get(pair[0].protocol, len(order)),
            -len(pair[1].seeds),
            -(pair[0].n or 0),
        )
    )
    label, value, detail, warn = "mimbench", "not measured yet", "", False
    if found and not (found[0][1].stale and parity):
        table, row = found[0]
        unit, percent = f" {row.unit}" if row.unit else "", row.unit
        label = f"{table.protocol} {table.metric}, {table.data}"
        value = f"{number(row.mean, percent)}{unit}"
        if row.low is not None and row.high is not None:
            value += f" ({number(row.low, percent)} to {number(row.high, percent)})"
        value += ", stale" if row.stale else ""
        seeds = f"{len(row.seeds)} seed{'' if len(row.seeds) == 1 else 's'}"
        detail = f" ({seeds}, {row.preset} preset, {row.backbone}, recipe {table.recipe}; 95 % interval)"
        warn = bool(row.stale)
    elif parity:
        value = f"parity {parity['worst']:.0e}" if parity["passed"] else "differs from the authors’ code"
        value += "" if parity["fresh"] else ", before a change"
        detail = " (largest relative difference from the authors’ code)" if parity["passed"] else ""
        warn = not (parity["passed"] and parity["fresh"])
    label, value = _short(label), _short(value)
    said = value if label == "mimbench" else f"{label} {value}"
    return {
        **{
            "label": label,
            "value": value,
            "warn": warn,
            "title": f"mimbench, {slug}: {said}{detail}",
        },
        **{"left": _width(label), "right": _width(value)},
    }


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _width(text: str) -> int:
    """About how wide a text is in a usual sans serif of 11 px; drawing stretches it to this."""
    return round(sum(WIDTHS.get(sign, 6.9) for sign in text))


# Citations --------------------------------------------------------------------------------------------


def citation(card: Card) -> str:
    """A BibTeX entry of a method's paper, without authors, which its card does not name."""
    more = {}
    if card.arxiv:
        address = f"https://arxiv.org/abs/{card.arxiv}"
        more = {"eprint": card.arxiv, "archiveprefix": "arXiv", "url": address}
    year = str(card.year) if card.year else ""
    return _bibtex(card.slug, title=card.title, key=card.slug, year=year, note=card.venue, **more)


def own_citation(runs: int, newest: datetime | None) -> str:
    """A BibTeX entry of mimbench and of the records that the page was rendered from."""
    held = f", {runs} run record{'' if runs == 1 else 's'}" if runs else ""
    until = f", the newest of {newest:%Y-%m-%d}" if newest else ""
    return _bibtex(
        "mimbench",
        title="mimbench: Masked image modelling and self-supervised learning, reproduced and measured "
        "under one protocol",
        key="mimbench",
        year=str(newest.year) if newest else "",
        note=f"Version {__version__}{held}{until}",
    )


def _bibtex(name: str, **fields: str) -> str:
    shown = {field: " ".join(text.translate(_TEX).split()) for field, text in fields.items() if text}
    shown["title"] = f"{{{shown['title']}}}"  # keeps its capitals
    lines = "".join(f"  {field} = {{{text}}},\n" for field, text in shown.items())
    return f"@misc{{{re.sub(r'[^A-Za-z0-9_-]', '', name)},\n{lines}}}"


# One file ---------------------------------------------------------------------------------------------


def inline() -> dict[str, str]:
    """Style and script for a page that is one file."""
    return {name: (paths.static() / name).read_text(encoding="utf-8") for name in ("style.css", "tables.js")}


def unlink(page: str) -> str:
    """A rendered page without its links to other files of the site, whose words stay."""
    return re.sub(r'<a [^>]*?href="(?!#|https://)[^"]*"[^>]*>(.*?)</a>', r"\1", page, flags=re.DOTALL)
