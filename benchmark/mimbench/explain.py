"""Why two ways of scoring one encoder differ: a walk from one's settings to the other's, with points for each.

Only settings of a protocol can be walked, on the frozen features of one encoder and the same test images. Whatever
else two numbers differ in (weights, data, a paper's own code) is named, and gets no points.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mimbench import config, registry, reported, runner, score, stats, verdict
from mimbench import weights as published
from mimbench.environment import environment, git
from mimbench.errors import ConfigError, ResultsError, UnknownName
from mimbench.explanation import Apart, End, Explanation, Gap, Part, Stop, shares, ways
from mimbench.progress import Progress
from mimbench.record import Record, method_code, protocol_code, stale, unpack
from mimbench.report import ranking
from mimbench.report.words import flatten
from mimbench.task import Metric, Result
from mimbench.walk import FEW, Walk, differing, leaves, walk

# What is explained -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way of scoring: a recipe, or what a recorded run did."""

    name: str  # "knn:dino", or "run 1a2b3c4d5e6f"
    settings: Any  # of the protocol
    run: Record | None = None


@dataclass(frozen=True)
class Ground:
    """What both ways are tried on: frozen features of one encoder, or of a file."""

    protocol: str
    encoder: str  # for people
    key: str
    method: str  # slug, or empty
    data: str
    data_fingerprint: str
    note: str
    score: Callable[[Any], Result]
    reads: Callable[[], int] = lambda: 0  # of the labels of a data set's test split, so far


@dataclass(frozen=True)
class Question:
    """What the command line asks."""

    a: str  # a recipe such as "knn:dino", or a run's id or its beginning
    b: str  # likewise, or "reported", or "reported:N"
    features: Path | None = None  # an .npz as "mimbench score" takes it
    method: str | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    preset: str | None = None
    seed: int | None = None  # none: 0
    overrides: tuple[str, ...] = ()
    weights: Path | None = None
    device: str = "auto"

    @property
    def encoder_given(self) -> bool:
        """Whether options say what is scored."""
        options = self.method, self.dataset, self.eval_dataset, self.preset, self.seed, self.weights
        return bool(self.overrides) or any(option is not None for option in options)

    @property
    def command(self) -> str:
        """What asks the same again."""
        words = ["mimbench", "explain", self.a, self.b]
        options = {
            "--features": self.features,
            "--method": self.method,
            "--dataset": self.dataset,
            "--eval-dataset": self.eval_dataset,
            "--preset": self.preset,
            "--weights": self.weights,
            "--seed": self.seed,
        }
        for option, value in options.items():
            words += [] if value is None else [option, str(value)]
        for item in self.overrides:
            words += ["--set", item]
        return shlex.join(words)


def explain(question: Question, records: Sequence[Record], progress: Progress) -> Explanation:
    """Answers a question; ``records`` are those that runs are looked up in.

    Raises ConfigError and UnknownName for what cannot be explained, with the reason.
    """
    began = time.perf_counter()
    if question.a.partition(":")[0] == "reported":
        raise ConfigError(
            "a run comes before the number it is set beside", f"Swap {question.a} and {question.b}"
        )
    if question.b.partition(":")[0] == "reported":
        run = None if _is_recipe(question.a) else _run(question.a, records)
        if run is None or question.features or question.encoder_given:
            raise ConfigError(
                "only a run can be set beside a reported number", "Name one: see 'mimbench list runs'"
            )
        return _beside_a_paper(question, run)
    texts = question.a, question.b
    runs = [None if _is_recipe(text) else _run(text, records) for text in texts]
    names = [
        run.protocol.name if run else text.partition(":")[0] for run, text in zip(runs, texts, strict=True)
    ]
    if names[0] != names[1]:
        raise ConfigError(f"no path of settings leads from {names[0]} to {names[1]}: they are two protocols")
    module = registry.load_protocol(names[0])
    idle = getattr(module, "idle", lambda settings: ())
    apart = [] if runs[0] is None or runs[1] is None else _apart(runs[0], runs[1])
    if apart and runs[0] is not None:
        a, b = (_way(text, names[0], run) for text, run in zip(texts, runs, strict=True))
        if not differing(a.settings, b.settings, idle)[0]:  # nothing needs to be scored
            found = Walk([], {frozenset(): _as_recorded(runs[0])}, [], [])
            return _explanation(question.command, _recorded_ground(runs[0]), a, b, found, apart, 0.0)
    ground, (a, b) = _prepare(question, names[0], runs, progress)
    found = walk(a.settings, b.settings, ground.score, idle, progress)
    if not found.parts and not apart:
        same = f" but for {', '.join(found.idle)}, which moves nothing here" if found.idle else ""
        raise ConfigError(f"{a.name} and {b.name} score in the same way{same}: there is nothing to explain")
    return _explanation(question.command, ground, a, b, found, apart, time.perf_counter() - began)


