"""Rankings: which rows may stand in one table, their order, and what their papers say."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimbench import config, registry, reported, verdict
from mimbench.record import Record, setting, stale
from mimbench.report.words import EPOCHS, effort, flatten, how, number, page_name, when

STRIP = 176.0  # width of the drawing of one score, in SVG units
LOWER_IS_BETTER = re.compile(r"distance|mce|error|loss|latency|memory|seconds|flops|parameters")


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
    ours = verdict.Setting(
        metric=table.metric,
        data=table.data,
        pretrain_data=row.dataset,
        backbone=row.backbone,
        image_size=row.runs[0].encoder.input_size,
        recipe=table.recipe,
        epochs=row.epochs,
        unit=row.unit,
        changed=verdict.changed(row.runs[0].overrides),
    )
    return list(verdict.differences(ours, theirs))


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
