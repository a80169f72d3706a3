"""The odometer: every read of test labels is counted, and what the best of several flatters is a paired difference."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_record import make_record
from test_report import Page, crawl, made, render
from test_report import suite as suite

from mimbench import odometer, record, stats
from mimbench.record import DataUsed, Record
from mimbench.task import Metric


def test_reads_add_up_by_data_set_encoder_and_protocol() -> None:
    runs = [
        make_record(test_reads=3),
        make_record(protocol="linear", test_reads=2),
        make_record(seed=1, test_reads=1),
        make_record(method="simmim", test_reads=4, data=DataUsed("camvid", "x", "", 10, 20), correct=None),
        make_record(protocol="throughput", test_reads=0),
    ]
    cifar, camvid = odometer.dials(reversed(runs))
    assert (cifar.data, cifar.reads, cifar.runs, cifar.protocols) == (
        "cifar10",
        6,
        3,
        {"knn": 4, "linear": 2},
    )
    assert [(each.seed, each.reads, each.runs) for each in cifar.encoders] == [(0, 5, 2), (1, 1, 1)]
    assert (camvid.reads, camvid.accuracies, camvid.n, len(camvid.encoders)) == (4, 0, 20, 1)
    assert cifar.accuracies == 6
    assert odometer.dials(runs[-1:]) == []


def test_an_encoder_that_other_code_made_again_is_the_same() -> None:
    first = make_record()
    pretrain = dataclasses.replace(first.pretrain, key="another")
    (dial,) = odometer.dials([first, make_record(protocol="linear", pretrain=pretrain)])
    assert [each.reads for each in dial.encoders] == [2]


@pytest.mark.parametrize(("reads", "n"), [(2, 100), (18, 400), (200, 10_000)])
def test_no_choice_among_equal_encoders_flatters_by_more(reads: int, n: int) -> None:
    draw = np.random.default_rng(reads)
    scores = 100 * draw.binomial(n, 0.5, (2000, reads)) / n  # accuracies that scatter most, independent
    gain = float(scores.max(1).mean()) - 50
    bound = odometer.Dial("d", n, accuracies=reads).flattery
    assert 0.4 * bound < gain < bound
    assert odometer.Dial("d", n, accuracies=1).flattery == odometer.Dial("d", n).flattery == 0


def chosen(right: np.ndarray, on_test: bool = False, **changes: Any) -> Record:
    """A kNN run of which ``right`` (N,) says what it has right."""
    metric = Metric(100 * float(right.mean()), 0.0, 100.0, len(right))
    base = make_record()
    recipe = "dino_official" if on_test else "dino"
    settings = {"recipe": recipe, "ks": [10, 20], "selection_images": 0 if on_test else 10_000}
    details = {"chosen_on": "test", "test_top1": {"10": 50.0, "20": metric.value}} if on_test else {}
    protocol = dataclasses.replace(base.protocol, recipe=recipe, settings=settings)
    fields = {
        "metrics": {"top1": metric},
        "details": details,
        "correct": record.pack(right),
    }
    return dataclasses.replace(make_record(**(fields | changes)), protocol=protocol)


def test_what_the_best_on_test_flatters_is_a_paired_difference() -> None:
    draw = np.random.default_rng(0)
    ours = draw.random(400) < 0.6
    best = ours | (draw.random(400) < 0.05)
    (found,) = odometer.optimism([chosen(ours), chosen(best, on_test=True), make_record(seed=5)])
    assert found.paired == stats.paired(best, ours)
    assert found.paired.difference == pytest.approx(100 * (best.mean() - ours.mean()))
    assert found.spread == pytest.approx(100 * best.mean() - 50)
    assert (found.best.protocol.recipe, found.ours.protocol.recipe) == ("dino_official", "dino")


def test_only_equal_weights_data_and_settings_are_paired() -> None:
    right = np.arange(400) % 3 > 0
    best = chosen(right, on_test=True)
    ours = chosen(right)
    other_ks = dataclasses.replace(ours.protocol, settings=ours.protocol.settings | {"ks": [10]})
    for other in (
        chosen(right, seed=1),
        chosen(right, pretrain=dataclasses.replace(ours.pretrain, key="other")),
        chosen(right, data=dataclasses.replace(ours.data, fingerprint="other")),
        dataclasses.replace(ours, protocol=other_ks),
        dataclasses.replace(ours, protocol=dataclasses.replace(ours.protocol, version=2)),
        chosen(right, correct=None),
        chosen(right, correct=record.pack(right[:-1])),
        chosen(right, on_test=True, seed=1),
    ):
        assert odometer.optimism([best, other]) == []
    assert len(odometer.optimism([best, ours])) == 1


# Its page


def test_the_page_shows_reads_and_what_they_may_flatter(suite: Any, tmp_path: Path) -> None:
    right = record.pack(np.arange(360) % 3 > 0)
    runs = [made(seed=0, test_reads=3, correct=right), made("beta", test_reads=2, correct=right)]
    site = render(tmp_path, *runs, made(protocol="robustness"))
    pages = crawl(site)
    said = " ".join(" ".join(pages[site / "odometer.html"].texts).split())
    assert "6 reads of test labels" in said
    assert "digits 360 6 2 3 linear 5, robustness 1" in said
    assert f"{50 / math.sqrt(360) * math.sqrt(2 * math.log(5)):.1f}" in said
    assert "No encoder has been scored in both ways yet" in said
    assert "odometer.html" in (site / "about.html").read_text()
    empty = " ".join(Page((render(tmp_path / "empty") / "odometer.html").read_text()).texts)
    assert "No test label has been read yet" in empty


def test_a_test_selected_row_is_marked_and_ranks_apart(suite: Any, tmp_path: Path) -> None:
    right = np.arange(360) % 3 > 0
    more = right | (np.arange(360) % 40 == 0)
    shared = {"correct": record.pack(right), "metrics": {"top1": Metric(66.7, 61.6, 71.4, 360)}}
    ours = made("alpha", **shared)
    best, rival = (
        made(
            slug,
            metrics={"top1": Metric(100 * float(more.mean()), 60.0, 75.0, 360)},
            correct=record.pack(more),
            details={"chosen_on": "test", "test_top1": {"10": 60.0, "20": 67.2}},
            protocol="linear",
            recipe="official",
            test_reads=2,
        )
        for slug in ("alpha", "beta")
    )
    site = render(tmp_path, ours, best, rival)
    crawl(site)
    page = (site / "protocols" / "linear.html").read_text()
    captions = [text.partition("</caption>")[0] for text in page.split("<caption id=")[1:]]
    assert [("test-selected" in caption) for caption in captions] == [False, True]
    said = " ".join(" ".join(Page((site / "odometer.html").read_text()).texts).split())
    assert "10: 60.00, 20: 67.20 2 looked at 7.20" in said
    assert "Of 1 encoder scored in both ways: 0.83 points on average, 0.83 at most; for 0 both" in said
    found = stats.paired(more, right)
    assert f"+{found.difference:.2f}" in said
    assert "test-selected" in (site / "runs" / f"{best.id}.html").read_text().lower()
    assert "test-selected" not in (site / "runs" / f"{ours.id}.html").read_text().lower()
    front = Page((site / "index.html").read_text())
    assert any("66.7" in text for text in front.texts)
    assert not any("67.2" in text for text in front.texts), "nor does the front page"
    badge = next((site / "badges").glob("alpha*.svg")).read_text()
    assert "66.7" in badge, "a badge never says the best on test"
