"""Verdicts: whether each number that a paper reports holds here, by a test whose margin was stated beforehand.

A number is judged only by runs of its own setting; then our mean over seeds against the number gives one of

- ``reproduced``: two one-sided t tests at 5 % each (TOST, Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987) find it
  within the margin;
- ``different``: our 95 % interval lies wholly beyond the margin;
- ``undecided``: neither, as the interval reaches over the margin's edge, or there is one seed only.

Anything else is ``untestable``, with the reason. The reported number counts as fixed: few papers say how their own runs
scatter. One seed decides nothing, not even where the paper's number is one run too: its interval is over test
images, which both share, and another pretraining might differ from it by more than the margin. Each verdict is a
claim of its own, so that of a hundred tests of numbers at the margin's edge up to five come out wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mimbench import registry, reported, stats
from mimbench.record import Record, stale
from mimbench.task import Metric

VERDICTS = {
    "reproduced": "our mean over seeds lies within the margin",
    "different": "our 95 % interval lies wholly beyond the margin",
    "undecided": "the setting is the same, but our runs decide neither",
    "untestable": "nothing here has the number’s setting",
}
REASONS = {
    "method": "the method is not here yet",
    "protocol": "this suite has no such protocol",
    "run": "no run under this protocol yet",
    "setting": "our runs have another setting",
    "several": "its source gives other numbers too for what we know of the setting",
    "one seed": "one seed says nothing of another pretraining",
    "wide": "the interval reaches over the margin’s edge",
    "within": "the interval lies within the margin",
    "beyond": "the interval lies beyond the margin",
}

# The margins ------------------------------------------------------------------------------------------

VERSION = 1  # of the margins: raised with any change, so that no verdict moves unseen
POINTS = {"%": 1.0, "AP": 1.0, "points": 1.0, "fraction": 0.01}
NEAR_END = 0.1  # share of the distance to 0 or 100 that a margin in points may be at most
OPEN = frozenset({"mce"})  # percentages that may exceed 100, so that it is no end
RELATIVE = 0.05  # of the number, in any other unit
MACHINE = frozenset({"s", "h", "min", "GPU h", "images/s", "fps", "GB", "MB", "x"})
RULES = (
    (
        "Percentages and AP",
        "1 point; 0.01 of a fraction",
        "Papers print one decimal and call a point progress: a wider margin would take a rival’s number for a "
        "reproduction, and a narrower one would ask for more seeds than anyone runs.",
    ),
    (
        "Percentages near their ends",
        "a tenth of the distance to 0 or 100, where that is less than a point",
        "Of a method that is right on 99.5 %, a point is twice all of its errors.",
    ),
    ("Any other unit", "5 % of the number", "Such as FID, whose size depends on data and network."),
    (
        "Times, speeds and memory",
        "none",
        "They are the machine’s as much as the method’s, so that no number of another machine is judged.",
    ),
)


def margin(theirs: reported.Row) -> float:
    """By how much our mean may differ from a reported number, in its unit."""
    value, unit = theirs["value"], theirs["unit"]
    if unit not in POINTS:
        return RELATIVE * abs(value)
    points, whole = POINTS[unit], 1.0 if unit == "fraction" else 100.0
    if not 0 <= value <= whole or _plain(theirs["metric"]) in OPEN:
        return points
    return min(points, NEAR_END * min(value, whole - value))


# The setting ------------------------------------------------------------------------------------------

# Settings of a run that are compared under another name, or that leave what is trained as it is.
_NEUTRAL = frozenset(
    {"weights", "name", "recipe.epochs", "recipe.budget", "recipe.accumulate", "recipe.checkpoint_minutes"}
    | {"recipe.compile", "recipe.precision"}
)


@dataclass(frozen=True)
class Setting:
    """What must be alike before a number of ours and one of a paper may be compared."""

    metric: str
    data: str  # scored on
    pretrain_data: str
    backbone: str
    image_size: int
    recipe: str
    epochs: float
    unit: str
    changed: tuple[str, ...] = ()  # settings of the method that differ from its preset, as key=value


def differences(ours: Setting, theirs: reported.Row) -> dict[str, tuple[str, str]]:
    """In what a reported number's setting is not ours, or not known to be: the name, ours and theirs.

    Empty where the two may be compared.
    """
    # A paper evaluates by its own recipe, rivals too: ours is that one where it bears the paper's name.
    pairs: dict[str, tuple[Any, Any]] = {
        "metric": (ours.metric, theirs["metric"]),
        "evaluation data": (ours.data, theirs["dataset"]),
        "pretraining data": (ours.pretrain_data, theirs["pretrain_data"]),
        "backbone": (ours.backbone, theirs["backbone"]),
        "image size": (str(ours.image_size), theirs["image_size"]),
        "recipe": (ours.recipe, theirs["slug"]),
    }
    found = {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}
    epochs = theirs["pretrain_epochs"]
    if ours.epochs != epochs:
        found["epochs"] = (f"{ours.epochs:g}", None if epochs is None else f"{epochs:g}")
    if (ours.unit or None) != theirs["unit"]:
        found["unit"] = (ours.unit or "none", theirs["unit"])
    if ours.changed:
        found["settings"] = (", ".join(ours.changed), "the paper’s")
    if theirs["unit"] in MACHINE:
        found["machine"] = ("ours", "another")
    return {name: (our, their or "not said") for name, (our, their) in found.items()}


def changed(overrides: Mapping[str, Any], name: str = "") -> tuple[str, ...]:
    """The overrides (nested tables) that make a run another than its preset's, as key=value."""
    found: list[str] = []
    for key, value in overrides.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            found += changed(value, path)
        elif path not in _NEUTRAL:
            found.append(f"{path}={value}")
    return tuple(found)


