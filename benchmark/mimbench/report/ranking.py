"""Rankings: which rows may stand in one table, their order, and what their papers say."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mimbench import config, registry, reported, stats, verdict
from mimbench.errors import ResultsError
from mimbench.record import Record, setting, stale, unpack
from mimbench.report.words import EPOCHS, effort, flatten, how, number, page_name, when

if TYPE_CHECKING:
    import numpy as np

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
    changed: str = ""  # of the preset, beside the budget and what all rows share
    order: int = 0  # position in the table
    rank: str = ""  # "2", or "2–4" where no test settles the place
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
    n: int | None  # test images there are
    over: int | None  # items that a score and its interval are over: images, clips, repeats; None: those
    metric: str
    unit: str
    lower: bool  # lower is better
    view: str  # by what its rows may be compared, see compared_by()
    rows: list[Row]
    shared: str = ""  # changes of presets that all trained rows have in common
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
    budget = record.budget
    if not budget or str(budget).endswith("img"):
        return str(budget or EPOCHS)
    return f"{budget} on {machine(record)}"


def machine(record: Record) -> str:
    """The device that a run was made on, and how many threads it had: times of two of them are not comparable."""
    facts = record.environment
    if facts.get("device") != "cpu" and facts.get("gpu"):
        return str(facts["gpu"])
    return f"{facts.get('cpu') or 'an unnamed processor'}, threads: {facts.get('threads')}"


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
        over=first.score.n if first.score.n != first.data.n_test else None,
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
    table.shared, changed = factor_out(table.rows)
    for row, own in zip(table.rows, changed, strict=True):
        row.changed = own
    rank(table.rows, table.lower)
    _draw(table)
    for row in table.rows:
        _set_beside(row, table, papers)
    return table


def factor_out(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What all trained rows change of their presets, to be said once, and what each changes beside it.

    The budget is the view's name, and said in neither.
    """
    own = [dict(flatten(row.runs[0].overrides)) for row in rows]
    trained = [changes for row, changes in zip(rows, own, strict=True) if row.pretrained]
    together = set(trained[0].items()).intersection(*(each.items() for each in trained)) if trained else set()

    def text(pairs: Iterable[tuple[str, str]]) -> str:
        return ", ".join(f"{name}={value}" for name, value in pairs if name and name != "recipe.budget")

    return text(sorted(together)), [text(p for p in each.items() if p not in together) for each in own]


def newest_per_seed(runs: Iterable[Record]) -> list[Record]:
    """The newest run of each seed, in order of seeds; stale ones only where all are stale.

    A mean never mixes runs of today's code with runs of another.
    """
    runs = list(runs)
    fresh = [run for run in runs if not stale(run)]
    newest = {run.seed: run for run in sorted(fresh or runs, key=when)}
    return [newest[seed] for seed in sorted(newest)]


def _row(runs: list[Record]) -> Row:
    runs = newest_per_seed(runs)
    first = runs[0]
    mean, low, high = stats.seed_interval([run.score.value for run in runs])
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
    """Places as ranges over ``rows`` sorted best first: "2–4" where no test puts it before the fourth, or after the
    second. Baselines are neither placed nor counted.

    Only what a test tells apart, corrected for the number of pairs of the table, is before another: see ``separated``.
    """
    placed = [row for row in rows if not row.role]
    for order, row in enumerate(rows, 1):
        row.order = order
    if len(placed) < 2:
        for row in placed:
            row.rank = "–"
        return
    apart = separated(placed)
    for i, row in enumerate(placed):
        better = [other.mean < row.mean if lower else other.mean > row.mean for other in placed]
        best = 1 + sum(far and is_better for far, is_better in zip(apart[i], better, strict=True))
        worst = len(placed) - sum(
            far and not is_better for far, is_better in zip(apart[i], better, strict=True)
        )
        row.rank = str(best) if best == worst else f"{best}–{worst}"
        row.tied = i > 0 and not apart[i - 1][i]


def separated(rows: Sequence[Row]) -> np.ndarray:
    """(R, R) bool: which pairs of rows a test tells apart at 5 % over all pairs of the table (Holm).

    Test items are compared in pairs where each run says which it has right (``stats.paired``), over the seeds that
    both have. Else the seeds are compared (Welch), or for single runs the intervals. What cannot be tested is
    not told apart.
    """
    import numpy as np

    p = p_values(rows)
    upper = np.triu_indices(len(rows), 1)
    tested = ~np.isnan(p[upper])
    found = np.zeros(p.shape, bool)
    chosen = upper[0][tested], upper[1][tested]
    found[chosen] = np.array(stats.holm(p[chosen].tolist())) < 0.05
    return found | found.T


def p_values(rows: Sequence[Row]) -> np.ndarray:
    """(R, R) p values of no difference, upper half; NaN where two rows cannot be tested."""
    import numpy as np

    p = np.full((len(rows), len(rows)), np.nan)
    bits = [row_bits(row.runs) for row in rows]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (row, found) in enumerate(zip(rows, bits, strict=True)):
        if found is not None and found.shape[1] > 1:
            seeds = row.seeds if len(row.seeds) > 1 else "one"  # a run each pairs whatever the seeds
            alike.setdefault((seeds, found.shape[1]), []).append(i)
    for members in alike.values():
        p[np.ix_(members, members)] = stats.pairwise(
            np.stack([held for i in members if (held := bits[i]) is not None])
        )
    for i, j in itertools.combinations(range(len(rows)), 2):
        if math.isnan(p[i, j]):
            p[i, j] = _p_of(rows[i], rows[j], bits[i], bits[j])
    return p


def _p_of(a: Row, b: Row, right_a: np.ndarray | None, right_b: np.ndarray | None) -> float:
    if right_a is not None and right_b is not None and right_a.shape[1] == right_b.shape[1]:
        common = [seed for seed in a.seeds if seed in b.seeds]
        picked = [
            right[[row.seeds.index(seed) for seed in common]] for row, right in ((a, right_a), (b, right_b))
        ]
        return stats.paired(*picked).p if common and right_a.shape[1] > 1 else math.nan
    halves = [_half(row, other.mean) for row, other in ((a, b), (b, a))]
    values = [[run.score.value for run in row.runs] for row in (a, b)]
    found = stats.unpaired(values[0], values[1], *halves)
    return math.nan if found is None else found


def _half(row: Row, towards: float) -> float | None:
    """The half of a row's interval that faces another mean."""
    if row.low is None or row.high is None:
        return None
    return row.high - row.mean if towards > row.mean else row.mean - row.low


def row_bits(runs: Sequence[Record]) -> np.ndarray | None:
    """(S, N) bool: what each run has right; None where one does not say, or says what makes up another score."""
    import numpy as np

    found = []
    for run in runs:
        if run.correct is None:
            return None
        try:
            bits = unpack(run.correct)
        except ResultsError:  # the comparison page says so
            return None
        if not len(bits) or abs(100 * bits.mean() - run.score.value) > 0.01:
            return None
        found.append(bits)
    return np.stack(found) if len({len(bits) for bits in found}) == 1 else None


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