def _as_recorded(run: Record) -> Result:
    correct = None if run.correct is None else unpack(run.correct)
    return Result(run.metrics, run.primary, run.details, correct)


def _explanation(
    command: str, ground: Ground, a: Way, b: Way, found: Walk, apart: list[Apart], seconds: float
) -> Explanation:
    first, last = found.ends
    metric = first.primary
    bits = {held: _bits(result) for held, result in found.results.items()}
    if apart and b.run is not None:  # other weights: the second number is the recorded one
        last = _as_recorded(b.run)
    comparable = not any(item.why in (IMAGES, METRICS) for item in apart)
    values = {held: result.metrics[metric].value for held, result in found.results.items()}
    points = shares(values, len(found.parts))
    intervals: list[tuple[float | None, float | None]] = [(None, None)] * len(found.parts)
    if all(held is not None for held in bits.values()):
        by_item = shares({held: np.asarray(one, np.float64) for held, one in bits.items()}, len(found.parts))
        intervals = [(100 * low, 100 * high) for low, high in map(stats.bootstrap, by_item)]
    tables = [leaves(config.to_dict(way.settings)) for way in (a, b)]
    module = registry.protocol(ground.protocol)
    return Explanation(
        command=command,
        protocol=ground.protocol,
        version=module.version,
        protocol_code=protocol_code(ground.protocol),
        method=ground.method,
        method_code=method_code(ground.method) if ground.method else "",
        encoder=ground.encoder,
        key=ground.key,
        data=ground.data,
        data_fingerprint=ground.data_fingerprint,
        note=ground.note,
        n=first.metrics[metric].n,
        metric=metric,
        unit=first.metrics[metric].unit,
        a=_end(a.name, config.to_dict(a.settings), first, a.run),
        b=_end(b.name, config.to_dict(b.settings), last, b.run),
        gap=_gap(first, last) if comparable else _UNKNOWN,
        parts=[
            Part({name: [table[name] for table in tables] for name in names}, gained, low, high)
            for names, gained, (low, high) in zip(found.parts, points, intervals, strict=True)
        ],
        stops=[Stop(sorted(held), values[held]) for held in found.results],
        apart=apart,
        notes=[*_notes(ground.protocol, found), *_of_runs((a, b), (first, last))],
        test_reads=ground.reads(),
        seconds=round(seconds, 3),
        environment=environment(),
        git=git(),
    )


_UNKNOWN = Gap(None, None, None, None, None, None)


def _gap(a: Result, b: Result) -> Gap:
    points = b.metrics[b.primary].value - a.metrics[a.primary].value
    right = [_bits(result) for result in (a, b)]
    if right[0] is None or right[1] is None or len(right[0]) != len(right[1]) or len(right[0]) < 2:
        return replace(_UNKNOWN, points=points)
    paired = stats.paired(right[1], right[0])
    return Gap(points, paired.low, paired.high, paired.p, paired.only_b, paired.only_a)


def _end(name: str, settings: Mapping[str, Any], result: Result, run: Record | None) -> End:
    value = result.metrics[result.primary]
    return End(
        name=name,
        recipe=settings.get("recipe", ""),
        settings=dict(settings),
        metric=result.primary,
        unit=value.unit,
        value=value.value,
        low=value.low,
        high=value.high,
        chosen={k: v for k, v in result.details.items() if k.startswith("chosen")},
        run=run.id if run else "",
    )


def _bits(result: Result) -> np.ndarray | None:
    """(N,) bool: what is right, where that makes up the primary metric."""
    if result.correct is None or not len(result.correct):
        return None
    mean = 100 * float(np.mean(result.correct))
    return result.correct if abs(mean - result.metrics[result.primary].value) < 0.01 else None


