"""Verdicts: a number is judged by its own setting alone, by a test, and by margins that cannot move unseen."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_record import make_record
from test_report import REPORTED_HEADER, Page, crawl, made, render
from test_report import suite as suite

from mimbench import config, registry, reported, stats, verdict
from mimbench.report import ledger
from mimbench.report.source import Source
from mimbench.task import Metric
from mimbench.verdict import Measured, Setting, Verdict


def theirs(value: float = 60.0, **changes: Any) -> reported.Row:
    """A number of MAE's paper."""
    row = {
        **{"slug": "mae", "method": "mae", "backbone": "ViT-B/16", "pretrain_data": "imagenet-1k"},
        **{"pretrain_epochs": 800.0, "image_size": "224", "protocol": "linear", "dataset": "imagenet-1k"},
        **{"metric": "top1", "value": value, "unit": "%", "source": "arXiv", "locator": "Table 1"},
        "confidence": "verified",
    }
    assert row.keys() >= changes.keys()
    return row | changes


def ours(*values: float, stale: str = "", **changes: Any) -> Measured:
    """Runs of that number's setting, one a seed."""
    setting = Setting("top1", "imagenet", "imagenet", "vit-b/16", 224, "mae", 800.0, "%")
    scores = {"top1": tuple(Metric(value, value - 0.4, value + 0.4, 50_000) for value in values)}
    return Measured(
        "mae",
        "linear",
        "paper",
        dataclasses.replace(setting, **changes),
        tuple(range(len(values))),
        tuple(f"run{seed}" for seed in range(len(values))),
        stale,
        scores,
    )


def judged(row: reported.Row, *rows: Measured) -> Verdict:
    (found,) = verdict.verdicts([row], rows)
    return found


# The verdict


def test_a_mean_within_the_margin_is_reproduced_and_one_beyond_it_different() -> None:
    same = judged(theirs(60), ours(60.1, 60.3, 59.9))
    assert (same.verdict, same.reason, same.margin) == ("reproduced", "within", 1.0)
    assert same.difference == pytest.approx(0.1)
    assert same.test is not None
    assert same.test.p_within < 0.05
    assert (same.low, same.high) == stats.seed_interval([60.1, 60.3, 59.9])[1:]
    other = judged(theirs(60), ours(62.5, 62.6, 62.4))
    assert (other.verdict, other.reason) == ("different", "beyond")
    for values in ((60.1, 63.0, 58.0), (61.0, 61.1, 60.9), (60.9, 61.3)):
        unsure = judged(theirs(60), ours(*values))
        assert (unsure.verdict, unsure.reason) == ("undecided", "wide"), values


@given(st.floats(50, 70), st.floats(0.0, 1.5), st.integers(2, 5), st.integers(0, 999))
def test_a_verdict_is_what_two_intervals_say(centre: float, scatter: float, seeds: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(centre, scatter + 1e-3, seeds).tolist()
    found = judged(theirs(60), ours(*values))
    _, low, high = stats.seed_interval(values)
    assert low is not None
    assert high is not None
    assert found.test is not None
    assert (found.verdict == "reproduced") == (found.test.low > -1 and found.test.high < 1)
    assert (found.verdict == "different") == (low > 61 or high < 59)


def test_one_seed_decides_nothing() -> None:
    for value in (60.0, 10.0):
        found = judged(theirs(60), ours(value))
        assert (found.verdict, found.reason, found.test) == ("undecided", "one seed", None)
        assert found.difference == value - 60
        assert (found.low, found.high) == (value - 0.4, value + 0.4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backbone": "vit-l/16"}, "backbone"),
        ({"data": "cifar10"}, "evaluation data"),
        ({"pretrain_data": "imagenet-100"}, "pretraining data"),
        ({"image_size": 448}, "image size"),
        ({"recipe": "cached"}, "recipe"),
        ({"epochs": 799.5}, "epochs"),
        ({"changed": ("mask_ratio=0.5",)}, "settings"),
    ],
)
def test_any_other_setting_of_ours_cannot_be_tested_and_has_no_gap(
    change: dict[str, Any], named: str
) -> None:
    found = judged(theirs(60), ours(60.0, 60.1, 60.2, **change))
    assert (found.verdict, found.reason) == ("untestable", "setting")
    assert list(found.differences or {}) == [named]
    assert found.difference is found.margin is found.test is None
    assert named in found.said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backbone": None}, "backbone"),
        ({"pretrain_epochs": None}, "epochs"),
        ({"image_size": None}, "image size"),
        ({"pretrain_data": None}, "pretraining data"),
        ({"dataset": "imagenet-v2"}, "evaluation data"),
        ({"metric": "top5"}, "metric"),
        ({"unit": "fraction"}, "unit"),
        ({"slug": "cae"}, "recipe"),  # another paper measured it, in its own way
    ],
)
def test_what_the_source_does_not_say_cannot_be_tested(change: dict[str, Any], named: str) -> None:
    found = judged(theirs(60, **change), ours(60.0, 60.1, 60.2))
    assert (found.verdict, list(found.differences or {})) == ("untestable", [named])
    assert found.difference is None


