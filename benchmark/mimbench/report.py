"""The static site: records and reported numbers in, pages that open from the file system out.

Everything shown is computed here as plain data; the templates only place it. Nothing depends on the clock,
so the same records give the same bytes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import json
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimbench import certificate, config, database, export, paths, registry, reported, speed
from mimbench.certificate import Certificate
from mimbench.errors import DataError, MimbenchError, ResultsError
from mimbench.record import Record, place, scan, setting, stale

if TYPE_CHECKING:
    import jinja2


STRIP = 176.0  # width of the drawing of one score, in SVG units
CHART = (52.0, 8.0, 696.0, 194.0)  # left, top, right and bottom of a loss curve's plane, in SVG units
POINTS = 300  # most points drawn of one curve
SERIES = 5  # line styles that the style sheet tells apart
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")
# Characters that are invisible or turn the text around them; pages show their codes instead.
_UNSEEN = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
INVISIBLE = {code: f"\\u{code:04x}" for code in _UNSEEN}
LOWER_IS_BETTER = re.compile(r"distance|mce|error|loss|latency|memory|seconds|flops|parameters")


@dataclass
class Source:
    """What the site is rendered from."""

    records: list[Record] = field(default_factory=list)
    papers: list[reported.Row] = field(default_factory=list)  # the reported numbers
    faults: list[str] = field(default_factory=list)  # one sentence for each file that could not be read
    comparisons: list[speed.Comparison] = field(default_factory=list)  # of speed
    certificates: list[Certificate] = field(default_factory=list)  # of parity
    catalogue: list[reported.Paper] = field(default_factory=list)  # papers that are here or planned


@dataclass
class Row:
    """A method in one setting, under one fingerprint: the mean of its seeds."""

    method: str
    href: str
    preset: str
    overrides: str  # of the preset, as key=value
    backbone: str
    readout: str  # how the encoder's feature is read
    dataset: str  # pretraining data
    epochs: float  # of pretraining, mean of the seeds
    effort: str  # budget, epochs and images of pretraining, readable
    seconds: float  # of pretraining, mean of the seeds
    how: str  # precision of pretraining and whether it was compiled
    pretrained: bool
    published: bool  # weights that were trained elsewhere
    unit: str
    seeds: tuple[int, ...]
    mean: float
    low: float | None  # over seeds, or over test images for a single seed
    high: float | None
    stale: str  # why, or ""
    role: str  # "floor" or "ceiling" for a baseline, else ""
    runs: list[Record]
    order: int = 0  # position in the table
    rank: str = ""  # "2", or "2–4" where intervals overlap
    tied: bool = False  # not separated from the method in the row above
    strip: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, Any] | None = None
    more: int = 0  # further reported numbers under this protocol
    differences: list[str] = field(default_factory=list)
    gap: float | None = None
    parity: dict[str, Any] | None = None  # see _parity


@dataclass
class Table:
    """All that was scored in one way and trained by one rule: only these rows sort together."""

    anchor: str
    protocol: str
    version: int
    recipe: str
    fingerprint: str
    settings: Mapping[str, Any]  # all that the fingerprint is made of
    data: str
    note: str
    n: int | None
    metric: str
    unit: str
    lower: bool  # lower is better
    view: str  # by what its rows may be compared, see compared_by()
    rows: list[Row]
    left: float = 0.0  # of the scale that intervals are drawn on
    right: float = 1.0
    heats: list[dict[str, Any]] = field(default_factory=list)


# Rankings ---------------------------------------------------------------------------------------------


def tables(records: Iterable[Record], papers: Sequence[reported.Row]) -> list[Table]:
    """One table per protocol, data set, fingerprint and view; the protocols in alphabetical order.

    A floor was not trained, by whatever rule: it stands in each view of its fingerprint.
    """
    groups: dict[tuple[str, ...], dict[str | None, list[Record]]] = {}
    for record in records:
        protocol = record.protocol
        key = (protocol.name, record.data.name, protocol.recipe, record.fingerprint, record.primary)
        is_floor = _is_baseline(record.method.slug) and not _is_trained(record)
        groups.setdefault(key, {}).setdefault(None if is_floor else compared_by(record), []).append(record)
    found = []
    for _, views in sorted(groups.items()):
        floors = views.pop(None, [])
        for view in sorted(filter(None, views), key=view_order) or [EPOCHS]:
            found.append(_table(view, [*views.get(view, []), *floors], papers))
    return found


EPOCHS = "epochs"


def compared_by(record: Record) -> str:
    """What a row has in common with those it is ranked with: ``epochs`` for a recipe that says how many, a number
    of images, or a time and the machine, as two minutes are not the same on another."""
    budget = record.config.get("recipe", {}).get("budget")
    if not budget or str(budget).endswith("img"):
        return str(budget or EPOCHS)
    facts = record.environment
    on_cpu = facts.get("device") == "cpu" or not facts.get("gpu")
    machine = (
        f"{facts.get('cpu') or 'an unnamed processor'}, threads: {facts.get('threads')}"
        if on_cpu
        else facts["gpu"]
    )
    return f"{budget} on {machine}"


def view_order(view: str) -> tuple[bool, str]:
    """Sorts the view by epochs before those of equal cost."""
    return view != EPOCHS, view


def view_name(view: str) -> str:
    """A view for reading."""
    images = re.fullmatch(r"(\d+)img", view)
    return (
        "by epochs" if view == EPOCHS else f"budget {count(int(images[1])) + ' images' if images else view}"
    )


def _is_baseline(slug: str) -> bool:
    card = registry.methods().get(slug)
    return card is not None and card.family == "baseline"


def _is_trained(record: Record) -> bool:
    return bool(record.pretrain.images or record.pretrain.epochs)


def _table(view: str, group: list[Record], papers: Sequence[reported.Row]) -> Table:
    first = group[0]
    protocol, metric = first.protocol, first.primary
    table = Table(
        anchor="t-" + config.digest(protocol.name, first.data.name, first.fingerprint, metric, view),
        protocol=protocol.name,
        version=protocol.version,
        recipe=protocol.recipe,
        fingerprint=first.fingerprint,
        settings={**protocol.settings, "input_size": first.encoder.input_size},
        data=first.data.name,
        note=first.data.note,
        n=first.data.n_test,
        metric=metric,
        unit=first.score.unit,
        lower=bool(LOWER_IS_BETTER.search(metric)),
        view=view,
        rows=[],
    )
    rows: dict[str, list[Record]] = {}
    for record in group:
        rows.setdefault(setting(record), []).append(record)
    table.rows = [_row(runs) for runs in rows.values()]
    table.rows.sort(key=lambda r: (r.mean if table.lower else -r.mean, r.method, r.preset))
    rank(table.rows, table.lower)
    _draw(table)
    for row in table.rows:
        _set_beside(row, table, papers)
    return table


def newest_per_seed(runs: Iterable[Record]) -> list[Record]:
    """The newest run of each seed, in order of seeds; stale ones only where all are stale.

    A mean never mixes runs of today's code with runs of another.
    """
    runs = list(runs)
    fresh = [run for run in runs if not stale(run)]
    newest = {run.seed: run for run in sorted(fresh or runs, key=when)}
    return [newest[seed] for seed in sorted(newest)]


def _row(runs: list[Record]) -> Row:
    from mimbench.stats import seed_interval

    runs = newest_per_seed(runs)
    first = runs[0]
    mean, low, high = seed_interval([run.score.value for run in runs])
    if len(runs) == 1:
        low, high = first.score.low, first.score.high
    trained = _is_trained(first)
    role = ("ceiling" if trained else "floor") if _is_baseline(first.method.slug) else ""
    return Row(
        method=first.method.slug,
        href=f"methods/{page_name(first.method.slug)}.html",
        preset=first.preset,
        overrides=", ".join(f"{name}={value}" for name, value in flatten(first.overrides) if name),
        backbone=first.backbone,
        readout=first.encoder.readout,
        dataset=first.pretrain.dataset,
        epochs=statistics.mean(run.pretrain.epochs for run in runs),
        effort=effort(runs),
        seconds=statistics.mean(run.pretrain.seconds for run in runs),
        how=how(runs),
        pretrained=trained,
        published="weights" in first.overrides or first.pretrain.dataset == "published weights",
        unit=first.score.unit,
        seeds=tuple(run.seed for run in runs),
        mean=mean,
        low=low,
        high=high,
        stale="; ".join(dict.fromkeys(filter(None, map(stale, runs)))),
        role=role,
        runs=runs,
    )


def rank(rows: Sequence[Row], lower: bool) -> None:
    """Places as ranges over ``rows`` sorted best first: only disjoint intervals put one before another.

    Conservative: overlapping intervals leave the order open though a paired test might settle it. A row
    without an interval is separated from none. Baselines are neither placed nor counted.
    """
    placed = [row for row in rows if not row.role]
    for order, row in enumerate(rows, 1):
        row.order = order
    for i, row in enumerate(placed):
        best = 1 + sum(_before(other, row, lower) for other in placed)
        worst = len(placed) - sum(_before(row, other, lower) for other in placed)
        row.rank = "–" if len(placed) == 1 else str(best) if best == worst else f"{best}–{worst}"
        row.tied = i > 0 and not _before(placed[i - 1], row, lower)


def _before(a: Row, b: Row, lower: bool) -> bool:
    """Whether all of a's interval is better than all of b's."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.high < b.low if lower else a.low > b.high