def _notes(protocol: str, found: Walk) -> list[str]:
    """What a reader must know of the walk."""
    notes = []
    together = [f"{' and '.join(names)}" for names in found.parts if len(names) > 1]
    possible = ways(found.results, frozenset(range(len(found.parts)))).get(frozenset(), 0)
    total = math.factorial(len(found.parts))
    if sum(map(len, found.parts)) > FEW:
        notes.append(
            f"more than {FEW} settings differ: they were changed once, in the order of the list, and another order may"
            " share the points out otherwise"
        )
    elif possible < total:
        notes.append(
            f"of the {total} orders of changing them {possible} are possible, and the points are means over those"
        )
    if found.refused:
        notes.append(f"{protocol} refuses some mixtures: {'; '.join(found.refused)}")
    notes += [
        f"{names} could not be changed one at a time, and have their points together" for names in together
    ]
    if found.idle:
        notes.append(f"one of the two makes no use of {', '.join(found.idle)}: it is as in the other")
    return notes + list(dict.fromkeys(text for result in found.results.values() for text in result.warnings))


def _of_runs(ways_: Sequence[Way], results: Sequence[Result]) -> list[str]:
    """What has changed since the runs were recorded."""
    notes = []
    for way, result in zip(ways_, results, strict=True):
        if way.run is None:
            continue
        if reason := stale(way.run):
            notes.append(f"{way.name} is stale: {reason}")
        now = result.metrics[result.primary].value
        if abs(way.run.score.value - now) >= 5e-4:
            notes.append(f"{way.name} recorded {way.run.score.value:.2f}, and gives {now:.2f} today")
    return notes


# Where it is scored ----------------------------------------------------------------------------------


def _is_recipe(text: str) -> bool:
    return ":" in text or text in registry.protocols()


def _run(name: str, records: Sequence[Record]) -> Record:
    found = [run for run in records if run.id.startswith(name)]
    if len(found) > 1:
        raise ConfigError(f"'{name}' begins {len(found)} runs", f"They are {', '.join(r.id for r in found)}")
    if not found:
        recipes = [f"{protocol}:RECIPE" for protocol in registry.protocols()]
        raise UnknownName("run or recipe", name, [*recipes, *(run.id for run in records)])
    return found[0]


def _prepare(
    question: Question, protocol: str, runs: Sequence[Record | None], progress: Progress
) -> tuple[Ground, list[Way]]:
    """What is scored, and the two ways of scoring it."""
    texts = (question.a, question.b)
    known = [run for run in runs if run is not None]
    if question.features is not None:
        if known or question.encoder_given:
            raise ConfigError(
                "features of a file have neither run nor method", "Name two recipes and the file alone"
            )
        return _file(question, texts, progress)
    if known and question.encoder_given:
        raise ConfigError(
            "a run says itself what was scored",
            "Leave out --method, --dataset and the like",
        )
    if not known:
        if question.method is None:
            raise ConfigError(
                "two recipes need something to be scored",
                "Name an encoder with --method, or a file with --features",
            )
        request = runner.Request(
            methods=(question.method,),
            protocols=texts,
            dataset=question.dataset or "digits",
            eval_dataset=question.eval_dataset,
            preset=question.preset,
            seeds=(question.seed or 0,),
            overrides=question.overrides,
            weights=question.weights,
            device=question.device,
            may_pretrain=False,
        )
        bench = runner.bench(request, progress)
        ways_ = [Way(text, settings) for text, settings in zip(texts, bench.settings, strict=True)]
        return _ground(protocol, bench), ways_
    bench = runner.bench(replace(_request(known[0], protocol), device=question.device), progress)
    if bench.target.fingerprint != known[0].data.fingerprint:
        raise ConfigError(f"{known[0].data.name} is not what it was when run {known[0].id} was recorded")
    if bench.pretrained.key != known[0].pretrain.key:
        raise ConfigError(
            f"the weights of run {known[0].id} are not those that today's code trains",
            f"Run again: {known[0].command}",
        )
    found = [_way(text, protocol, run) for text, run in zip(texts, runs, strict=True)]
    return _ground(protocol, bench), found


def _ground(protocol: str, bench: runner.Bench) -> Ground:
    return Ground(
        protocol=protocol,
        encoder=bench.name,
        key=bench.pretrained.key,
        method=bench.pretrained.slug,
        data=bench.target.name,
        data_fingerprint=bench.target.fingerprint,
        note=bench.target.test.note,
        score=lambda settings: bench.score(protocol, settings),
        reads=lambda: bench.reads,
    )


