"""What is published: every number of the front page comes from a record in the repository, and nothing is missing."""

from __future__ import annotations

import json
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as reference

from mimbench import paths, record, registry, report
from mimbench.sweep import file

RESULTS = paths.PACKAGE.parents[1] / "results"


class Front(HTMLParser):
    """The tables of the front page, as the text of their cells says them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.table = 0  # how many have begun
        self.columns: list[tuple[str, str]] = []  # protocol and data of the table that is open
        self.row: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        self.part = ""  # class of the open span
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "thead":
            self.table, self.columns = self.table + 1, []
        if tag == "th" and "data-protocol" in found:
            self.columns.append((str(found["data-protocol"]), str(found["data-dataset"])))
        if tag == "tr" and "data-key" in found:
            self.row = {
                "table": self.table,
                "key": found["data-key"],
                "columns": list(self.columns),
                "cells": [],
            }
        if tag == "td" and self.row is not None:
            self.row["cells"].append({"sort": found.get("data-sort"), "score": "", "small": ""})
        self.part = str(found.get("class")) if tag == "span" else ""

    def handle_endtag(self, tag: str) -> None:
        self.part = ""
        if tag == "tr" and self.row is not None:
            self.rows.append(self.row)
            self.row = None

    def handle_data(self, data: str) -> None:
        if self.row is not None and self.row["cells"] and self.part in ("score", "small"):
            self.row["cells"][-1][self.part] += data


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", "").strip("% "))


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    place = report.report(RESULTS, tmp_path_factory.mktemp("site"))
    return Front(place.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made() -> list[tuple[str, dict[str, Any]]]:
    """All records as plain JSON, each with the start of the key that names its setting."""
    return [
        (record.setting(record.read(place))[:8], json.loads(place.read_text(encoding="utf-8")))
        for place in record.files(RESULTS)
    ]


def says(cell: dict[str, Any], scores: list[dict[str, Any]]) -> bool:
    """Whether a cell is the mean over seeds, and its interval Student's t or that of the one seed."""
    values, low, high = [score["value"] for score in scores], scores[0]["low"], scores[0]["high"]
    mean = np.mean(values)
    if len(values) > 1:
        low, high = reference.t.interval(0.95, len(values) - 1, mean, reference.sem(values))
    shown = [number(end) for end in cell["small"].split(" to ")] if low is not None else []
    return (
        float(cell["sort"]) == pytest.approx(mean, abs=1e-9)
        and number(cell["score"]) == pytest.approx(mean, rel=5e-3, abs=0.006)
        and shown == pytest.approx([low, high][: len(shown)], rel=5e-3, abs=0.006)
    )


def test_every_score_of_the_front_page_is_the_mean_of_records(front: Front, made: list[Any]) -> None:
    scores: dict[tuple[str, ...], dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for key, each in sorted(made, key=lambda pair: pair[1]["created"]):
        score = each["metrics"][each["primary"]]
        place = (key, each["protocol"]["name"], each["data"]["name"])
        scores[place][each["fingerprint"]][each["seed"]] = score  # the newest of a seed
    checked = 0
    for row in front.rows:
        for (protocol, data), cell in zip(row["columns"], row["cells"], strict=False):
            if not cell["score"]:
                continue
            ways = scores[row["key"], protocol, data].values()
            assert any(says(cell, list(seeds.values())) for seeds in ways), (row["key"], protocol, data)
            checked += 1
    assert checked > 50


def test_no_score_is_missing_from_the_front_page(front: Front, made: list[Any]) -> None:
    """Every record has its line, and a column shows all that was scored in its way."""
    scored = {
        (key, each["protocol"]["name"], each["data"]["name"], each["fingerprint"]) for key, each in made
    }
    assert {key for key, *_ in scored} == {row["key"] for row in front.rows}
    tables: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in front.rows:
        tables[row["table"], tuple(row["columns"])].append(row)
    for (_, columns), rows in tables.items():
        for place, column in enumerate(columns):
            shown = {row["key"] for row in rows if row["cells"][place]["score"]}
            ways = {way for *_, way in scored if shown == {
                row["key"] for row in rows if (row["key"], *column, way) in scored
            }}  # fmt: skip
            assert ways, f"what {column} shows is not all that was scored in any one way"


@pytest.mark.parametrize("device", file.DEVICES)
def test_the_sweep_has_every_method_or_says_why_not(device: str) -> None:
    sweep = file.read(RESULTS / "sweeps" / "cifar10.toml", device)
    equal_images, equal_cost, *_ = map(file.cases, sweep.runs)
    for cases, left_out in (equal_images, equal_cost):
        assert {case.method for case in cases} | {each.what for each in left_out} >= registry.methods().keys()
        assert len({case.overrides[-1] for case in cases if case.method != "random_init"}) == 1  # the budget
        assert all(len(case.seeds) == 3 for case in cases)
    for slug, card in registry.methods().items():
        protocols = {case.protocol.partition(":")[0] for case in equal_images[0] if case.method == slug}
        assert protocols == set(card.protocols) or slug in {each.what for each in equal_images[1]}


def test_every_setting_of_the_sweep_is_one(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(real_data))
    from mimbench import progress
    from mimbench.sweep import plan

    for device in file.DEVICES:
        sweep = file.read(RESULTS / "sweeps" / "cifar10.toml", device)
        made = plan.plan(sweep, progress.quiet())
        assert made.count("pretrain", todo=False) > 100
        # One that needs a teacher needs that of its own seed and budget.
        students = [task for task in made.tasks.values() if task.kind == "pretrain" and task.needs]
        assert {task.method for task in students} == {"dmae", "beitv2"}
        for task in students:
            assert {made.tasks[name].seed for name in task.needs} == {task.seed}