def _draw(table: Table) -> None:
    """Places means, intervals and the lines of the baselines on one scale for the whole table."""
    ends = [v for r in table.rows for v in (r.mean, r.low, r.high) if v is not None and math.isfinite(v)]
    left, right = min(ends, default=0.0), max(ends, default=1.0)
    margin = 0.05 * (right - left) or 1.0
    left, right = left - margin, right + margin
    if table.unit == "%":
        left, right = max(left, 0.0), min(right, 100.0)
    table.left, table.right = left, right

    def at(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(5 + (STRIP - 10) * min(max((value - left) / (right - left), 0.0), 1.0), 1)

    for row in table.rows:
        lines = [
            {"role": base.role, "x": at(base.mean), "label": f"{base.role}: {base.method}"}
            for base in table.rows
            if base.role and base is not row and base.backbone == row.backbone
        ]
        low, high = (at(row.low), at(row.high)) if None not in (row.low, row.high) else (None, None)
        row.strip = {"mean": at(row.mean), "low": low, "high": high, "lines": lines}


# Beside the papers ------------------------------------------------------------------------------------


def _set_beside(row: Row, table: Table, papers: Sequence[reported.Row]) -> None:
    """Gives ``row`` the reported number nearest to its setting, and the gap where nothing differs."""
    own = [r for r in papers if r["slug"] == r["method"] == row.method and r["protocol"] == table.protocol]
    if not own or row.role:
        return
    nearest = min(own, key=lambda r: (len(differences(row, table, r)), r["confidence"] != "verified"))
    row.more = len(own) - 1
    row.reported = reported_view(nearest)
    row.differences = differences(row, table, nearest)
    if not row.differences:
        row.gap = row.mean - nearest["value"]


def differences(row: Row, table: Table, theirs: reported.Row) -> list[str]:
    """In what a reported number's setting is not ours, or not known to be; empty where a gap has meaning."""
    pairs = {
        "metric": (table.metric, theirs["metric"]),
        "evaluation data": (table.data, theirs["dataset"]),
        "pretraining data": (row.dataset, theirs["pretrain_data"]),
        "backbone": (row.backbone, theirs["backbone"]),
        "image size": (str(row.runs[0].encoder.input_size), theirs["image_size"]),
        # A paper evaluates by its own recipe: ours is that one where it bears the paper's name.
        "recipe": (table.recipe, theirs["method"]),
    }
    found = [name for name, (our, their) in pairs.items() if _plain(our) != _plain(their)]
    found += ["epochs"] if row.epochs != theirs["pretrain_epochs"] else []
    found += ["unit"] if row.unit != theirs["unit"] else []
    return found


def reported_view(theirs: reported.Row) -> dict[str, Any]:
    """A row of a reported.csv as the pages show it: what the source does not say is empty."""
    text = {name: "" if value is None else value for name, value in theirs.items()}
    value, epochs = theirs["value"], theirs["pretrain_epochs"]
    pretraining = [text["pretrain_data"], "" if epochs is None else f"{epochs:g} epochs"]
    context = [text["metric"], text["dataset"], text["backbone"], *pretraining]
    return {
        **text,
        "value": number(value, "%") if text["unit"] == "%" and round(value, 1) == value else f"{value:.10g}",
        "pretraining": ", ".join(filter(None, pretraining)),
        "setting": ", ".join(filter(None, context)),
    }


def _plain(name: str | None) -> str:
    """A name without case and punctuation: cifar-10 and cifar10 are one data set."""
    plain = re.sub(r"[^a-z0-9]", "", (name or "").lower())
    return {"imagenet": "imagenet1k"}.get(plain, plain)


# Drawings ---------------------------------------------------------------------------------------------


def charts(runs: Iterable[Record]) -> list[dict[str, Any]]:
    """Loss curves of pretraining: a chart per setting with a line per seed."""
    settings: dict[tuple[str, ...], dict[int, list[tuple[float, float]]]] = {}
    for run in sorted(runs, key=when, reverse=True):
        curve = [(point["step"], point["loss"]) for point in run.curve if point.keys() >= {"step", "loss"}]
        if len(curve) > 1:
            budget = run.config.get("recipe", {}).get("budget")  # its seeds get differently far
            trained = view_name(budget) if budget else effort([run])
            title = (f"{run.preset} preset", run.backbone, run.pretrain.dataset, trained)
            settings.setdefault(title, {}).setdefault(run.seed, curve)
    return [_chart(" · ".join(filter(None, title)), by_seed) for title, by_seed in sorted(settings.items())]


def _chart(title: str, curves: Mapping[int, list[tuple[float, float]]]) -> dict[str, Any]:
    left, top, right, bottom = CHART
    last_step = max(x for curve in curves.values() for x, _ in curve)
    values = [y for curve in curves.values() for _, y in curve]
    y_marks = ticks(min(values), max(values))
    low, high = y_marks[0], y_marks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(left + (right - left) * x / (last_step or 1), 1),
            round(bottom - (bottom - top) * (y - low) / (high - low), 1),
        )

    lines = []
    for index, (seed, curve) in enumerate(sorted(curves.items())):
        points = [place(x, y) for x, y in thin(curve)]
        lines.append(
            {
                "label": f"seed {seed}",
                "style": index % SERIES,
                "points": " ".join(f"{x},{y}" for x, y in points),
                "last": curve[-1][1],
            }
        )
    first_seed = curves[min(curves)]
    return {
        "title": title,
        "summary": f"loss from {number(first_seed[0][1])} to {number(first_seed[-1][1])} in {count(last_step)} steps",
        "x_label": "step",
        "y_ticks": [{"at": place(0, v)[1], "label": f"{v:g}"} for v in y_marks],
        "x_ticks": [
            {"at": place(v, low)[0], "label": count(v)} for v in ticks(0, last_step) if v <= last_step
        ],
        "lines": lines,
    }