def _recorded_ground(run: Record) -> Ground:
    def refuse(settings: Any) -> Result:
        raise AssertionError("nothing is left to be scored")

    return Ground(
        protocol=run.protocol.name,
        encoder=_encoder(run),
        key=run.pretrain.key,
        method=run.method.slug,
        data=run.data.name,
        data_fingerprint=run.data.fingerprint,
        note=run.data.note,
        score=refuse,
    )


def _encoder(run: Record) -> str:
    """A run's encoder, for people: what runner.bench calls it."""
    own = f"{run.protocol.name}."
    changed = [
        f"{name}={value}" for name, value in flatten(run.overrides) if name and not name.startswith(own)
    ]
    return ", ".join([run.method.slug, f"{run.preset} preset", *changed, f"seed {run.seed}"])


def _file(question: Question, texts: Sequence[str], progress: Progress) -> tuple[Ground, list[Way]]:
    file = question.features
    assert file is not None
    chosen = score.choices(texts, {})
    arrays = score.read(file)
    device = runner.choose_device(question.device)
    name, digest = chosen[0][0], published.digest(file)[:12]
    ground = Ground(
        protocol=name,
        encoder=f"features of {arrays.train.shape[1]} channels computed elsewhere",
        key=digest,
        method="",
        data=file.name,
        data_fingerprint=digest,
        note=f"{len(arrays.train):,} training items",
        score=lambda settings: score.evaluate(name, settings, arrays, device, progress),
    )
    return ground, [Way(text, settings) for text, (_, settings) in zip(texts, chosen, strict=True)]


def _way(text: str, protocol: str, run: Record | None) -> Way:
    """A recipe as it is, or the settings that a run had."""
    module = registry.load_protocol(protocol)
    if run is None:
        recipe = text.partition(":")[2] or next(iter(module.RECIPES))
        if recipe not in module.RECIPES:
            raise UnknownName(f"recipe of {protocol}", recipe, module.RECIPES)
        return Way(text, config.build(module.Settings, module.RECIPES[recipe] | {"recipe": recipe}, protocol))
    try:
        settings = config.build(module.Settings, run.protocol.settings, protocol)
    except ConfigError as fault:
        raise ConfigError(
            f"run {run.id} has settings that {protocol} no longer knows: {fault.problem}"
        ) from None
    return Way(f"run {run.id}", settings, run)


def _request(run: Record, protocol: str) -> runner.Request:
    """What made a run's encoder, from the command in its record."""
    words = shlex.split(run.command.replace("~", str(Path.home())))
    values: dict[str, list[str]] = {}
    for option, value in zip(words[2::2], words[3::2], strict=False):
        values.setdefault(option, []).append(value)
    known = {
        "--method",
        "--protocol",
        "--dataset",
        "--preset",
        "--weights",
        "--eval-dataset",
        "--seed",
        "--set",
    }
    if words[:2] != ["mimbench", "run"] or len(words) % 2 or not values.keys() <= known:
        raise ResultsError(f"the command of run {run.id} cannot be read: {run.command}")
    overrides = [item for item in values.get("--set", []) if item.partition(".")[0].strip() != protocol]

    def one(option: str) -> str | None:
        return values[option][0] if option in values else None

    return runner.Request(
        methods=(one("--method") or run.method.slug,),
        protocols=(protocol,),
        dataset=one("--dataset") or run.pretrain.dataset,
        eval_dataset=one("--eval-dataset"),
        preset=one("--preset"),
        seeds=(run.seed,),
        overrides=tuple(overrides),
        weights=Path(file) if (file := one("--weights")) else None,
        may_pretrain=False,
    )


# What cannot be walked -------------------------------------------------------------------------------

WEIGHTS = "other weights: scoring one encoder cannot tell what this is worth"
IMAGES = "other test images: the two numbers are of different questions"
METRICS = "two metrics have no difference"