def _plain(name: str | None) -> str:
    """A name without case and punctuation: cifar-10 and cifar10 are one data set."""
    plain = re.sub(r"[^a-z0-9]", "", (name or "").lower())
    return {"imagenet": "imagenet1k", "resnet18cifarstem": "resnet18cifar"}.get(plain, plain)


# The verdict ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A method in one setting under one recipe: the newest run of each seed."""

    method: str
    protocol: str
    preset: str
    setting: Setting  # with the metric that ranks
    seeds: tuple[int, ...]
    runs: tuple[str, ...]  # ids, in the order of seeds
    stale: str  # why, or ""
    scores: dict[str, tuple[Metric, ...]]  # of each metric that all runs have, by seed


def measured(runs: Sequence[Record]) -> Measured:
    """Runs that differ by their seed alone."""
    first = runs[0]
    return Measured(
        method=first.method.slug,
        protocol=first.protocol.name,
        preset=first.preset,
        setting=Setting(
            metric=first.primary,
            data=first.data.name,
            pretrain_data=first.pretrain.dataset,
            backbone=first.backbone,
            image_size=first.encoder.input_size,
            recipe=first.protocol.recipe,
            epochs=sum(run.pretrain.epochs for run in runs) / len(runs),
            unit=first.score.unit,
            changed=changed(first.overrides),
        ),
        seeds=tuple(run.seed for run in runs),
        runs=tuple(run.id for run in runs),
        stale="; ".join(dict.fromkeys(filter(None, map(stale, runs)))),
        scores=scores([run.metrics for run in runs]),
    )


def scores(runs: Sequence[Mapping[str, Metric]]) -> dict[str, tuple[Metric, ...]]:
    """The metrics that all runs have, each with one entry a run."""
    return {name: tuple(run[name] for run in runs) for name in runs[0] if all(name in run for run in runs)}


# Of a verdict's content(), with their types in SQL.
COLUMNS = {
    **dict.fromkeys(("slug", *reported.COLUMNS), "VARCHAR"),
    **dict.fromkeys(("value", "pretrain_epochs"), "DOUBLE"),
    **dict.fromkeys(("verdict", "reason", "said", "differences"), "VARCHAR"),
    **dict.fromkeys(("preset", "recipe", "our_metric", "our_unit"), "VARCHAR"),
    **dict.fromkeys(("ours", "low", "high"), "DOUBLE"),  # the nearest; comparable where nothing differs
    **{"seeds": "BIGINT", "stale": "VARCHAR"},
    **dict.fromkeys(("margin", "difference", "difference_low", "difference_high"), "DOUBLE"),
    **dict.fromkeys(("p_within", "p_beyond"), "DOUBLE"),
}


@dataclass(frozen=True)
class Verdict:
    """What can be said here of one reported number."""

    theirs: reported.Row
    verdict: str  # a key of VERDICTS
    reason: str  # a key of REASONS
    ours: Measured | None = None  # the nearest; of another setting where differences says so
    metric: str = ""  # of ours; the reported one wherever our runs have it
    unit: str = ""
    differences: dict[str, tuple[str, str]] | None = None  # name: ours and theirs
    mean: float | None = None
    low: float | None = None  # 95 %, over seeds, or over test images for one seed
    high: float | None = None
    # Where nothing differs:
    margin: float | None = None
    difference: float | None = None  # ours - reported
    test: stats.Equivalence | None = None  # where there are two seeds or more

    @property
    def said(self) -> str:
        """The reason in words."""
        if self.reason == "setting":
            return f"other {', '.join(self.differences or ())}"
        return REASONS[self.reason]

    def content(self) -> dict[str, Any]:
        """For JSON and tables: flat, with COLUMNS as names, None for what does not apply."""
        ours, test = self.ours, self.test
        told = self.differences or {}
        return {
            **self.theirs,
            "verdict": self.verdict,
            "reason": self.reason,
            "said": self.said,
            "differences": "; ".join(
                f"{name}: ours {our}, theirs {their}" for name, (our, their) in told.items()
            )
            or None,
            "preset": ours.preset if ours else None,
            "recipe": ours.setting.recipe if ours else None,
            "our_metric": self.metric or None,
            "our_unit": self.unit or None,
            "ours": self.mean,
            "low": self.low,
            "high": self.high,
            "seeds": len(ours.seeds) if ours else None,
            "stale": (ours.stale or None) if ours else None,
            "margin": self.margin,
            "difference": self.difference,
            "difference_low": test.low if test else None,
            "difference_high": test.high if test else None,
            "p_within": test.p_within if test else None,
            "p_beyond": test.p_beyond if test else None,
        }


