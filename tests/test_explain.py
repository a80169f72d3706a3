"""Explanations: points that add up, mixtures that a protocol refuses, what no walk can cross, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import crawl

from mimbench import (
    cli,
    config,
    explain,
    explanation,
    paths,
    record,
    registry,
    report,
    reported,
    score,
    stats,
)
from mimbench.errors import ConfigError, ResultsError
from mimbench.explain import Question
from mimbench.explanation import Explanation, shares
from mimbench.progress import quiet
from mimbench.record import Record
from mimbench.report import explained as views
from mimbench.report import words
from mimbench.task import Metric, Result
from mimbench.walk import FEW, plan, walk

knn = registry.load_protocol("knn")
Sets = dict[frozenset[int], Any]


# Shares


def every_set(parts: int) -> list[frozenset[int]]:
    return [
        frozenset(held) for size in range(parts + 1) for held in itertools.combinations(range(parts), size)
    ]


def by_all_orders(stops: Sets, parts: int) -> list[float]:
    """The definition: the mean gain of each part over all orders that ``stops`` allows."""
    gains = []
    for order in itertools.permutations(range(parts)):
        path = [frozenset(order[:i]) for i in range(parts + 1)]
        if all(held in stops for held in path):
            gain = [0.0] * parts
            for i, part in enumerate(order):
                gain[part] = stops[path[i + 1]] - stops[path[i]]
            gains.append(gain)
    return list(np.mean(gains, axis=0))


def test_shares_are_the_mean_gain_over_all_orders_and_add_up() -> None:
    draw = np.random.default_rng(0)
    for parts in range(1, 6):
        stops = {held: float(draw.normal()) for held in every_set(parts)}
        found = shares(stops, parts)
        assert found == pytest.approx(by_all_orders(stops, parts))
        assert sum(found) == pytest.approx(stops[frozenset(range(parts))] - stops[frozenset()])
        if parts < 3:
            continue
        for missing in ([frozenset({0})], [frozenset({1}), frozenset({0, 2})]):
            fewer = {held: value for held, value in stops.items() if held not in missing}
            assert shares(fewer, parts) == pytest.approx(by_all_orders(fewer, parts))
            assert sum(shares(fewer, parts)) == pytest.approx(sum(found))


def test_shares_worked_out_by_hand() -> None:
    # x alone gains 10, y alone 4, and both together 6 more: those are split.
    stops: Sets = {frozenset(): 50.0, frozenset({0}): 60.0, frozenset({1}): 54.0, frozenset({0, 1}): 70.0}
    assert shares(stops, 2) == pytest.approx([13, 7])
    del stops[frozenset({1})]  # y may only come after x: then the 6 are its own
    assert shares(stops, 2) == pytest.approx([10, 10])
    with pytest.raises(ValueError, match="no order"):
        shares({frozenset(): 0.0, frozenset({0, 1}): 1.0}, 2)


def test_shares_of_arrays_are_those_of_their_means() -> None:
    right = {held: np.random.default_rng(len(held)).random(50) < 0.5 for held in every_set(3)}
    means = shares({held: float(one.mean()) for held, one in right.items()}, 3)
    items = shares({held: one.astype(float) for held, one in right.items()}, 3)
    assert [one.mean() for one in items] == pytest.approx(means)


# The walk


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Settings:
    recipe: str = "plain"
    x: int = 0
    y: int = 0
    z: int = 0
    inner: Inner = Inner()
    refuse: tuple[str, ...] = ()  # settings that may not differ from each other

    def __post_init__(self) -> None:
        if len({getattr(self, name) for name in self.refuse}) > 1:
            raise ConfigError(f"{' and '.join(self.refuse)} belong together")


def scored(settings: Settings) -> Result:
    value = (
        50 + 10 * settings.x + 4 * settings.y + 6 * settings.x * settings.y + 3 * (settings.inner.depth - 1)
    )
    return Result({"top1": Metric(value)}, "top1", {})


def points(a: Settings, b: Settings, **more: Any) -> dict[tuple[str, ...], float]:
    found = walk(a, b, scored, **more)
    values = {held: result.metrics["top1"].value for held, result in found.results.items()}
    gained = shares(values, len(found.parts))
    first, last = (end.metrics["top1"].value for end in found.ends)
    assert sum(gained) == pytest.approx(last - first)
    assert (first, last) == (scored(a).metrics["top1"].value, scored(b).metrics["top1"].value)
    return dict(zip(found.parts, gained, strict=True))


def test_each_setting_gets_its_share_nested_ones_too() -> None:
    assert points(Settings(), Settings("other", x=1, y=1, inner=Inner(3))) == pytest.approx(
        {("x",): 13, ("y",): 7, ("inner.depth",): 6}
    )


def test_settings_that_move_nothing_are_no_difference() -> None:
    a, b = Settings(z=1), Settings(x=1, z=2)
    assert points(a, b) == pytest.approx({("x",): 10, ("z",): 0})
    found = walk(a, b, scored, idle=lambda settings: ("z",) if settings.x else ())
    assert (found.parts, found.idle) == ([("x",)], ["z"])


def test_settings_that_refuse_each_other_change_together() -> None:
    both = ("x", "y")
    a, b = Settings(refuse=both), Settings(x=1, y=1, z=1, inner=Inner(2), refuse=both)
    assert points(a, b) == pytest.approx({("x", "y"): 20, ("z",): 0, ("inner.depth",): 3})
    assert walk(a, b, scored).refused == ["x and y belong together"]


def test_a_mixture_refused_on_one_side_only_leaves_an_order() -> None:
    # Euclidean distances go with equal votes alone, so that the votes change first.
    a = knn.Settings()
    b = knn.Settings(metric="euclidean", weighting="uniform", ks=(5,))
    value = {"exponential": 0.0, "uniform": -2.0}

    def result(settings: Any) -> Result:
        moved = value[settings.weighting] + 5 * (settings.metric == "euclidean") + (settings.ks == (5,))
        return Result({"top1": Metric(moved)}, "top1", {})

    found = walk(a, b, result, knn.idle)
    held = {mixture: one.metrics["top1"].value for mixture, one in found.results.items()}
    gained = dict(zip(found.parts, shares(held, 3), strict=True))
    assert gained == pytest.approx({("ks",): 1, ("metric",): 5, ("weighting",): -2})
    assert len(held) == 6  # of 8: the metric never comes before the weighting


def test_a_mixture_that_is_refused_when_it_is_scored_is_passed_by() -> None:
    def picky(settings: Settings) -> Result:
        if (settings.x, settings.y) == (1, 0):
            raise ConfigError("x needs y")
        return scored(settings)

    found = walk(Settings(), Settings(x=1, y=1), picky)
    assert frozenset({found.parts.index(("x",))}) not in found.results
    assert found.refused == ["x needs y"]
    with pytest.raises(ConfigError, match="one of the two cannot be scored: x needs y"):
        walk(Settings(), Settings(x=1), picky)


def test_many_settings_are_changed_in_their_order() -> None:
    names = [f"s{i}" for i in range(FEW + 2)]
    parts, sets = plan(names, lambda held: held != {"s0"} and ("s3" in held) == ("s5" in held))
    assert parts == [("s1",), ("s0",), ("s2",), ("s4",), ("s6",), ("s7",), ("s3", "s5")]
    assert sets == {frozenset(range(count)) for count in range(len(parts) + 1)}


def test_few_settings_are_grouped_no_more_than_needed() -> None:
    parts, sets = plan(["a", "b", "c", "d"], lambda held: ("a" in held) == ("c" in held))
    assert sorted(parts) == [("a", "c"), ("b",), ("d",)]
    assert len(sets) == 8
    assert plan([], lambda held: True) == ([], {frozenset()})


# Features of a file


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(3)
    centres = draw.normal(size=(4, 6))
    arrays = {}
    for part, count in (("train", 300), ("test", 150)):
        labels = draw.integers(0, 4, count)
        arrays[part] = (centres[labels] + 1.5 * draw.normal(size=(count, 6))).astype("f4")
        arrays[f"{part}_labels"] = labels
    file = tmp_path_factory.mktemp("features") / "features.npz"
    np.savez(file, **arrays)
    return file


def explained(a: str, b: str, records: list[Record] | None = None, **more: Any) -> Explanation:
    return explain.explain(Question(a, b, **more), records or [], quiet())


def test_a_gap_is_shared_out_and_tested_in_pairs(features: Path) -> None:
    found = explained("knn:dino", "knn:sklearn", features=features)
    arrays = score.read(features)
    ends = [
        score.evaluate("knn", settings, arrays, "cpu", quiet())
        for _, settings in score.choices(["knn:dino", "knn:sklearn"], {})
    ]
    values = [end.metrics["top1"].value for end in ends]
    assert (found.a.value, found.b.value) == tuple(values)
    assert {name for part in found.parts for name in part.settings} == {"ks", "metric", "weighting"}
    assert math.fsum(part.points for part in found.parts) == pytest.approx(values[1] - values[0])
    assert found.walked == pytest.approx(found.gap.points)
    paired = stats.paired(ends[1].correct, ends[0].correct)
    assert (found.gap.low, found.gap.high, found.gap.p) == (paired.low, paired.high, paired.p)
    assert (found.gap.only_a, found.gap.only_b) == (paired.only_b, paired.only_a)
    for part in found.parts:
        assert part.low <= part.points <= part.high
    assert found.a.chosen == {"chosen_k": ends[0].details["chosen_k"]}
    assert any("knn refuses some mixtures: the exponential weighting is" in note for note in found.notes)
    assert not found.apart


def test_part_intervals_cover_what_the_whole_population_gives(features: Path) -> None:
    """The interval of a part is one over test items: of a single part it is near that of the paired difference."""
    found = explained("knn:lightly", "knn:lightly_vit", features=features)
    (part,) = found.parts
    assert part.settings == {"temperature": [0.1, 0.07]}
    assert part.points == pytest.approx(found.gap.points)
    assert part.low == pytest.approx(found.gap.low, abs=1.0)
    assert part.high == pytest.approx(found.gap.high, abs=1.0)


# Runs

SMALL = "--set image_size=16 --set vit.width=16 --set vit.depth=1 --set vit.heads=1 --preset smoke -q"


def mimbench(line: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mimbench", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and results: random_init by knn:lightly and knn:sklearn under seeds 0 and 1, on digits."""
    top = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMBENCH_CACHE", str(top / "cache"))
        patch.setenv("MIMBENCH_RESULTS", str(top / "results"))
        assert mimbench(f"run --method random_init --protocol knn:lightly,knn:sklearn --seeds 2 {SMALL}") == 0
    return top