@given(st.text(max_size=20), st.floats(0, 100))
def test_another_backbone_never_yields_a_gap_or_a_verdict(backbone: str, value: float) -> None:
    found = judged(
        theirs(value, backbone=backbone or None), ours(value, value, value, backbone="vit-192x12/4")
    )
    assert (found.verdict, found.difference, found.test) == ("untestable", None, None)


def test_times_and_memory_are_of_a_machine() -> None:
    setting = {"metric": "seconds", "unit": "s"}
    row = dataclasses.replace(ours(5.0, 5.0, **setting), scores={"seconds": (Metric(5.0, unit="s"),) * 2})
    found = judged(theirs(5.0, **setting), row)
    assert (found.verdict, list(found.differences or {})) == ("untestable", ["machine"])


def test_why_a_number_has_no_runs() -> None:
    assert judged(theirs()).reason == "run"
    assert judged(theirs(protocol="detection")).reason == "protocol"
    assert judged(theirs(method="not_here", protocol="detection")).reason == "method"
    assert all(judged(theirs(**c)).verdict == "untestable" for c in ({}, {"method": "not_here"}))


def test_a_rival_is_judged_under_the_method_that_was_measured() -> None:
    runs = ours(60.0, 60.1, recipe="capi")
    found = judged(theirs(60, slug="capi"), runs)  # by CAPI's paper, in CAPI's way
    assert (found.verdict, found.theirs["slug"], found.ours) == ("reproduced", "capi", runs)
    assert judged(theirs(60, slug="mae", method="capi"), runs).reason == "run"


def test_the_reported_metric_is_judged_though_another_ranks() -> None:
    runs = ours(60.0, 60.1, 60.2)
    runs.scores["top5"] = tuple(Metric(value) for value in (84.9, 85.0, 85.1))
    found = judged(theirs(85.0, metric="top5"), runs)
    assert (found.verdict, found.metric, found.mean) == ("reproduced", "top5", pytest.approx(85))


def test_several_numbers_for_one_setting_cannot_be_told_apart() -> None:
    rows = [theirs(60, locator="a"), theirs(65, locator="b"), theirs(60, source="code")]
    found = verdict.verdicts(rows, [ours(60.0, 60.1, 60.2)])
    assert [each.reason for each in found] == ["several", "several", "within"]
    assert [each.difference is None for each in found] == [True, True, False]
    twice = verdict.verdicts([rows[0], theirs(60, locator="c")], [ours(60.0, 60.1, 60.2)])
    assert [each.verdict for each in twice] == ["reproduced"] * 2


def test_the_nearest_runs_are_taken_fresh_ones_first_and_stale_ones_marked() -> None:
    far = ours(60.0, 60.1, backbone="vit-s/16", epochs=100.0)
    near = ours(70.0, 70.1, epochs=100.0)
    nearer = ours(50.0, 50.1, epochs=700.0)
    assert judged(theirs(), far, near, nearer).ours == nearer
    old, new = ours(60.0, 60.1, stale="the code of mae has changed"), ours(60.5)
    assert judged(theirs(), old, new).ours == new
    found = judged(theirs(), old)
    assert found.verdict == "reproduced"
    assert found.content()["stale"] == "the code of mae has changed"


def test_overrides_count_unless_they_are_compared_elsewhere_or_change_nothing() -> None:
    neutral = {"recipe": {"epochs": 800, "compile": True, "precision": "bf16"}, "weights": "0123"}
    assert verdict.changed(neutral) == ()
    assert verdict.changed({"mask_ratio": 0.5, "recipe": {"base_lr": 1e-3}, "knn": {"ks": [5]}}) == (
        *("mask_ratio=0.5", "recipe.base_lr=0.001", "knn.ks=[5]"),
    )
    run = made_of(overrides={"mask_ratio": 0.5})
    assert run.setting.changed == ("mask_ratio=0.5",)


def made_of(**changes: Any) -> Measured:
    return verdict.measured([make_record(**changes)])


def test_records_become_what_is_held_against_numbers() -> None:
    runs = [make_record(seed=seed, score=60.0 + seed) for seed in range(3)]
    found = verdict.measured(runs)
    assert (found.seeds, found.runs) == ((0, 1, 2), tuple(run.id for run in runs))
    assert [score.value for score in found.scores["top1"]] == [60, 61, 62]
    assert found.setting == Setting("top1", "cifar10", "cifar10", "vit 12x192/4", 32, "dino", 1.5, "%")
    some = [make_record(), make_record(seed=1, metrics={"top1": Metric(50.0)})]
    assert verdict.measured(some).scores.keys() == {"top1"}


# The margins