def verdicts(numbers: Sequence[reported.Row], rows: Iterable[Measured]) -> list[Verdict]:
    """A verdict on every reported number, in their order."""
    known: dict[tuple[str, str], list[Measured]] = {}
    for row in rows:
        known.setdefault((row.method, row.protocol), []).append(row)
    values: dict[tuple[Any, ...], set[float]] = {}
    for theirs in numbers:
        values.setdefault(_as_told(theirs), set()).add(theirs["value"])
    return [
        judge(
            theirs, known.get((theirs["method"], theirs["protocol"]), ()), len(values[_as_told(theirs)]) > 1
        )
        for theirs in numbers
    ]


def counts(found: Iterable[Verdict]) -> dict[tuple[str, str], int]:
    """How many numbers have each verdict for each reason; in the order of VERDICTS and REASONS."""
    held = Counter((each.verdict, each.reason) for each in found)
    order = ((kind, reason) for kind in VERDICTS for reason in REASONS)
    return {key: held[key] for key in order if key in held}


def _as_told(theirs: reported.Row) -> tuple[Any, ...]:
    """All that is held of a number but its value and place: equal where only the source tells two apart."""
    return tuple(cell for name, cell in theirs.items() if name not in ("value", "locator"))


def judge(theirs: reported.Row, rows: Sequence[Measured], several: bool = False) -> Verdict:
    """The verdict on one number, by the nearest of our ``rows`` of its method and protocol.

    ``several`` says that its source has other values for all that is known of the setting.
    """
    if not rows:
        if theirs["method"] not in registry.methods():
            return Verdict(theirs, "untestable", "method")
        return Verdict(
            theirs, "untestable", "run" if theirs["protocol"] in registry.protocols() else "protocol"
        )
    nearest = min((_beside(theirs, row) for row in rows), key=_distance)
    assert nearest.ours is not None
    if nearest.differences:
        return nearest
    if several:
        return replace(nearest, reason="several")
    values = [score.value for score in nearest.ours.scores[nearest.metric]]
    allowed = margin(theirs)
    found = replace(
        nearest,
        verdict="undecided",
        reason="one seed",
        margin=allowed,
        difference=sum(values) / len(values) - theirs["value"],
    )
    if len(values) == 1:
        return found
    test = stats.equivalence(values, theirs["value"], allowed)
    if test.p_within < stats.ALPHA:
        return replace(found, verdict="reproduced", reason="within", test=test)
    if test.p_beyond < stats.ALPHA:
        return replace(found, verdict="different", reason="beyond", test=test)
    return replace(found, reason="wide", test=test)


def _beside(theirs: reported.Row, row: Measured) -> Verdict:
    """A row beside a number, untested."""
    wanted = _plain(theirs["metric"])
    metric = next((name for name in row.scores if _plain(name) == wanted), row.setting.metric)
    found = row.scores[metric]
    unit = found[0].unit
    mean, low, high = stats.seed_interval([score.value for score in found])
    if len(found) == 1:
        low, high = found[0].low, found[0].high
    other = differences(replace(row.setting, metric=metric, unit=unit), theirs)
    return Verdict(theirs, "untestable", "setting", row, metric, unit, other, mean, low, high)


# What brings a number nearest, of settings that differ in equally much.
_ORDER = ("metric", "unit", "evaluation data", "pretraining data", "backbone", "image size", "recipe")


def _distance(beside: Verdict) -> tuple[Any, ...]:
    row, other = beside.ours, beside.differences or {}
    assert row is not None
    epochs = beside.theirs["pretrain_epochs"]
    return (
        len(other),
        *(name in other for name in _ORDER),
        bool(row.stale),
        0.0 if epochs is None else abs(row.setting.epochs - epochs),
        -len(row.seeds),
        row.runs,
    )