def _apart(a: Record, b: Record) -> list[Apart]:
    """In what two runs differ besides the settings of their protocol."""
    found = []

    def differ(what: str, ours: Any, theirs: Any, why: str) -> None:
        if ours != theirs:
            found.append(Apart(what, str(ours), str(theirs), why, ""))

    if a.data.name != b.data.name:
        differ("evaluation data", a.data.name, b.data.name, IMAGES)
    else:
        differ("state of the evaluation data", a.data.fingerprint, b.data.fingerprint, IMAGES)
    differ("metric", a.primary, b.primary, METRICS)
    code = "the second number was made by the code of another version"
    differ("version of the protocol", a.protocol.version, b.protocol.version, code)
    if a.pretrain.key != b.pretrain.key:
        before = len(found)
        ours, theirs = _facts(a), _facts(b)
        if a.method.slug == b.method.slug:  # the settings of two methods are not comparable
            ours, theirs = ({**facts, **_config(run)} for facts, run in ((ours, a), (theirs, b)))
        for name in dict.fromkeys((*ours, *theirs)):
            differ(name, ours.get(name, "unset"), theirs.get(name, "unset"), WEIGHTS)
        if len(found) == before:
            differ("weights", a.pretrain.key, b.pretrain.key, WEIGHTS)
    return found


def _facts(run: Record) -> dict[str, str]:
    """What a run's weights depend on."""
    return {
        "method": run.method.slug,
        "preset": run.preset,
        "backbone": run.backbone,
        "input size": str(run.encoder.input_size),
        "pretraining data": run.pretrain.dataset,
        "state of the pretraining data": run.pretrain.data_fingerprint,
        "pretraining seed": str(run.seed),
        "weights of": str(run.overrides.get("weights", "this suite")),
    }


def _config(run: Record) -> dict[str, str]:
    return {f"config {name}": value for name, value in flatten(run.config)}


def _beside_a_paper(question: Question, run: Record) -> Explanation:
    """A run beside a number that its paper reports: what differs, and which of that can be walked here."""
    rows = reported.read(run.method.slug)
    setting = verdict.measured([run]).setting
    differ = [_differences(run, setting, row) for row in rows]
    position = _position(question.b, run, rows, differ)
    theirs, shown = rows[position], ranking.reported_view(rows[position])
    place = ", ".join(filter(None, (theirs["source"], theirs["locator"], theirs["confidence"])))
    value, name = run.score, f"reported:{position + 1}"
    number = Metric(theirs["value"], unit=theirs["unit"] or "")
    return Explanation(
        command=question.command,
        protocol=run.protocol.name,
        version=run.protocol.version,
        protocol_code=run.protocol.code_hash,
        method=run.method.slug,
        method_code=run.method.code_hash,
        encoder=_encoder(run),
        key=run.pretrain.key,
        data=run.data.name,
        data_fingerprint=run.data.fingerprint,
        note=run.data.note,
        n=value.n,
        metric=run.primary,
        unit=value.unit,
        a=_end(f"run {run.id}", run.protocol.settings, _as_recorded(run), run),
        b=_end(name, {}, Result({theirs["metric"]: number}, theirs["metric"]), None),
        gap=_UNKNOWN if differ[position] else replace(_UNKNOWN, points=theirs["value"] - value.value),
        parts=[],
        stops=[Stop([], value.value)],
        apart=[_from_paper(what, *pair, run, theirs) for what, pair in differ[position].items()],
        notes=[
            f"{name} is {shown['value']} {shown['unit']} ({theirs['protocol']}, {shown['setting']}) from {place}"
        ],
        test_reads=0,
        seconds=0.0,
        environment=environment(),
        git=git(),
    )


def _differences(run: Record, setting: verdict.Setting, theirs: reported.Row) -> dict[str, tuple[str, str]]:
    found = verdict.differences(setting, theirs)
    if run.protocol.name == theirs["protocol"]:
        return found
    return {
        "protocol": (run.protocol.name, theirs["protocol"]),
        **found,
        "recipe": (run.protocol.recipe, "its own"),
    }


