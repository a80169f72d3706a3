"""Methods side by side on the same test items: by how much one is better, whether that is chance, at what cost.

Nothing is computed where two runs do not allow it; the reason stands there instead.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mimbench import registry, stats
from mimbench.errors import ConfigError, UnknownName
from mimbench.record import Record, setting, stale, unpack
from mimbench.report.ranking import compared_by, machine, newest_per_seed
from mimbench.report.words import count, duration, flatten, ratio, when

PER_CLASS = ("accuracy", "iou", "j", "f", "pck")  # scores by class that protocols put in a record's details
SHOWN = 20  # classes of one table in the terminal
Printed = tuple[str, list[str], list[list[Any]]]  # title, columns, rows


@dataclass(frozen=True)
class Side:
    """What is compared: runs that are equal but for their seed, in order of seeds."""

    name: str
    runs: tuple[Record, ...]

    @property
    def first(self) -> Record:
        return self.runs[0]

    def value(self) -> tuple[float, float | None, float | None]:
        """The primary metric: mean and interval over seeds, or over test items for a single run."""
        score = self.first.score
        if len(self.runs) == 1:
            return score.value, score.low, score.high
        return stats.seed_interval([run.score.value for run in self.runs])


@dataclass
class Pair:
    """a beside b. Differences are a - b, cost ratios a / b."""

    a: str
    b: str
    obstacles: list[str]  # why there is no paired comparison
    paired: stats.Paired | None = None
    p_corrected: float | None = None
    classes: dict[str, dict[str, list[float]]] = field(
        default_factory=dict
    )  # [a, b, a - b], by detail and class
    seconds: float | None = None  # of the devices in pretraining
    images: float | None = None  # seen in pretraining
    cost_note: str = ""  # why a ratio is missing


@dataclass
class Comparison:
    """All pairs of the sides, and which of those a corrected test tells apart."""

    sides: list[Side]
    pairs: list[Pair]
    groups: dict[str, int]  # places, see stats.rank_groups; empty unless all pairs are comparable
    notes: list[str]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        sides = []
        for side in self.sides:
            value, low, high = side.value()
            sides.append(
                {
                    "name": side.name,
                    "method": side.first.method.slug,
                    "protocol": f"{side.first.protocol.name}:{side.first.protocol.recipe}",
                    "data": side.first.data.name,
                    "preset": side.first.preset,
                    "fingerprint": side.first.fingerprint,
                    "runs": {str(run.seed): run.id for run in side.runs},
                    "metric": side.first.primary,
                    **{"value": value, "low": low, "high": high, "unit": side.first.score.unit},
                    "group": self.groups.get(side.name),
                }
            )
        return {"sides": sides, "pairs": [asdict(pair) for pair in self.pairs], "notes": self.notes}

    def tables(self) -> list[Printed]:
        """For the terminal."""
        return [self._sides(), self._differences(), *itertools.chain(*map(_classes, self.pairs))]

    def _sides(self) -> Printed:
        rows = []
        for side in self.sides:
            value, low, high = side.value()
            first, pretrain = side.first, [run.pretrain for run in side.runs]
            rows.append(
                [
                    side.name,
                    f"{first.protocol.name}:{first.protocol.recipe}",
                    first.data.name,
                    first.preset,
                    " ".join(str(run.seed) for run in side.runs),
                    first.primary,
                    f"{value:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]"),
                    duration(statistics.mean(p.device_seconds for p in pretrain)),
                    count(round(statistics.mean(p.images for p in pretrain))),
                    self.groups.get(side.name),
                ]
            )
        columns = ["", "protocol", "data", "preset", "seeds", "metric", "value [95 % interval]"]
        return "What is compared", [*columns, "device time", "images seen", "rank group"], rows

    def _differences(self) -> Printed:
        several = sum(pair.paired is not None for pair in self.pairs)
        rows = []
        for pair in self.pairs:
            cost = [
                *("" if value is None else ratio(value) for value in (pair.seconds, pair.images)),
                pair.cost_note,
            ]
            if (found := pair.paired) is None or pair.p_corrected is None:
                said = ["not comparable", "", "", "", "; ".join(pair.obstacles)]
            else:
                interval = f"{found.low:+.2f} to {found.high:+.2f}"
                only = f"{found.only_a} / {found.only_b}"
                said = [f"{found.difference:+.2f}", interval, _p(pair.p_corrected), only, ""]
            rows.append(
                [f"{pair.a} - {pair.b}", *said[:4], *cost[:2], "; ".join(filter(None, [said[4], cost[2]]))]
            )
        p = f"p (Holm, of {several})" if several > 1 else "p"
        columns = ["pair", "difference", "paired 95 % interval", p, "only one right"]
        return (
            "In points of percent, and cost of pretraining",
            [*columns, "device time x", "images x", ""],
            rows,
        )


def _classes(pair: Pair) -> list[Printed]:
    found = []
    for name, cells in pair.classes.items():
        order = sorted(cells, key=lambda label: -abs(cells[label][2]))
        rows = [[c, f"{a:.1f}", f"{b:.1f}", f"{d:+.1f}"] for c in order[:SHOWN] for a, b, d in [cells[c]]]
        most = (
            f", the {SHOWN} largest of {len(cells)} differences (--json has all)"
            if len(cells) > SHOWN
            else ""
        )
        found.append((f"{name} by class{most}; without intervals", ["", pair.a, pair.b, "difference"], rows))
    return found


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def choose(
    names: Sequence[str],
    records: Sequence[Record],
    protocol: str | None = None,
    dataset: str | None = None,
    preset: str | None = None,
) -> list[Side]:
    """What each name stands for: the run whose id it begins, or a method's newest fresh runs.

    Of a method, ``protocol`` (NAME or NAME:RECIPE), ``dataset`` and ``preset`` narrow the choice. Where they
    leave several, that is a ConfigError which names them; of several settings the preset as it is goes before
    one changed with --set, and then the one that ran last counts, with all its seeds. Raises UnknownName for a
    name that is neither.
    """
    if len(set(names)) < max(2, len(names)):
        raise ConfigError("a comparison needs two different names or more")
    methods = {run.method.slug for run in records} | set(registry.methods())
    sides = []
    for name in names:
        if name in methods:
            own = [run for run in records if run.method.slug == name]
            sides.append(Side(name, tuple(_newest(name, own, protocol, dataset, preset))))
            continue
        found = [run for run in records if run.id.startswith(name)]
        if len(found) > 1:
            raise ConfigError(
                f"'{name}' begins {len(found)} runs", f"They are {', '.join(r.id for r in found)}"
            )
        if not found:
            raise UnknownName("run or method", name, [*methods, *(run.id for run in records)])
        sides.append(Side(f"{found[0].method.slug} {found[0].id[:6]}", (found[0],)))
    if len({side.name for side in sides}) < len(sides):
        raise ConfigError("a comparison needs two different names or more", "Two of these are the same run")
    return sides


def _newest(
    method: str, own: list[Record], protocol: str | None, dataset: str | None, preset: str | None
) -> list[Record]:
    def kind(run: Record) -> str:
        return f"{run.protocol.name}:{run.protocol.recipe} on {run.data.name} with preset {run.preset}"

    def listed(runs: Iterable[Record]) -> str:
        return "; ".join(sorted({kind(run) for run in runs})) or "none"

    fit = [
        run
        for run in own
        if protocol in (None, run.protocol.name, f"{run.protocol.name}:{run.protocol.recipe}")
        and dataset in (None, run.data.name)
        and preset in (None, run.preset)
    ]
    if not fit:
        raise ConfigError(f"no run of {method} fits", f"Recorded are: {listed(own)}")
    if len({kind(run) for run in fit}) > 1:
        raise ConfigError(
            f"{method} has several kinds of runs: {listed(fit)}",
            "Pick one with --protocol, --dataset and --preset, or name runs by their ids",
        )
    last = preferred(fit)
    return newest_per_seed(run for run in fit if alike(run) == alike(last))


def preferred(runs: Iterable[Record]) -> Record:
    """The run that speaks for a method: a fresh one, of the preset as it is, the last."""
    return max(runs, key=lambda run: (not stale(run), not run.overrides, when(run)))


def alike(run: Record) -> tuple[str, ...]:
    """What two runs share that differ by their seed alone."""
    return setting(run), run.fingerprint, compared_by(run)


def compare(sides: Sequence[Side]) -> Comparison:
    """All pairs of ``sides``, with p values corrected for their number (Holm)."""
    places = list(itertools.combinations(range(len(sides)), 2))
    pairs = [_pair(sides[i], sides[j]) for i, j in places]
    tested = [(pair, pair.paired.p) for pair in pairs if pair.paired]
    for (pair, _), p in zip(tested, stats.holm([p for _, p in tested]), strict=True):
        pair.p_corrected = p
    groups: dict[str, int] = {}
    if len(tested) == len(pairs):
        separated = np.zeros((len(sides), len(sides)), bool)
        for (i, j), pair in zip(places, pairs, strict=True):
            separated[i, j] = separated[j, i] = pair.p_corrected is not None and pair.p_corrected < 0.05
        found = stats.rank_groups([side.value()[0] for side in sides], separated)
        groups = {side.name: place for side, place in zip(sides, found, strict=True)}
    return Comparison(list(sides), pairs, groups, _notes(sides, pairs))


def _pair(a: Side, b: Side) -> Pair:
    pair = Pair(a.name, b.name, [])
    _set_cost(pair, a, b)
    pair.obstacles += _other_yardstick(a.first, b.first)
    if pair.obstacles:
        return pair
    runs_a, runs_b = _same_seeds(a, b)
    if not runs_a:
        pair.obstacles.append("they have no seed in common")
        return pair
    pair.classes = _by_class(runs_a, runs_b)
    for side, runs in ((a, runs_a), (b, runs_b)):
        pair.obstacles += dict.fromkeys(f"{side.name} {fault}" for fault in map(unusable, runs) if fault)
    if not pair.obstacles:
        bits = [[unpack(run.correct or "") for run in runs] for runs in (runs_a, runs_b)]
        lengths = sorted({len(row) for rows in bits for row in rows})
        if len(lengths) > 1:
            pair.obstacles.append(f"other test items: {' and '.join(map(count, lengths))}")
        else:
            pair.paired = stats.paired(np.stack(bits[0]), np.stack(bits[1]))
    return pair


def _same_seeds(a: Side, b: Side) -> tuple[list[Record], list[Record]]:
    """The runs of both under the seeds that both have; a run each pairs whatever the seeds."""
    if len(a.runs) == len(b.runs) == 1:
        return list(a.runs), list(b.runs)
    of_b = {run.seed: run for run in b.runs}
    both = [(run, of_b[run.seed]) for run in a.runs if run.seed in of_b]
    return [run for run, _ in both], [run for _, run in both]


def _other_yardstick(a: Record, b: Record) -> list[str]:
    """In what two runs were scored differently; empty where their numbers may stand beside each other."""
    found = []
    if a.protocol.name != b.protocol.name:
        found.append(f"other protocol: {a.protocol.name} and {b.protocol.name}")
    if a.data.fingerprint != b.data.fingerprint:
        names = (
            f"{a.data.name} and {b.data.name}"
            if a.data.name != b.data.name
            else f"two states of {a.data.name}"
        )
        found.append(f"other test items: {names}")
    if found or a.fingerprint == b.fingerprint:
        return found
    if a.protocol.version != b.protocol.version:
        found.append(f"versions {a.protocol.version} and {b.protocol.version} of {a.protocol.name}")
    ours, theirs = (dict(flatten(run.protocol.settings)) for run in (a, b))
    ours["input size"], theirs["input size"] = str(a.encoder.input_size), str(b.encoder.input_size)
    differ = [
        f"{name} {ours.get(name, 'unset')} and {theirs.get(name, 'unset')}"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    ]
    return [f"other fingerprint: {', '.join([*found, *differ])}"]


def unusable(run: Record) -> str | None:
    """Why a run cannot be compared item by item, or None. Raises ResultsError for a damaged list of its items."""
    if run.correct is None:
        return f"has no per-image correctness of {run.primary}"
    bits = unpack(run.correct)
    if len(bits) and abs(100 * bits.mean() - run.score.value) > 0.01:
        return f"has per-image correctness that does not make up its {run.primary}"
    return None


def _by_class(a: Sequence[Record], b: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Means over the runs, where all of them have a number for the class."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in PER_CLASS:
        tables = [[run.details.get(name) for run in runs] for runs in (a, b)]
        if not all(isinstance(table, dict) for table in itertools.chain(*tables)):
            continue
        for label in tables[0][0] or {}:
            values = [[(table or {}).get(label) for table in side] for side in tables]
            if all(isinstance(v, int | float) for v in itertools.chain(*values)):
                ours, theirs = (statistics.mean(v for v in side if v is not None) for side in values)
                found.setdefault(name, {})[label] = [ours, theirs, ours - theirs]
    return found


def _set_cost(pair: Pair, a: Side, b: Side) -> None:
    """Ratios of what pretraining took; time only between equal machines."""
    idle = [side.name for side in (a, b) if not all(run.pretrain.images for run in side.runs)]
    if idle:
        pair.cost_note = f"nothing was pretrained here for {' and '.join(idle)}"
        return
    pair.images = _mean(a, "images") / _mean(b, "images")
    machines = {machine(run) for run in (*a.runs, *b.runs)}
    if len(machines) > 1:
        pair.cost_note = f"device times are of different machines: {' and '.join(sorted(machines))}"
    elif (theirs := _mean(b, "device_seconds")) > 0:
        pair.seconds = _mean(a, "device_seconds") / theirs


def _mean(side: Side, name: str) -> float:
    return statistics.mean(float(getattr(run.pretrain, name)) for run in side.runs)


def _notes(sides: Sequence[Side], pairs: Sequence[Pair]) -> list[str]:
    """What a reader must know beside the numbers."""
    notes = []
    for side in sides:
        if reasons := dict.fromkeys(filter(None, map(stale, side.runs))):
            notes.append(f"{side.name} is stale: {'; '.join(reasons)}")
        if changed := ", ".join(f"{name}={value}" for name, value in flatten(side.first.overrides) if name):
            notes.append(f"{side.name} was run with {changed}")
    facts = {
        "pretraining data": [
            side.first.pretrain.dataset if side.first.pretrain.images else "none" for side in sides
        ],
        "backbones": [side.first.backbone for side in sides],
        "rules of training": [compared_by(side.first) for side in sides],
    }
    for what, values in facts.items():
        if len(set(values)) > 1:
            each = ", ".join(f"{side.name} {value}" for side, value in zip(sides, values, strict=True))
            notes.append(f"{what} differ: {each}")
    tested = [pair.paired for pair in pairs if pair.paired]
    if any(found.seeds == 1 for found in tested):
        notes.append(
            "a pair of single runs is compared over test images alone (McNemar's exact test): that says nothing"
            " about another seed"
        )
    if several := sorted({found.seeds for found in tested if found.seeds > 1}):
        notes.append(
            f"{' or '.join(map(str, several))} seeds in common: intervals cover seeds and test images"
        )
    return notes