@pytest.fixture
def runs(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Record]:
    """The recorded runs by recipe and seed; their weights and features are in the cache."""
    monkeypatch.setenv("MIMBENCH_CACHE", str(recorded / "cache"))
    shutil.copytree(recorded / "results", paths.results())
    found, _ = record.scan(paths.results())
    return {(run.protocol.recipe, run.seed): run for run in found}


def test_two_runs_on_one_encoder(runs: dict[tuple[str, int], Record]) -> None:
    a, b = runs["lightly", 0], runs["sklearn", 0]
    found = explained(a.id[:8], b.id, list(runs.values()))
    assert (found.a.value, found.b.value) == (a.score.value, b.score.value)
    assert (found.a.run, found.b.run, found.key) == (a.id, b.id, a.pretrain.key)
    paired = stats.paired(record.unpack(b.correct), record.unpack(a.correct))
    assert (found.gap.points, found.gap.low) == (pytest.approx(paired.difference), paired.low)
    assert found.apart == []
    assert found.test_reads == len(found.stops) == 6
    assert any("makes no use of temperature" in note for note in found.notes)
    beside = explained(a.id, "knn:sklearn", list(runs.values()))
    assert [part.points for part in beside.parts] == [part.points for part in found.parts]


def test_recipes_on_a_pretrained_encoder_say_the_same(runs: dict[tuple[str, int], Record]) -> None:
    settings = tuple(word for word in shlex.split(SMALL) if "=" in word)
    how: dict[str, Any] = {"method": "random_init", "preset": "smoke", "overrides": settings}
    found = explained("knn:lightly", "knn:sklearn", **how)
    assert found.b.value == runs["sklearn", 0].score.value
    assert found.encoder == f"random_init, smoke preset, {', '.join(settings)}, seed 0"
    assert shlex.split(found.command)[:4] == ["mimbench", "explain", "knn:lightly", "knn:sklearn"]
    assert explained("knn:lightly", "knn:sklearn", seed=1, **how).key != found.key
    with pytest.raises(ConfigError, match="has not been pretrained"):
        explained("knn:lightly", "knn:sklearn", seed=2, **how)