def _position(
    text: str, run: Record, rows: Sequence[reported.Row], differ: Sequence[Mapping[str, Any]]
) -> int:
    """Which of the ``rows`` is meant by "reported:N", or by "reported": that of the run's protocol that is nearest."""
    if not rows:
        raise ConfigError(f"no number of the paper of {run.method.slug} is held")
    nearest = sorted(range(len(rows)), key=lambda i: ("protocol" in differ[i], len(differ[i]), i))
    _, colon, number = text.partition(":")
    if not colon and "protocol" not in differ[nearest[0]]:
        return nearest[0]
    if number.isdecimal() and 1 <= int(number) <= len(rows):
        return int(number) - 1
    listed = "; ".join(
        f"reported:{i + 1} is {rows[i]['value']:g} by {rows[i]['protocol']} on {rows[i]['dataset'] or 'unnamed data'}"
        for i in nearest[:5]
    )
    wanted = text if colon else f"number by {run.protocol.name}"
    raise ConfigError(
        f"there is no {wanted} among {len(rows)} of {run.method.slug}", f"The nearest: {listed}"
    )


def _from_paper(what: str, ours: str, theirs: str, run: Record, row: reported.Row) -> Apart:
    """A difference from a paper's setting, and whether it can be walked here."""
    name, recipe = run.protocol.name, row["slug"]
    if what == "recipe" and name == row["protocol"] and name in registry.protocols():
        if recipe in registry.load_protocol(name).RECIPES:
            why = f"settings of {name}: they can be walked on our encoder"
            return Apart(what, ours, theirs, why, f"mimbench explain {run.id} {name}:{recipe}")
        return Apart(what, ours, theirs, f"the paper's settings of {name} are no recipe here", "")
    if what == "metric" and (found := run.metrics.get(row["metric"])) is not None:
        return Apart(what, ours, theirs, f"the run has {found.value:.2f} {found.unit} by that metric too", "")
    reasons = {
        "protocol": "two protocols: no path of settings leads from one to the other",
        "recipe": "settings of another protocol",
        "metric": "the run has no value of that metric",
        "evaluation data": IMAGES,
        "unit": "two units have no difference",
        "machine": "times of two machines are not comparable",
    }
    return Apart(what, ours, theirs, reasons.get(what, WEIGHTS), "")


# In the terminal --------------------------------------------------------------------------------------


def tables(found: Explanation) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Title, columns and rows of what there is to print."""
    unit = "points" if found.unit == "%" else found.unit
    shown = [
        (
            "",
            ["", "recipe", "metric", "value [95 % interval]", "chose"],
            [_printed_end(end) for end in (found.a, found.b)],
        )
    ]
    rows = [
        [
            "\n".join(part.settings),
            "\n".join(str(a) for a, _ in part.settings.values()),
            "\n".join(str(b) for _, b in part.settings.values()),
            f"{part.points:+.2f}",
            "" if part.low is None else f"{part.low:+.2f} to {part.high:+.2f}",
        ]
        for part in sorted(found.parts, key=lambda part: -abs(part.points))
    ]
    if rows:
        rows.append(["all of them", "", "", f"{found.walked:+.2f}", ""])
        title = f"What each setting is worth on {found.encoder} ({found.data})"
        shown.append((title, ["setting", found.a.name, found.b.name, unit, "95 % interval"], rows))
    if found.apart:
        shown.append(
            (
                "What else differs, and gets no points",
                ["", found.a.name, found.b.name, "why", "walk it with"],
                [[item.what, item.a, item.b, item.why, item.walk] for item in found.apart],
            )
        )
    return shown


def _printed_end(end: End) -> list[Any]:
    interval = "" if end.low is None else f" [{end.low:.2f}, {end.high:.2f}]"
    chosen = ", ".join(f"{name} = {value}" for name, value in end.chosen.items())
    return [end.name, end.recipe, end.metric, f"{end.value:.2f}{interval} {end.unit}".rstrip(), chosen]


def headline(found: Explanation) -> str:
    """The whole gap in a sentence."""
    unit = "points" if found.unit == "%" else found.unit
    gap = found.gap
    if gap.points is None:
        return (
            f"{found.a.name} and {found.b.name} are of different questions: their difference has no meaning."
        )
    text = f"{found.b.name} - {found.a.name} = {gap.points:+.2f} {unit}"
    if gap.low is not None and gap.p is not None:
        p = "< 0.0001" if gap.p < 1e-4 else f"{gap.p:.2g}"
        text += f", paired 95 % interval {gap.low:+.2f} to {gap.high:+.2f}, p {p}"
    if found.apart and found.rest is not None and found.parts:
        text += f"; settings make {found.walked:+.2f} of it on {found.encoder}"
        text += f", and {found.rest:+.2f} is left to what else differs"
    return f"{text}."