@pytest.mark.parametrize(
    ("value", "changes", "expected"),
    [
        (68.0, {}, 1.0),
        (92.0, {}, 0.8),
        (99.5, {}, 0.05),
        (0.8, {"metric": "top1_error"}, 0.08),
        (100.0, {}, 0.0),
        (0.68, {"unit": "fraction"}, 0.01),
        (0.99, {"unit": "fraction"}, 0.001),
        (47.1, {"unit": "AP"}, 1.0),
        (98.0, {"metric": "mce"}, 1.0),
        (120.0, {"metric": "mce"}, 1.0),
        (11.1, {"metric": "fid", "unit": None}, 0.555),
    ],
)
def test_margins(value: float, changes: dict[str, Any], expected: float) -> None:
    assert verdict.margin(theirs(value, **changes)) == pytest.approx(expected)


def test_a_margin_that_moves_has_another_version() -> None:
    """A verdict means something because its margin was there first: change VERSION and this hash together."""
    stated = config.digest(
        *(verdict.POINTS, verdict.NEAR_END, sorted(verdict.OPEN), verdict.RELATIVE, sorted(verdict.MACHINE)),
        *(verdict.RULES, inspect.getsource(verdict.margin), stats.ALPHA),
    )
    assert (verdict.VERSION, stated) == (1, "5b26d256259e")


# What is here


def test_every_number_that_is_held_has_one_verdict_with_a_known_reason() -> None:
    numbers = reported.read_all()
    found = verdict.verdicts(numbers, [])
    assert [each.theirs for each in found] == numbers
    assert {each.verdict for each in found} == {"untestable"}
    assert {each.reason for each in found} <= verdict.REASONS.keys()
    assert sum(verdict.counts(found).values()) == len(numbers) > 1800
    here = registry.methods()
    assert all((each.reason == "method") == (each.theirs["method"] not in here) for each in found)
    assert all(each.content().keys() == verdict.COLUMNS.keys() for each in found)


# Its page


def numbers(folder: Path, *lines: str) -> None:
    (folder / "reported.csv").write_text(REPORTED_HEADER + "".join(f"{line}\n" for line in lines))


def words(text: str) -> str:
    return " ".join(" ".join(Page(text).texts).split())


def test_the_ledger_judges_and_the_method_page_says_the_same(
    suite: dict[str, registry.Card], tmp_path: Path
) -> None:
    setting = "vit 4x64/4,digits,20,32,linear,digits,top1"
    numbers(
        suite["alpha"].folder,
        f"alpha,{setting},60.5,%,the paper,Table 1,verified",
        f"beta,{setting},40,%,the paper,Table 2,verified",
        "alpha,vit-l/16,digits,20,32,linear,digits,top1,61,%,the paper,Table 3,verified",
        "gamma,,,,,detection,coco,box_ap,47.1,AP,the paper,Table 4,secondary",
    )
    runs = [made("alpha", 60 + seed / 10, seed, recipe="alpha") for seed in range(3)]
    site = render(tmp_path, *runs, made("beta", recipe="alpha"))
    pages = crawl(site)
    text = (site / "verdicts.html").read_text()
    said = words(text)
    for part in (
        *("4 reported numbers, each with one verdict", "2 of them are of a rival"),
        *("−0.4 points", "margin ±1.00", "reproduced", "undecided one seed says nothing"),
        *("backbone: ours vit 4x64/4 , theirs vit-l/16", "the method is not here yet"),
    ):
        assert part in said, part
    judged = text.partition('id="judged"')[2].partition('id="untestable"')[0]
    assert re.findall(r"badge verdict v-(\w+)", judged) == ["reproduced", "undecided"]
    assert "vit-l" not in judged
    page = (site / "methods" / "alpha.html").read_text().partition('id="reported"')[2]
    assert re.findall(r"badge verdict v-(\w+)", page) == ["reproduced", "undecided", *["untestable"] * 2]
    assert 'href="verdicts.html"' in (site / "index.html").read_text()
    assert site / "odometer.html" in pages
    listed = (site / "data" / "verdicts.csv").read_text().splitlines()
    assert len(listed) == 5
    assert listed[0].replace('"', "").split(",") == list(verdict.COLUMNS)


def test_thousands_of_judged_numbers_stay_a_page_that_opens(suite: Any, tmp_path: Path) -> None:
    row = theirs(method="alpha", slug="alpha", source="s" * 60, locator="l" * 80)
    runs = dataclasses.replace(ours(60.0, 60.1, recipe="alpha"), method="alpha")
    found = verdict.verdicts([row | {"locator": f"{i} {'l' * 80}"} for i in range(3000)], [runs])
    view = ledger.ledger(found, {})
    assert (len(view["judged"]), view["more"]) == (300, 2700)
    assert ledger.verdicts(Source([], [row]))[0].reason == "run"
    lines = [
        f"alpha,vit 4x64/4,digits,20,32,linear,digits,top1,60,%,{'s' * 60},{i} {'l' * 80},verified"
        for i in range(3000)
    ]
    numbers(suite["alpha"].folder, *lines)
    site = render(tmp_path, *(made("alpha", 60 + seed / 10, seed, recipe="alpha") for seed in range(2)))
    assert (site / "verdicts.html").stat().st_size < 500_000