def test_other_weights_are_named_and_get_no_points(runs: dict[tuple[str, int], Record]) -> None:
    a, b = runs["lightly", 0], runs["sklearn", 1]
    found = explained(a.id, b.id, list(runs.values()))
    assert [(item.what, item.a, item.b) for item in found.apart] == [("pretraining seed", "0", "1")]
    assert found.apart[0].why == explain.WEIGHTS
    assert found.b.value == b.score.value
    assert found.gap.points == pytest.approx(b.score.value - a.score.value)
    # The settings are walked on the first encoder; what is left is that of the other weights.
    assert found.stops[-1].value == runs["sklearn", 0].score.value
    assert found.rest == pytest.approx(b.score.value - runs["sklearn", 0].score.value)
    assert "is left to what else differs" in explain.headline(found)


def test_settings_of_pretraining_are_named_within_one_method(runs: dict[tuple[str, int], Record]) -> None:
    a, b = runs["lightly", 0], runs["sklearn", 0]
    weights = dataclasses.replace(b.pretrain, key="other")
    changed = dataclasses.replace(b, config=b.config | {"vit": {"depth": 9}}, pretrain=weights)
    found = explained(a.id, changed.id, [a, changed])
    assert ("config vit.depth", "1", "9") in [(item.what, item.a, item.b) for item in found.apart]
    other = dataclasses.replace(changed, method=dataclasses.replace(b.method, slug="mae"))
    found = explained(a.id, other.id, [a, other])
    assert [item.what for item in found.apart] == ["method"]
    same = dataclasses.replace(b, pretrain=weights)
    assert [item.what for item in explained(a.id, same.id, [a, same]).apart] == ["weights"]