def thin(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``POINTS`` points, evenly picked, the first and the last among them."""
    if len(curve) <= POINTS:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (POINTS - 1))] for i in range(POINTS)]


def ticks(low: float, high: float) -> list[float]:
    """Round marks from at or below ``low`` to at or above ``high``, about five of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(start, stop + 1)]


def heats(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run's details that are tables of numbers, such as accuracy per corruption and severity."""
    found = []
    for name, table in _grids(details).items():
        if any(isinstance(cells, Mapping) for cells in table.values()):
            found.append(_heat(name, "", [(label, "", _named(cells)) for label, cells in table.items()]))
        else:
            found.append(_heat(name, "", [("", "", table)]))
    return found


def heats_of(table: Table) -> list[dict[str, Any]]:
    """What the runs of a ranking say per class or per corruption: methods down, names across."""
    lines: dict[str, list[tuple[str, str, dict[str, float | None]]]] = {}
    averaged = set()
    for row in table.rows:
        grids = [_grids(run.details) for run in row.runs]
        for name in dict.fromkeys(name for grid in grids for name in grid):
            seeds = [grid[name] for grid in grids if name in grid]
            if any(isinstance(cells, Mapping) for cells in seeds[0].values()):
                averaged.add(name)
            labels = dict.fromkeys(label for seed in seeds for label in seed)
            cells = {
                label: _mean([_mean(_named(seed.get(label)).values()) for seed in seeds]) for label in labels
            }
            lines.setdefault(name, []).append((row.method, row.href, cells))
    note = {
        True: "mean over seeds and over what each name holds, such as severities",
        False: "mean over seeds",
    }
    return [_heat(name, note[name in averaged], rows) for name, rows in lines.items()]


def _grids(details: Mapping[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """The tables of ``details``, by dotted name: two or more names mapped to a number each, or to numbers each.

    None stands for no number. Lists become tables numbered from 1.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in details.items():
        if not isinstance(value, Mapping):
            continue
        table = {
            label: {str(i): v for i, v in enumerate(cells, 1)} if isinstance(cells, list) else cells
            for label, cells in value.items()
        }
        leaves = [leaf for cells in table.values() for leaf in _named(cells).values()]
        if (
            len(value) > 1
            and any(map(_is_number, leaves))
            and all(v is None or _is_number(v) for v in leaves)
        ):
            found[path + name] = table
        else:
            found |= _grids(value, f"{path}{name}.")
    return found


def _named(cells: Any) -> dict[str, Any]:
    return dict(cells) if isinstance(cells, Mapping) else {"": cells}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _heat(title: str, note: str, rows: list[tuple[str, str, dict[str, float | None]]]) -> dict[str, Any]:
    """A table of numbers with the share of its range that each has; ``rows`` are (name, link, cells)."""
    known = [value for *_, cells in rows for value in cells.values() if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    columns = list(dict.fromkeys(column for *_, cells in rows for column in cells))
    percent = high > 1  # shares and errors below one need more decimals

    def cell(value: float | None) -> dict[str, Any]:
        share = 0.0 if value is None or high == low else (value - low) / (high - low)
        text = number(value, "%") if percent else "–" if value is None else f"{value:.3f}"
        return {"text": text, "share": round(share, 3)}

    return {
        "title": title.replace("_", " ").replace(".", ", "),
        "note": note,
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [
            {
                "name": name if href else name.replace("_", " "),
                "href": href,
                "cells": [cell(cells.get(c)) for c in columns],
            }
            for name, href, cells in rows
        ],
    }


# Speed ------------------------------------------------------------------------------------------------


def speed_views(comparisons: Iterable[speed.Comparison]) -> list[dict[str, Any]]:
    """Each comparison as its page shows it, fastest contender first and the limit among them."""
    return [_speed_view(found) for found in sorted(comparisons, key=lambda c: (c.name, c.file))]


def _speed_view(found: speed.Comparison) -> dict[str, Any]:
    facts, ours = found.environment, found.timing(found.ours).median
    rows: list[dict[str, Any]] = [
        {
            "name": timing.name,
            "version": timing.version,
            "ours": timing.name == found.ours,
            "seconds": timing.median,
            "range": f"{number(min(timing.seconds))} to {number(max(timing.seconds))}",
            "ratio": found.ratio(timing.name),
            "note": timing.note,
        }
        for timing in found.timings
    ]
    if found.limit:
        rows.append(
            {
                **{"name": "", "version": "", "ours": False, "range": ""},
                **{"seconds": found.limit.seconds, "ratio": found.limit.seconds / ours},
                "note": found.limit.what,
            }
        )
    rows.sort(key=lambda row: row["seconds"])
    for row in rows:
        row["share"] = round(100 * row["ratio"] / rows[-1]["ratio"], 1)
    bars = []
    for bar in found.bars:
        reached = None if bar.against in found.skipped else found.ratio(bar.against)
        verdict = "not run" if reached is None else "reached" if reached >= bar.ratio else "missed"
        bars.append({"against": bar.against, "least": bar.ratio, "ratio": reached, "verdict": verdict})
    on_gpu = not found.device.startswith("cpu")
    device = f" --device {found.device}" if on_gpu else ""
    script = found.name.partition("-")[0]  # a comparison is named as its script and the variant
    names = ("python", "mimbench", "torch", "numpy", *(("driver", "cuda") if on_gpu else ()))
    return {
        "anchor": f"s-{page_name(Path(found.file).stem)}",
        "title": found.title,
        "work": found.work,
        "rows": rows,
        "rounds": len(found.timing(found.ours).seconds),
        "of_limit": found.of_limit,
        "limit": found.limit.what if found.limit else "",
        "bars": bars,
        "agreement": found.agreement,
        "skipped": found.skipped,
        "growth": found.growth,
        "weighed": any(scale.peak_bytes is not None for scale in found.growth),
        "device": found.device,
        "threads": found.threads,
        "machine": facts.get("gpu" if on_gpu else "cpu") or "an unnamed machine",
        "cores": facts.get("cores"),
        "versions": ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)),
        "date": datetime.fromisoformat(found.created).astimezone(UTC),
        "command": f"python benchmark/speed/{script}.py --threads {found.threads}{device}",
    }


# Words and numbers ------------------------------------------------------------------------------------


def number(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A number for reading: percent with ``digits`` decimals, all else with four significant digits."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if unit == "%":
        return f"{value:.{digits}f}".replace("-", "−")
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")


def signed(value: float, unit: str = "") -> str:
    """A difference with its sign always shown."""
    return ("+" if value >= 0 else "") + number(value, unit)


def ratio(value: float) -> str:
    """How many times something is another thing."""
    return f"{value:.1g}" if value < 0.1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def count(value: float) -> str:
    """60000 as 60,000."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,g}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    for limit, size, unit, form in (
        (1, 1, "s", ".2f"),
        (10, 1, "s", ".1f"),
        (120, 1, "s", ".0f"),
        (600, 60, "min", ".1f"),
        (7200, 60, "min", ".0f"),
    ):
        if seconds < limit:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds / 3600:.1f} h"


def when(run: Record) -> datetime:
    """The moment at which a run was recorded, in UTC."""
    return datetime.fromisoformat(run.created).astimezone(UTC)


def day(moment: datetime) -> str:
    """21 November 2026."""
    return f"{moment.day} {moment:%B %Y}"


def effort(runs: Sequence[Record], seconds: bool = False) -> str:
    """What pretraining took, as a mean of ``runs``: the budget, epochs, images seen and, if asked for, wall time."""
    taken = [run.pretrain for run in runs]
    epochs, images, time = (
        statistics.mean(getattr(each, name) for each in taken) for name in ("epochs", "images", "seconds")
    )
    budget = runs[0].config.get("recipe", {}).get("budget")
    parts = [f"{epochs:.1f} epochs" if budget else f"{epochs:g} epochs"] if epochs else []
    parts += [f"{count(round(images))} images"] if images else []
    parts += [duration(time)] if seconds and time else []
    return (f"{view_name(budget)}: " if budget and parts else "") + ", ".join(parts)


def how(runs: Sequence[Record]) -> str:
    """The precision that runs were trained in and whether compiled; each where they differ."""
    modes = (f"{r.pretrain.precision}{', compiled' if r.pretrain.compiled else ''}" for r in runs)
    return " or ".join(dict.fromkeys(modes))


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested tables as dotted names and printable values, in the order given."""
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, inner in value.items()
            for pair in flatten(inner, f"{name}.{key}" if name else str(key))
        ]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))]


def prose(docstring: str) -> list[list[str]]:
    """A docstring's paragraphs and list items, each as pieces of which every second was in ``code`` marks."""
    found = []
    for block in docstring.split("\n\n"):
        lines = textwrap.dedent(block).strip().splitlines()
        hanging = any(
            line.startswith(" ") for line in lines
        )  # then each line that is not indented opens an item
        items: list[str] = []
        for line in lines:
            if items and not (hanging and not line.startswith(" ")):
                items[-1] += f" {line.strip()}"
            else:
                items.append(" ".join(line.split()))
        found += [item.split("``") for item in items]
    return found


def page_name(text: str) -> str:
    """A file name without an ending, for any slug or id: short, safe on every system, and its own."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", text):
        return text
    return (
        f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:40] or 'x'}-{config.digest(text, length=8)}"
    )


# Pages ------------------------------------------------------------------------------------------------


def load(folder: Path) -> Source:
    """All records and speed comparisons of a results folder and all reported numbers; what cannot be read becomes
    a fault."""
    records, damaged = scan(folder)
    comparisons, unread = speed.scan(folder)
    faults: list[MimbenchError] = [*damaged, *unread]
    certificates: list[Certificate] = []
    try:
        certificates = certificate.certificates(folder)
    except DataError as fault:
        faults.append(fault)
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
    return Source(records, rows, texts, comparisons, certificates, catalogue)


def pages(source: Source, *, alone: bool = False) -> dict[str, bytes]:
    """The whole site: every file's path below its folder, and content; the front page ``alone`` needs no other."""
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
    names = sorted({*registry.protocols(), *(r.protocol.name for r in source.records)})
    newest = max(map(when, source.records), default=None)
    site = {
        "runs": len(source.records),
        "newest": newest,
        "methods": methods,
        "measured": len({r.method.slug for r in source.records}),
        "command": next((m["command"] for m in methods if not m["baseline"]), "mimbench list methods"),
    }
    found: dict[str, bytes] = {}
    inline = export.inline() if alone else None

    def add(path: str, template: str, **view: Any) -> None:
        root = "../" * path.count("/")
        shared = {"site": site, "root": root, "here": Path(path).stem, "inline": inline}
        found[path] = environment.get_template(template).render(shared, **view).encode()

    sections = [_section(name, [t for t in ranked if t.protocol == name]) for name in names]
    views = sorted({table.view for table in ranked}, key=view_order)
    shown = [section for section in sections if section["tables"]]
    add("index.html", "index.html", sections=shown, views=views, faults=source.faults)
    if alone:
        return {"index.html": export.unlink(found["index.html"].decode()).encode()}
    for table in ranked:
        found.update(export.files(table))
    add("about.html", "about.html")
    timed = speed_views(source.comparisons)
    bars = [
        bar | {k: found[k] for k in ("title", "anchor", "device")} for found in timed for bar in found["bars"]
    ]
    add("speed.html", "speed.html", comparisons=timed, bars=bars)
    papers = [_paper(paper, source) for paper in source.catalogue]
    add("papers.html", "papers.html", papers=papers)
    for paper in papers:
        if not paper["here"]:
            add(paper["href"], "paper.html", paper=paper)
    for section in sections:
        add(
            section["href"],
            "protocol.html",
            protocol=section,
            tables=section["tables"],
            settings=section["settings"],
        )
    own_citation = export.own_citation(len(source.records), newest)
    for method in methods:
        runs = [r for r in source.records if r.method.slug == method["slug"]]
        runs.sort(key=lambda r: (r.protocol.name, r.data.name, r.fingerprint, r.preset, r.seed, r.id))
        add(
            method["href"],
            "method.html",
            method=method,
            results=[run_view(run) for run in runs],
            reported=_numbers(method["slug"], source),
            charts=charts(runs),
            commands=list(dict.fromkeys(run.command for run in runs)),
            files=[{"name": view["file"], "href": view["href"]} for view in map(run_view, runs)],
            own_citation=own_citation,
        )
        found.update(method["files"])
        badge = export.badge(method["slug"], method["protocols"], ranked, method["parity"])
        add(method["badge"], "badge.svg", badge=badge)
    for run in source.records:
        view = run_view(run)
        add(view["href"], "run.html", run=view, **_run_parts(run))
    for file in sorted(paths.static().iterdir()):
        found[f"static/{file.name}"] = file.read_bytes()
    return found


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
    for file in sorted(f for f in card.folder.iterdir() if f.suffix.lower() in PICTURES):
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


def _paper(paper: reported.Paper, source: Source) -> dict[str, Any]:
    """A paper of the catalogue: what is here of it, and what it reports."""
    here = paper.slug in registry.methods()
    runs = [run for run in source.records if run.method.slug == paper.slug]
    numbers = _numbers(paper.slug, source)
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


def _numbers(slug: str, source: Source) -> list[dict[str, Any]]:
    return [reported_view(row) for row in source.papers if row["slug"] == slug]


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
    drawn = tuple(f"{name}." for name in _grids(run.details))
    parts = {
        "Evaluation": {"fingerprint": run.fingerprint, **dataclasses.asdict(run.protocol)},
        "Evaluation data": dataclasses.asdict(run.data),
        "Details": run.details,
        "Encoder": {"backbone": run.backbone, **dataclasses.asdict(run.encoder)},
        "Pretraining": dataclasses.asdict(run.pretrain),
        "Method": {**dataclasses.asdict(run.method), "preset": run.preset, "overrides": run.overrides},
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


# The command ------------------------------------------------------------------------------------------


def report(folder: Path, out: Path) -> Path:
    """Renders the records below ``folder`` into ``out`` and returns the path of its index.html.

    Files whose content would not change are left alone, and pages that a former call wrote for what is no
    longer recorded are removed. Raises ResultsError where ``out`` cannot be written.
    """
    source = load(folder)
    found = pages(source)
    listing = out / ".mimbench-pages"
    found[listing.name] = "".join(f"{path}\n" for path in sorted([*found, export.DATABASE])).encode()
    with _writing(out):
        former = listing.read_text(encoding="utf-8").split("\n") if listing.is_file() else []
        for path in set(former) - {*found, export.DATABASE, ""}:
            (out / path).unlink(missing_ok=True)
        for path, content in found.items():
            _write(out / path, content)
        database.publish(
            out / export.DATABASE, source.records, source.comparisons, source.catalogue, source.papers
        )
    return out / "index.html"


def single_file(folder: Path, file: Path) -> Path:
    """Renders the front page into one ``file``, which asks for nothing else, and returns its path.

    Raises ResultsError where it cannot be written.
    """
    content = pages(load(folder), alone=True)["index.html"]
    with _writing(file):
        _write(file, content)
    return file


def _write(file: Path, content: bytes) -> None:
    if not file.is_file() or file.read_bytes() != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise ResultsError(
            f"the report cannot be written to {out}: {fault.strerror}", "Choose another place"
        ) from None