def test_equal_settings_of_other_weights_need_no_scoring(runs: dict[tuple[str, int], Record]) -> None:
    found = explained(runs["lightly", 0].id, runs["lightly", 1].id, list(runs.values()))
    assert (found.parts, found.test_reads, found.walked) == ([], 0, 0)
    assert found.rest == found.gap.points
    assert found.gap.low is not None


def test_other_test_images_leave_no_gap(runs: dict[tuple[str, int], Record]) -> None:
    a, b = runs["lightly", 0], runs["sklearn", 0]
    other = dataclasses.replace(b, data=dataclasses.replace(b.data, name="elsewhere", fingerprint="e"))
    found = explained(a.id, other.id, [a, other])
    assert [(item.what, item.b) for item in found.apart] == [("evaluation data", "elsewhere")]
    assert (found.gap.points, found.rest) == (None, None)
    assert len(found.parts) == 3
    assert "different questions" in explain.headline(found)


def test_weights_and_data_must_be_those_of_the_record(runs: dict[tuple[str, int], Record]) -> None:
    a, b = runs["lightly", 0], runs["sklearn", 0]
    for field, message in (("pretrain", "not those that today's code trains"), ("data", "not what it was")):
        name = {"pretrain": "key", "data": "fingerprint"}[field]
        changed = [
            dataclasses.replace(run, **{field: dataclasses.replace(getattr(run, field), **{name: "other"})})
            for run in (a, b)
        ]
        with pytest.raises(ConfigError, match=message):
            explained(changed[0].id, changed[1].id, changed)


# Beside a paper


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[reported.Row]:
    common = {
        **{
            "slug": "random_init",
            "method": "random_init",
            "backbone": "resnet50",
            "pretrain_data": "imagenet-1k",
        },
        **{"pretrain_epochs": None, "image_size": "224", "protocol": "knn", "dataset": "imagenet-1k"},
        **{"metric": "top1", "value": 60.0, "unit": "%", "source": "a paper", "locator": "Table 2"},
        **{"confidence": "verified"},
    }
    found = [common, common | {"protocol": "linear", "dataset": "digits", "value": 70.0}]
    monkeypatch.setattr(reported, "read", lambda slug: found if slug == "random_init" else [])
    return found


def test_a_reported_number_says_what_can_be_walked_and_what_not(
    runs: dict[tuple[str, int], Record], rows: list[reported.Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["lightly", 0]
    found = explained(run.id, "reported:1", [run])
    by_name = {item.what: item for item in found.apart}
    assert by_name["evaluation data"].why == explain.IMAGES
    assert by_name["backbone"].why == by_name["epochs"].why == explain.WEIGHTS
    assert by_name["recipe"].walk == ""
    assert (found.gap.points, found.parts, found.test_reads) == (None, [], 0)
    assert found.b.value == 60.0
    assert "Table 2" in found.notes[0]
    monkeypatch.setitem(knn.RECIPES, "random_init", {"ks": [5]})
    again = explained(run.id, "reported", [run])  # the nearest, which is the one of this protocol
    assert again.b.name == "reported:1"
    walkable = next(item for item in again.apart if item.what == "recipe")
    assert walkable.walk == f"mimbench explain {run.id} knn:random_init"
    other = explained(run.id, "reported:2", [run])
    assert other.apart[0].what == "protocol"
    assert [item.why for item in other.apart if item.what == "recipe"] == ["settings of another protocol"]
    with pytest.raises(ConfigError, match=r"no reported:9 among 2 .* reported:1 is 60 by knn on imagenet-1k"):
        explained(run.id, "reported:9", [run])
    del rows[0]
    with pytest.raises(
        ConfigError, match=r"no number by knn among 1 .* reported:1 is 70 by linear on digits"
    ):
        explained(run.id, "reported", [run])
    rows.clear()
    with pytest.raises(ConfigError, match="no number of the paper of random_init is held"):
        explained(run.id, "reported", [run])


def test_a_reported_number_of_the_same_setting_has_a_gap(
    runs: dict[tuple[str, int], Record], rows: list[reported.Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["lightly", 0]
    monkeypatch.setattr("mimbench.verdict.differences", lambda ours, theirs: {})
    found = explained(run.id, "reported:1", [run])
    assert (found.gap.points, found.apart) == (60.0 - run.score.value, [])


# Records


def test_a_record_reads_back_and_lies_in_its_place(features: Path, tmp_path: Path) -> None:
    found = explained("knn:dino", "knn:lightly", features=features)
    file = explanation.write(found, tmp_path)
    assert file == tmp_path / "explained" / f"{found.id}.json"
    assert file.stem.startswith("knn-dino-lightly-")
    assert explanation.read(file) == found
    assert explanation.scan(tmp_path) == ([found], [])
    assert (
        explanation.write(dataclasses.replace(found, created="2026-11-30T00:00:00+00:00"), tmp_path) == file
    )
    assert explained("knn:lightly", "knn:dino", features=features).id != found.id
    file.rename(file.with_name("copy.json"))
    held, (fault,) = explanation.scan(tmp_path)
    assert (held, "wrong place" in str(fault)) == ([], True)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["parts"][0].update(points=c["parts"][0]["points"] + 1), "do not follow from its scores"),
        (lambda c: c["stops"][1].update(value=0.0), "do not follow from its scores"),
        (lambda c: c["a"].update(value=1.0), "does not begin at A"),
        (lambda c: c["gap"].update(points=1.0), "not B - A"),
        (lambda c: (c["b"].update(value=1.0), c["gap"].update(points=None)), "does not end at B"),
        (lambda c: c["stops"].pop(), "do not begin at A and end"),
        (lambda c: c["stops"].insert(1, c["stops"][1]), "name parts twice"),
        (lambda c: c["stops"].__delitem__(slice(1, -1)), "connect no order"),
        (lambda c: c.update(created="today"), "not a time"),
        (lambda c: c.update(schema=2), "schema 1"),
        (lambda c: c.pop("notes"), "lacks: notes"),
        (lambda c: c.update(more=1), "unknown keys: more"),
        (lambda c: c.update(n="many"), "should be int"),
        (lambda c: c["a"].update(value=math.nan), "NaN"),
    ],
)
def test_an_edited_record_is_refused(features: Path, tmp_path: Path, change: Change, message: str) -> None:
    file = explanation.write(explained("knn:dino", "knn:sklearn", features=features), tmp_path)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=message) as refused:
        explanation.read(file)
    assert str(file) in str(refused.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "explained").mkdir()
    (tmp_path / "explained" / "torn.json").write_text("{")
    (tmp_path / "explained" / "bytes.json").write_bytes(b"\xff\xfe")
    held, faults = explanation.scan(tmp_path)
    assert held == []
    assert ["bytes.json" in str(faults[0]), "torn.json is not JSON" in str(faults[1])] == [True, True]


def test_what_cannot_be_kept_is_said(features: Path, tmp_path: Path) -> None:
    found = explained("knn:dino", "knn:lightly", features=features)
    with pytest.raises(ResultsError, match="cannot be written as JSON"):
        explanation.write(dataclasses.replace(found, seconds=math.inf), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"cannot be written: .* MIMBENCH_RESULTS"):
        explanation.write(found, tmp_path / "file")


def test_an_explanation_by_other_code_is_stale(features: Path, runs: dict[tuple[str, int], Record]) -> None:
    for found in (
        explained("knn:dino", "knn:lightly", features=features),
        explained(runs["lightly", 0].id, "knn:sklearn", list(runs.values())),
    ):
        assert explanation.stale(found) is None
        assert "code of knn" in (explanation.stale(dataclasses.replace(found, protocol_code="old")) or "")
        assert "no longer here" in (explanation.stale(dataclasses.replace(found, protocol="gone")) or "")
    assert "code of random_init" in (explanation.stale(dataclasses.replace(found, method_code="old")) or "")


# The command


def test_the_command_prints_points_and_keeps_them(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mimbench(f"explain knn:dino knn:sklearn --features {features} --record -q") == 0
    out = capsys.readouterr().out
    (found,), _ = explanation.scan(paths.results())
    for part in found.parts:
        assert f"{part.points:+.2f}" in out
    assert f"{found.gap.points:+.2f} points, paired 95 % interval {found.gap.low:+.2f}" in out
    assert "note: knn refuses some mixtures" in out
    assert f"recorded: {paths.results() / 'explained' / found.id}.json" in out
    assert mimbench(f"explain knn:dino knn:sklearn --features {features} --json -q") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["walked"] == pytest.approx(found.walked)
    assert [part["points"] for part in content["parts"]] == [part.points for part in found.parts]
    assert len(list((paths.results() / "explained").iterdir())) == 1


def test_the_command_beside_a_paper(
    runs: dict[tuple[str, int], Record], rows: list[reported.Row], capsys: pytest.CaptureFixture[str]
) -> None:
    assert mimbench(f"explain {runs['lightly', 0].id} reported -q --record") == 0
    out = capsys.readouterr().out
    assert "other weights: scoring one encoder cannot tell" in out
    assert "their difference has no meaning" in out
    assert explanation.scan(paths.results())[0][0].b.value == 60.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("knn:dino linear", "no path of settings leads from knn to linear"),
        ("knn:dino knn:lightly", "two recipes need something to be scored. Name an encoder with --method"),
        ("knn:solo knn:dinov2_k20 --features F", "score in the same way: there is nothing to explain"),
        ("knn:dino knn:dinosaur --features F", "unknown recipe of knn 'dinosaur'"),
        ("knn:dino knn:lightly --features F --method mae", "neither run nor method"),
        ("knn:dino knn:lightly --features missing.npz", "there is no file missing.npz"),
        ("linear:cached linear:mae --features F", "trains on images, not only features"),
        ("robustness robustness:quick --features F", "needs images, not only features"),
        ("knnn:dino knnn:lightly --method random_init", "unknown protocol 'knnn'. Did you mean knn?"),
        ("abc knn:lightly", "unknown run or recipe 'abc'"),
        ("knn:dino reported", "only a run can be set beside a reported number"),
        ("reported:1 knn:dino", "a run comes before the number"),
        ("knn:dino knn:lightly --method mae,simmim", "unknown method 'mae,simmim'"),
    ],
)
def test_the_command_says_what_is_wrong(
    line: str, message: str, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mimbench(f"explain -q {line.replace('F', str(features)) if '--features F' in line else line}") == 2
    ended = capsys.readouterr()
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err


def test_a_run_leaves_no_room_for_another_method(
    runs: dict[tuple[str, int], Record], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["lightly", 0]
    assert mimbench(f"explain {run.id} knn:sklearn --method mae -q") == 2
    assert "a run says itself what was scored" in capsys.readouterr().err
    assert mimbench(f"explain {run.id} {run.id} -q") == 2
    assert "nothing to explain" in capsys.readouterr().err
    settings = config.to_dict(config.build(knn.Settings, run.protocol.settings))
    assert settings == run.protocol.settings


# The pages


@pytest.fixture
def site(
    runs: dict[tuple[str, int], Record], features: Path, rows: list[reported.Row], tmp_path: Path
) -> Path:
    """A rendered report of four runs and explanations of each kind."""
    held = list(runs.values())
    pairs = (
        (("lightly", 0), ("sklearn", 0)),
        (("lightly", 0), ("sklearn", 1)),
        (("lightly", 1), ("lightly", 0)),
    )
    found = [explained(runs[a].id, runs[b].id, held) for a, b in pairs]
    found += [explained("knn:dino", "knn:stable_pretraining", features=features)]
    found += [explained(runs["sklearn", 0].id, "reported:1", held)]
    for one in found:
        explanation.write(one, paths.results())
    return report.report(paths.results(), tmp_path / "site").parent


def test_each_explanation_has_a_page_that_its_protocol_links_to(site: Path) -> None:
    pages = crawl(site)
    shown = {file.name: page for file, page in pages.items() if file.parent.name == "explained"}
    assert len(shown) == 5
    protocol = pages[site / "protocols" / "knn.html"]
    assert {f"../explained/{name}" for name in shown} <= set(protocol.links)
    for found in explanation.scan(paths.results())[0]:
        text = " ".join(shown[f"{words.page_name(found.id)}.html"].texts)
        for part in found.parts:
            assert words.signed(part.points, "%", 2) in text
            assert all(name in text for name in part.settings)
        for item in found.apart:
            assert item.what in text
        assert found.command in text
        assert ("its difference has no meaning" in text) is False
        assert ("their difference has no meaning" in text) == (found.gap.points is None)


def test_a_waterfall_goes_from_the_first_number_to_the_second(runs: dict[tuple[str, int], Record]) -> None:
    found = explained(runs["lightly", 0].id, runs["sklearn", 1].id, list(runs.values()))
    (view,) = views.explained_views([found], [runs["lightly", 0].id], ["random_init"])
    (x0, v0), (x1, v1) = ((tick["x"], float(tick["label"])) for tick in view["figure"]["ticks"][:2])

    def at(value: float) -> float:
        return x0 + (value - v0) * (x1 - x0) / (v1 - v0)

    first, *bars, last = view["figure"]["rows"]
    moves = [*(part["points"] for part in view["parts"]), view["rest"]]
    assert [bar["kind"] for bar in bars] == [
        *("gain" if move >= 0 else "loss" for move in moves[:-1]),
        "rest",
    ]
    level = found.a.value
    for bar, move in zip(bars, moves, strict=True):
        assert bar["from"] == pytest.approx(at(level), abs=0.2)
        assert bar["bar"]["x"] == pytest.approx(at(min(level, level + move)), abs=0.2)
        assert bar["bar"]["width"] == pytest.approx(max(abs(at(move) - at(0)), 1), abs=0.2)
        level += move
    assert (first["dot"], last["dot"]) == (
        pytest.approx(at(found.a.value), abs=0.2),
        pytest.approx(at(level), abs=0.2),
    )
    assert (view["a"]["run_href"] != "", view["b"]["run_href"]) == (True, "")
    assert math.fsum(part["points"] for part in view["parts"]) + view["rest"] == pytest.approx(view["gap"])


def test_recipes_on_one_encoder_are_drawn_with_their_spread(runs: dict[tuple[str, int], Record]) -> None:
    a, b = runs["lightly", 0], runs["sklearn", 0]
    found = views.recipe_figures(runs.values())
    assert list(found) == ["knn"]
    (drawn,) = found["knn"]["drawn"]  # of the two seeds the first
    assert found["knn"]["left_out"] == 0
    assert [row["value"] for row in drawn["rows"]] == sorted([a.score.value, b.score.value], reverse=True)
    paired = stats.paired(
        *(record.unpack(run.correct) for run in sorted((a, b), key=lambda run: -run.score.value))
    )
    assert (drawn["low"], drawn["high"]) == (paired.low, paired.high)
    assert words.number(abs(a.score.value - b.score.value), "%") in drawn["summary"]
    assert views.recipe_figures([a, runs["sklearn", 1]]) == {}
    best_of_several = dataclasses.replace(b, details=b.details | {"chosen_on": "test"})
    assert views.recipe_figures([a, best_of_several]) == {}
    elsewhere = dataclasses.replace(b, data=dataclasses.replace(b.data, fingerprint="e"))
    assert views.recipe_figures([a, elsewhere]) == {}


def test_the_newest_run_of_a_recipe_is_drawn_and_other_settings_have_a_label(
    runs: dict[tuple[str, int], Record],
) -> None:
    a, b = runs["lightly", 0], runs["sklearn", 0]
    newer = dataclasses.replace(
        b, created="2099-01-01T00:00:00+00:00", metrics={"top1": Metric(99.0, 98.0, 99.5, 360)}
    )
    (drawn,) = views.recipe_figures([newer, a, b])["knn"]["drawn"]
    assert [row["text"] for row in drawn["rows"]] == ["99.0", words.number(a.score.value, "%")]
    assert drawn["low"] is None  # its bits make up another score
    table = dataclasses.replace(a.protocol, settings=a.protocol.settings | {"ks": [3]})
    changed = dataclasses.replace(a, protocol=table, overrides=a.overrides | {"knn": {"ks": [3]}})
    (drawn,) = views.recipe_figures([a, changed])["knn"]["drawn"]
    assert sorted(row["label"] for row in drawn["rows"]) == ["lightly", "lightly (ks=[3])"]
    many = [
        dataclasses.replace(run, preset=f"p{i:02d}", pretrain=dataclasses.replace(run.pretrain, key=str(i)))
        for i in range(9)
        for run in (a, b)
    ]
    assert views.recipe_figures(many)["knn"]["left_out"] == 3


def test_hostile_names_stay_text(runs: dict[tuple[str, int], Record], tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&" + "x" * 90 + " \u05e9\u05dc\u05d5\u05dd \u202eevil"
    found = explained(runs["lightly", 0].id, runs["sklearn", 1].id, list(runs.values()))
    end = dataclasses.replace(found.a, name=hostile, recipe=hostile, chosen={hostile: hostile})
    part = dataclasses.replace(found.parts[0], settings={hostile: [hostile, hostile]})
    apart = [explanation.Apart(hostile, hostile, hostile, hostile, hostile)]
    changed = dataclasses.replace(
        found,
        **{"a": end, "parts": [part, *found.parts[1:]], "apart": apart, "notes": [hostile]},
        **{"command": hostile, "encoder": hostile, "data": hostile, "protocol": hostile, "note": hostile},
    )
    file = explanation.write(changed, paths.results())
    assert len(file.name) < 110
    run = runs["lightly", 0]
    odd = dataclasses.replace(run, protocol=dataclasses.replace(run.protocol, recipe=hostile, settings={}))
    record.write(odd, paths.results())
    site = report.report(paths.results(), tmp_path / "site").parent
    pages = crawl(site)
    seen = hostile.replace("\u202e", "\\u202e")
    page = next(page for file, page in pages.items() if file.parent.name == "explained")
    assert sum(seen in text for text in page.texts) > 8
    assert page.tags.count("script") == 1
    assert not any("<script>alert" in file.read_text() for file in pages)
    assert not any("\u202e" in text for page in pages.values() for text in page.texts)


def test_a_damaged_explanation_is_named_and_the_rest_rendered(site: Path) -> None:
    (paths.results() / "explained" / "torn.json").write_text("{")
    report.report(paths.results(), site)
    assert "explained/torn.json is not JSON" in (site / "index.html").read_text()
    assert len(list((site / "explained").iterdir())) == 5


def test_the_same_explanations_give_the_same_bytes(site: Path) -> None:
    before = {file: file.read_bytes() for file in site.rglob("*.html")}
    report.report(paths.results(), site)
    assert before == {file: file.read_bytes() for file in site.rglob("*.html")}
