"""The report: what it claims of the records, and pages that hold together whatever the records hold."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import duckdb
import numpy as np
import pyarrow.parquet
import pytest

from mimbench import certificate, database, export, paths, record, registry, speed, stats
from mimbench import report as rendering
from mimbench import reported as reporting
from mimbench.record import DataUsed, EncoderUsed, MethodUsed, Pretraining, ProtocolUsed, Record
from mimbench.report import drawings, ranking, speeds, words
from mimbench.report.ablations import ablations
from mimbench.report.board import boards
from mimbench.report.pages import pages as each_page
from mimbench.report.source import Source, load
from mimbench.task import Metric


def rendered(source: Source) -> dict[str, bytes]:
    return dict(each_page(source))


HOSTILE = "<script>alert(1)</script>\"'&" + "x" * 90 + " \u05e9\u05dc\u05d5\u05dd \u202eevil"
REPORTED_HEADER = (
    "method,backbone,pretrain_data,pretrain_epochs,image_size,protocol,dataset,metric,value,unit,source,"
    "locator,confidence\n"
)


def card(folder: Path, slug: str, family: str = "image-ssl", **more: Any) -> registry.Card:
    place = folder / slug
    place.mkdir(parents=True)
    (place / "method.py").write_text(f"SLUG = {slug!r}\n")
    protocols = ("linear", "robustness")
    return registry.Card(
        slug=slug, folder=place, title=f"On {slug}", family=family, protocols=protocols, **more
    )


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, registry.Card]]:
    """Two methods, a floor and a ceiling, and two protocols, in place of the clone's."""
    cards = [
        card(
            tmp_path / "methods",
            "alpha",
            arxiv="2111.06377",
            venue="CVPR 2022",
            code="someone/alpha",
            licence="MIT",
            summary="Hides most of the image and asks for the rest.",
            deviations=("Trained for fewer epochs.",),
        ),
        card(tmp_path / "methods", "beta", code="javascript:alert(1)"),
        card(tmp_path / "methods", "noise", "baseline"),
        card(tmp_path / "methods", "labels", "baseline"),
    ]
    protocols = {}
    for name in ("linear", "robustness"):
        file = tmp_path / "protocols" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f'"""Scores by {name}.\n\nA second paragraph.\n"""\nVERSION = 1\nNEEDS = ("labels",)\n'
        )
        protocols[name] = registry.ProtocolCard(name, file, 1, f"Scores by {name}.", ("labels",))
    found = {card.slug: card for card in cards}
    monkeypatch.setattr(registry, "methods", lambda: found)
    monkeypatch.setattr(registry, "protocols", lambda: protocols)
    monkeypatch.setattr(paths, "papers", lambda: tmp_path / "papers")
    for cached in (record.method_code, record.protocol_code):
        cached.cache_clear()
    yield found
    for cached in (record.method_code, record.protocol_code):
        cached.cache_clear()


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, registry.Card]]:
    yield from stand_in(tmp_path, monkeypatch)


def made(slug: str = "alpha", value: float = 60.0, seed: int = 0, half: float = 1.0, **more: Any) -> Record:
    """A record of ``slug`` under ``linear`` with the interval ``value`` +- ``half``; ``more`` replaces fields."""
    known = slug in registry.methods()
    epochs = more.pop("epochs", 0 if slug == "noise" else 20)
    recipe, name = more.pop("recipe", "cached"), more.pop("protocol", "linear")
    fields: dict[str, Any] = {
        "command": f"mimbench run --method {slug} --protocol {name} --seed {seed}",
        "method": MethodUsed(slug, record.method_code(slug) if known else "gone"),
        "protocol": ProtocolUsed(
            name,
            1,
            recipe,
            record.protocol_code(name),
            {"recipe": recipe, "pool": "mean", "training": {"lr": 0.1}},
        ),
        "config": {"mask_ratio": 0.75, "recipe": {"epochs": epochs, "betas": [0.9, 0.95]}},
        "preset": "smoke",
        "overrides": {},
        "seed": seed,
        "pretrain": Pretraining(
            "digits",
            "d1",
            f"{slug}-{seed}",
            epochs * 1437,
            epochs * 12,
            epochs,
            61.5,
            61.5,
            0,
            10**8,
            "fp32",
            False,
        ),
        "data": DataUsed("digits", "d1", "", 1437, 360),
        "encoder": EncoderUsed(800_000, "mean of the patch tokens", 64, 32, [0.5] * 3, [0.25] * 3),
        "backbone": "vit 4x64/4",
        "environment": {"python": "3.11.7", "torch": "2.13.0", "cpu": "A processor", "gpu": None},
        "git": {"commit": "0" * 40, "dirty": False},
        "seconds": {"features": 1.25, "total": 4.5},
        "curve": [
            {"step": s, "epoch": s / 12, "lr": 1e-3, "loss": 1 / (1 + s / 50) + 0.01 * seed}
            for s in range(epochs * 12)
        ],
        "metrics": {
            "top1": Metric(value, value - half, value + half, 360),
            "top5": Metric(95.0, 94.0, 96.0, 360),
        },
        "primary": "top1",
        "created": f"2026-11-{10 + seed % 20:02d}T12:00:00+00:00",
    }
    return Record(**(fields | more))


def budgeted(slug: str, value: float, budget: str, seed: int = 0, **more: Any) -> Record:
    """A record trained by ``budget``, in which each seed got differently far."""
    base = made(slug, value, seed)
    reached = dataclasses.replace(
        base.pretrain,
        epochs=3.0 + seed / 5,
        images=150_000 + 10_000 * seed,
        seconds=117.0 + seed,
        precision="bf16",
        compiled=True,
    )
    config = {"recipe": {"epochs": 20, "budget": budget}}
    return made(
        slug, value, seed, pretrain=reached, config=config, overrides={"recipe": {"budget": budget}}, **more
    )


def tables(*records: Record, papers: Any = ()) -> list[ranking.Table]:
    return ranking.tables(records, papers)


def render(tmp_path: Path, *records: Record) -> Path:
    for each in records:
        record.write(each, tmp_path / "results")
    return rendering.report(tmp_path / "results", tmp_path / "site").parent


# What it claims


def test_only_equal_fingerprints_share_a_table(suite: Any) -> None:
    found = tables(
        made("alpha"), made("beta"), made("beta", recipe="mae"), made("alpha", protocol="robustness")
    )
    shown = [(t.protocol, t.recipe, [r.method for r in t.rows]) for t in found]
    assert shown == [
        ("linear", "cached", ["alpha", "beta"]),
        ("linear", "mae", ["beta"]),
        ("robustness", "cached", ["alpha"]),
    ]
    assert len({t.fingerprint for t in found}) == len({t.anchor for t in found}) == 3


def test_a_row_is_the_mean_of_its_seeds_with_students_interval(suite: Any) -> None:
    row = tables(made(value=60, seed=0), made(value=61, seed=1), made(value=65, seed=2))[0].rows[0]
    # 62 +- t(0.975, 2 df) * s / sqrt(3) with s = sqrt(7), t = 4.302653
    assert (row.mean, row.seeds) == (62, (0, 1, 2))
    assert row.high == pytest.approx(62 + 4.302653 * 7**0.5 / 3**0.5, abs=1e-5)
    alone = tables(made(value=60, seed=5, half=2))[0].rows[0]
    assert (alone.mean, alone.low, alone.high) == (60, 58, 62)


def test_other_settings_are_other_rows(suite: Any) -> None:
    pairs = [
        made(),
        made(epochs=40),
        made(preset="cifar"),
        made(config={"mask_ratio": 0.9}, overrides={"mask_ratio": 0.9}),
    ]
    rows = tables(*pairs)[0].rows
    assert len(rows) == 4
    assert {row.overrides for row in rows} == {"", "mask_ratio=0.9"}


def test_rows_by_epochs_and_rows_of_each_budget_are_ranked_apart(suite: Any) -> None:
    gpu = {"environment": {"cpu": "A processor", "threads": 2, "device": "cuda", "gpu": "A GPU"}}
    found = tables(
        *(made("alpha", 60), made("beta", 50), made("noise", 40), made("labels", 90)),
        *(budgeted("alpha", 41 + seed / 10, "2m", seed) for seed in range(2)),
        *(budgeted("beta", 45, "2m"), budgeted("beta", 46, "2m", seed=1, **gpu)),
        *(budgeted("alpha", 30, "200000img"), budgeted("beta", 35, "200000img", **gpu)),
    )
    shown = {t.view: [(r.method, r.rank, r.seeds) for r in t.rows] for t in found}
    assert list(shown.items()) == [
        ("epochs", [("labels", "", (0,)), ("alpha", "1", (0,)), ("beta", "2", (0,)), ("noise", "", (0,))]),
        ("200000img", [("noise", "", (0,)), ("beta", "1", (0,)), ("alpha", "2", (0,))]),
        # Two minutes on another machine are another cost.
        ("2m on A GPU", [("beta", "–", (1,)), ("noise", "", (0,))]),
        ("2m on A processor, threads: None", [
            *(("beta", "1–2", (0,)), ("alpha", "1–2", (0, 1)), ("noise", "", (0,))),
        ]),
    ]  # fmt: skip
    alpha = found[-1].rows[1]
    assert (alpha.effort, alpha.seconds) == ("budget 2m: 3.1 epochs, 155,000 images", 117.5)
    assert alpha.how == "bf16, compiled"
    assert [line["role"] for line in alpha.strip["lines"]] == ["floor"]  # no ceiling had this budget
    assert len({t.anchor for t in found}) == 4


def test_floors_alone_are_a_table_by_epochs(suite: Any) -> None:
    assert [(t.view, [r.role for r in t.rows]) for t in tables(made("noise"))] == [("epochs", ["floor"])]


def test_a_mean_never_mixes_code(suite: Any) -> None:
    old = MethodUsed("alpha", "other")
    fresh, former = made(value=60, seed=0), made(value=90, seed=1, method=old)
    row = tables(fresh, former)[0].rows[0]
    assert (row.mean, row.seeds, row.stale) == (60, (0,), "")
    row = tables(former)[0].rows[0]
    assert "the code of alpha has changed" in row.stale


def test_the_newest_run_of_a_seed_counts(suite: Any) -> None:
    late = made(value=70, created="2026-12-01T00:00:00+00:00")
    assert tables(late, made(value=60))[0].rows[0].mean == 70


def test_best_first_in_the_metrics_own_direction(suite: Any) -> None:
    def mce(slug: str, value: float) -> Record:
        return made(slug, metrics={"mce": Metric(value, value - 1, value + 1, 360)}, primary="mce")

    assert [r.method for r in tables(made("alpha", 60), made("beta", 70))[0].rows] == ["beta", "alpha"]
    found = tables(mce("alpha", 60), mce("beta", 70))[0]
    assert [(r.method, r.rank) for r in found.rows] == [("alpha", "1"), ("beta", "2")]


def test_ranks_say_only_what_intervals_separate(suite: Any, tmp_path: Path) -> None:
    for slug in ("c", "d", "e"):
        suite[slug] = card(tmp_path / "methods", slug)
    found = tables(
        made("alpha", 90, half=1),  # above all
        made("beta", 80, half=2),  # overlaps c
        made("c", 77, half=2),
        made("d", 72, half=12),  # overlaps beta and c, though not alpha
        made("e", 50, half=1),
        made("labels", 95, half=1),  # a baseline takes no place
    )[0]
    assert [(r.method, r.rank, r.tied) for r in found.rows] == [
        ("labels", "", False),
        ("alpha", "1", False),
        ("beta", "2–4", False),
        ("c", "2–4", True),
        ("d", "2–4", True),
        ("e", "5", False),
    ]


def seen(slug: str, right: np.ndarray, seed: int = 0, **more: Any) -> Record:
    """A record with what it has right; its interval is that of its score."""
    score = stats.accuracy(right)
    return made(slug, seed=seed, metrics={"top1": score}, correct=record.pack(right), **more)


def test_a_changed_setting_stands_beside_the_plain_one_with_their_paired_difference(suite: Any) -> None:
    right = np.arange(400) % 4 > 0
    worse = right.copy()
    worse[1:41:4] = False
    arm = {"overrides": {"mask_ratio": 0.5}, "config": {"mask_ratio": 0.5, "recipe": {"epochs": 20}}}
    other = {"overrides": {"depth": 2}, "config": {"depth": 2, "recipe": {"epochs": 30}}, "epochs": 30}
    found = ablations(
        "alpha", tables(seen("alpha", right), seen("alpha", worse, **arm), seen("beta", worse, **other))
    )
    assert [(each["base"].overrides, [line["changed"] for line in each["lines"]]) for each in found] == [
        ("", ["mask_ratio = 0.5"])
    ]
    pair = found[0]["lines"][0]["paired"]
    assert (found[0]["lines"][0]["difference"], pair.only_a, pair.only_b) == (-2.5, 0, 10)
    page = rendered(Source([seen("alpha", right), seen("alpha", worse, **arm)]))[
        "methods/alpha.html"
    ].decode()
    assert "<bdi>mask_ratio = 0.5</bdi>" in page
    assert "−2.5" in page.partition('id="ablations"')[2].partition("<h2")[0]


def test_methods_that_do_not_differ_are_tied_and_a_paired_test_separates_what_intervals_cannot(
    suite: Any, tmp_path: Path
) -> None:
    suite["gamma"] = card(tmp_path / "methods", "gamma")
    right = np.arange(2000) % 10 < 7
    same = np.roll(right, 3)  # as many, of other images
    better = right.copy()
    better[np.flatnonzero(~right)[:40]] = True  # 2 points more, and nothing lost
    rows = tables(seen("alpha", right), seen("beta", same), seen("gamma", better))[0].rows
    found = {row.method: row for row in rows}
    assert found["gamma"].low < found["alpha"].high  # type: ignore[operator]  # the intervals overlap
    assert {name: row.rank for name, row in found.items()} == {"gamma": "1–2", "alpha": "2–3", "beta": "1–3"}
    several = [
        run
        for s in range(3)
        for run in (seen("alpha", np.roll(right, s), s), seen("beta", np.roll(same, s), s))
    ]
    assert [row.rank for row in tables(*several)[0].rows] == ["1–2", "1–2"]
    site = rendered(Source(several))
    assert site["index.html"].decode().count('title="rank">1–2</span>') == 2
    assert site["protocols/linear.html"].decode().count(">not separated from the row above</span>") == 1


def test_the_front_page_shows_the_scoring_of_most_methods_and_never_the_best_on_the_test_split(
    suite: Any,
) -> None:
    flattered = {"recipe": "best", "details": {"chosen_on": "test"}}
    records = [
        *(made("alpha", 60), made("beta", 50), made("alpha", 99, recipe="rare")),
        *(made(slug, 98, **flattered) for slug in ("alpha", "beta", "noise")),
    ]
    (board,) = boards(tables(*records), [], {})
    assert [(column.recipe, column.others) for column in board.columns] == [("cached", 2)]
    assert {line.row.method for line in board.lines} == {"alpha", "beta"}


def test_what_all_rows_change_is_said_once(suite: Any) -> None:
    both = {"recipe": {"precision": "bf16"}}
    first = made("alpha", 60, overrides={"mask_ratio": 0.5, **both}, config={"mask_ratio": 0.5})
    (table,) = tables(first, made("beta", 50, overrides=both), made("gamma", 40, overrides=both))
    assert table.shared == "recipe.precision=bf16"
    assert [row.changed for row in table.rows] == ["mask_ratio=0.5", "", ""]
    (board,) = boards([table], [], {})
    assert (board.shared, [line.changed for line in board.lines]) == (
        table.shared,
        ["mask_ratio=0.5", "", ""],
    )


def test_a_line_says_from_how_few_seeds_it_is(suite: Any, tmp_path: Path) -> None:
    often = [made("alpha", 60.0 + seed, seed) for seed in range(3)]
    once = [
        made("alpha", 30.0, protocol="robustness"),
        made("beta", 50.0),
    ]
    (board,) = boards(tables(*often, *once), [], {})
    assert {line.row.method: (line.seeds, line.most) for line in board.lines} == {
        "alpha": (1, 3),
        "beta": (1, 1),
    }
    front = (render(tmp_path, *often, *once) / "index.html").read_text(encoding="utf-8")
    assert front.count(">1–3 seeds<") == front.count(">single seed<") == 1


def test_operations_of_an_image_are_counted_one_by_one(suite: Any) -> None:
    plain = made("alpha", 60)
    counted = {**plain.metrics, "flops_inference": Metric(0.0646, unit="GFLOP/image")}
    measured = dataclasses.replace(made("alpha", 900, recipe="quick"), metrics=counted)
    (board,) = boards(tables(plain, measured, made("beta", 50)), [], {})
    assert {line.row.method: line.flops for line in board.lines} == {
        "alpha": pytest.approx(64.6e6),
        "beta": None,
    }
    assert words.short(64.6e6) == "64.6 M"


def test_no_more_than_a_twentieth_of_equal_tables_has_a_separated_pair() -> None:
    draw = np.random.default_rng(0)
    ease, wrong = draw.normal(size=300), 0
    for _ in range(200):
        p = stats.pairwise(ease + draw.normal(size=(5, 1, 300)) > 0)[np.triu_indices(5, 1)]
        wrong += min(stats.holm(p.tolist())) < 0.05
    assert (
        wrong <= 14
    )  # of 200 at 5 %; more come by chance in 7 % of cases, and the test errs on the safe side


def test_a_row_without_interval_is_separated_from_none(suite: Any) -> None:
    bare = made("beta", 10, metrics={"top1": Metric(10.0)})
    assert [r.rank for r in tables(made("alpha", 90), bare)[0].rows] == ["1–2", "1–2"]
    assert [r.rank for r in tables(made("alpha", 90), made("noise"))[0].rows] == ["–", ""]


def test_baselines_are_lines_for_the_same_backbone(suite: Any) -> None:
    found = tables(
        made("alpha", 60), made("noise", 40), made("labels", 90), made("beta", 70, backbone="resnet18-cifar")
    )[0]
    rows = {row.method: row for row in found.rows}
    assert (rows["noise"].role, rows["labels"].role, rows["alpha"].role) == ("floor", "ceiling", "")
    assert {line["role"] for line in rows["alpha"].strip["lines"]} == {"floor", "ceiling"}
    assert rows["beta"].strip["lines"] == []
    floor, mean, ceiling = (rows[s].strip["mean"] for s in ("noise", "alpha", "labels"))
    assert 0 < floor < mean < ceiling < ranking.STRIP


def reported(**more: Any) -> dict[str, Any]:
    row = {
        "slug": "alpha", "method": "alpha", "backbone": "ViT-4x64/4", "pretrain_data": "Digits",
        "pretrain_epochs": 20.0,
        "image_size": "32", "protocol": "linear", "dataset": "digits", "metric": "top1", "value": 58.5, "unit": "%",
        "source": "arXiv 2111.06377", "locator": "Table 1", "confidence": "verified",
    }  # fmt: skip
    return row | more


def test_a_gap_needs_every_setting_to_match(suite: Any) -> None:
    ours = made(value=60, recipe="alpha", backbone="vit 4x64/4")
    row = tables(ours, papers=[reported()])[0].rows[0]
    assert (row.gap, row.differences) == (1.5, [])
    for change, difference in {
        "backbone": "backbone", "pretrain_data": "pretraining data", "pretrain_epochs": "epochs",
        "dataset": "evaluation data", "metric": "metric", "unit": "unit",
        "image_size": "image size",
    }.items():  # fmt: skip
        for other in (800.0 if change == "pretrain_epochs" else "other", None):
            row = tables(ours, papers=[reported(**{change: other})])[0].rows[0]
            assert (row.gap, row.differences) == (None, [difference])
    assert tables(made(value=60), papers=[reported()])[0].rows[0].differences == ["recipe"]


def test_the_database_says_the_same(suite: Any, tmp_path: Path) -> None:
    (suite["alpha"].folder / "reported.csv").write_text(
        f"{REPORTED_HEADER}alpha,vit 4x64/4,digits,20,32,linear,digits,top1,58.5,%,paper,Table 1,verified\n"
    )
    records = [
        *(made("alpha", value, seed, recipe="alpha") for seed, value in enumerate((60.0, 61.0, 65.0))),
        made("beta", 58, seed=1, recipe="alpha"),
        made("beta", 90, recipe="alpha", method=MethodUsed("beta", "other")),
        made("noise", 40, recipe="alpha"),
        made("beta", 20, recipe="mae"),
        *(
            budgeted("alpha", value, "2m", seed, recipe="alpha")
            for seed, value in enumerate((40.0, 41.0, 48.0))
        ),
        budgeted("beta", 70, "2m", recipe="alpha"),
        budgeted("labels", 80, "200000img", recipe="alpha"),
        made("gone", 30, recipe="dino"),  # has no folder, and a floor beside it
        made("noise", 25, recipe="dino"),
    ]
    for each in records:
        record.write(each, tmp_path / "results")
    source = load(tmp_path / "results")
    found = [(t, row) for t in ranking.tables(source.records, source.papers) for row in t.rows]
    database.update(tmp_path / "results")
    columns = "recipe, compared_by, method, mean, low, high, seeds, epochs, images, pretrain_seconds"
    _, rows = database.query(f"SELECT {columns} FROM leaderboard", tmp_path / "results")
    assert len(rows) == len(found) == 11
    for (table, row), cells in zip(found, rows, strict=True):
        recipe, view, method, mean, low, high, seeds, epochs, images, seconds = cells
        assert (table.recipe, table.view, row.method, len(row.seeds)) == (recipe, view, method, seeds)
        assert (row.epochs, row.seconds) == pytest.approx((epochs, seconds))
        assert not images or f"{images:,.0f} images" in row.effort
        assert (row.mean, row.low, row.high) == pytest.approx((mean, low, high))
    _, gaps = database.query("SELECT compared_by, gap FROM comparison", tmp_path / "results")
    expected = [(t.view, row.gap and pytest.approx(row.gap)) for t, row in found if row.reported]
    assert sorted(expected, key=str) == sorted(gaps, key=str)
    assert [gap for view, gap in gaps if view == "epochs"] == [62 - 58.5]


def test_the_nearest_reported_number_of_the_papers_own_is_shown(suite: Any) -> None:
    others = [
        reported(value=1.0, protocol="knn"),
        reported(value=2.0, method="rival"),
        reported(value=3.0, backbone="vit-b/16"),
    ]
    row = tables(made(), papers=[*others, reported()])[0].rows[0]
    assert row.reported is not None
    assert (row.reported["value"], row.more) == ("58.5", 1)
    assert tables(made("noise"), papers=[reported(slug="noise", method="noise")])[0].rows[0].reported is None


def test_per_class_numbers_become_a_heat_map(suite: Any) -> None:
    runs = [
        made(
            seed=0,
            details={
                "iou": {"sky": 80.0, "car": None},
                "chosen": 3,
                "blur": {"fog": [1.0, 3.0], "snow": [5.0, 9.0]},
            },
        ),
        made(
            seed=1,
            details={"iou": {"sky": 90.0, "car": 40.0}, "blur": {"fog": [2.0, 4.0], "snow": [6.0, 10.0]}},
        ),
    ]
    by_name = {heat["title"]: heat for heat in drawings.heats_of(tables(*runs)[0])}
    assert by_name["iou"]["columns"] == ["sky", "car"]
    assert [c["text"] for c in by_name["iou"]["rows"][0]["cells"]] == ["85.0", "40.0"]
    assert [c["text"] for c in by_name["blur"]["rows"][0]["cells"]] == ["2.5", "7.5"]
    assert "chosen" not in by_name
    deep = drawings.heats(
        {"accuracy": {"encoder": {"fog": {"1": 2.0, "2": 1.0}, "snow": {"1": 4.0, "2": 3.0}}}}
    )
    assert [(heat["title"], len(heat["rows"])) for heat in deep] == [("accuracy, encoder", 2)]
    severities = {heat["title"]: heat for heat in drawings.heats(runs[0].details)}["blur"]
    assert (severities["columns"], [r["name"] for r in severities["rows"]]) == (["1", "2"], ["fog", "snow"])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (61.25, "%", "61.2"), (-0.4, "%", "−0.4"), (12345.6, "images/s", "12,346"), (0.01234, "", "0.01234"),
        (0, "", "0"), (3.5e9, "", "3.5e+09"), (None, "", "–"), (float("nan"), "%", "not finite"), (100.0, "ms", "100"),
    ],
)  # fmt: skip
def test_numbers_read_well(value: float | None, unit: str, text: str) -> None:
    assert words.number(value, unit) == text


def test_docstrings_read_as_prose() -> None:
    text = """First line
    goes on.

    Then ``code``:

    one   an item
          goes on
    two   another
    """
    import inspect

    assert words.prose(inspect.cleandoc(text)) == [
        ["First line goes on."],
        ["Then ", "code", ":"],
        ["one an item goes on"],
        ["two another"],
    ]


def test_ticks_enclose_the_range_in_round_steps() -> None:
    assert drawings.ticks(0.13, 0.98) == [0, 0.25, 0.5, 0.75, 1.0]
    assert drawings.ticks(5, 5)[0] <= 5 < drawings.ticks(5, 5)[-1]
    assert drawings.ticks(-3e-9, 7e-9)[0] <= -3e-9


# The pages


class Page(html.parser.HTMLParser):
    """Ids, links, tags and text of a page; fails on tags that do not nest."""

    VOID = ("meta", "link", "img", "br", "col", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} runs a script"
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def crawl(site: Path) -> dict[Path, Page]:
    """Every page of a site, after a check that each link leads somewhere below it, or to https."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    linked = set()
    for file, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{file} has an id twice"
        for link in page.links:
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (file.parent / unquote(path)).resolve() if path else file
            assert target.is_relative_to(site.resolve()), link
            assert target.is_file(), f"{file.name}: {link} leads nowhere"
            linked.add(target)
            assert not anchor or anchor in pages[target].ids, f"{file.name}: {link} has no such place"
    assert {f.resolve() for f in pages} <= linked, "a page that nothing links to"
    return pages


def catalogue(tmp_path: Path, suite: dict[str, registry.Card]) -> None:
    """Three papers: one is here, one is planned and hostile, and of one no number is known."""
    others, quoted = tmp_path / "papers" / "reported", HOSTILE.replace('"', "")
    others.mkdir(parents=True)
    (others.parent / "papers.csv").write_text(
        "slug,title,arxiv,venue,year,family,code,licence\n"
        "alpha,On alpha,2111.06377,CVPR 2022,2022,image-ssl,someone/alpha,MIT\n"
        f'later,"{quoted}",1708.04552,"{quoted}",2017,"{quoted}",javascript:alert(1),"{quoted}"\n'
        "silent,Silent,1708.04553,,2018,text,,\n"
    )
    (others / "later.csv").write_text(
        f'{REPORTED_HEADER}later,"{quoted}",,,,linear,cifar-10,top1,71.25,%,"{quoted}",Table 3,verified\n'
        'rival,,,,,linear,cifar-10,top1,64.0,%,elsewhere,"Table 9, row 2",secondary\n'
    )


@pytest.fixture
def everything(suite: dict[str, registry.Card], tmp_path: Path) -> list[Record]:
    return every_kind(suite, tmp_path)


def every_kind(suite: dict[str, registry.Card], tmp_path: Path) -> list[Record]:
    """Seeds, recipes, a stale run, baselines, heat maps, a method without a folder, and a hostile run."""
    setting, source = "alpha,vit-b/16,imagenet-1k,1600,224,linear,imagenet-1k,top1", HOSTILE.replace('"', "")
    (suite["alpha"].folder / "reported.csv").write_text(
        f'{REPORTED_HEADER}{setting},68.0,%,"{source}",Table 12,verified\n{setting},67.8,%,elsewhere,,secondary\n'
    )
    (suite["alpha"].folder / "masking.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (suite["alpha"].folder / "README.md").write_text("![Four digits <masked>](masking.svg)")
    catalogue(tmp_path, suite)
    corruptions = {"accuracy": {"fog": [60.0, 50.0], "snow": [70.0, 40.0]}}
    hostile = made(
        HOSTILE,
        preset=HOSTILE,
        backbone=HOSTILE,
        command=HOSTILE,
        config={HOSTILE: [HOSTILE]},
        warnings=[HOSTILE],
        overrides={HOSTILE: HOSTILE},
        details={HOSTILE: {HOSTILE: 1.0, "other": 2.0}},
        data=DataUsed(HOSTILE, "h", HOSTILE, 3, 3),
        seconds={HOSTILE: 1.0},
        environment={HOSTILE: HOSTILE},
    )
    return [
        *(made("alpha", 60 + seed, seed) for seed in range(3)),
        made("beta", 58, warnings=["the loss rose"], method=MethodUsed("beta", "other")),
        made("beta", 55, recipe="mae"),
        made("noise", 40),
        made("labels", 90),
        made("alpha", 50, protocol="robustness", details=corruptions),
        hostile,
    ]


def test_every_link_leads_somewhere_and_hostile_text_stays_text(
    everything: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = load(tmp_path / "results")
    assert (len(held.catalogue), held.faults) == (3, [])
    source = dataclasses.replace(held, records=everything, faults=[HOSTILE], comparisons=[timed(HOSTILE)])
    monkeypatch.setattr(rendering, "load", lambda folder: source)
    site = rendering.report(tmp_path, tmp_path / "site").parent
    pages = crawl(site)
    assert len([f for f in pages if f.parent.name == "runs"]) == len(everything)
    for file, page in pages.items():
        own = 3 if file.name == "compare.html" else 1
        assert page.tags.count("script") == own, f"{file} lets a script in"
        assert page.tags.count("h1") == 1
        assert len(file.name) < 100
        assert "javascript:" not in " ".join(page.links)
    seen = HOSTILE.replace("\u202e", "\\u202e")
    hostile = next(page for page in pages.values() if sum(seen in text for text in page.texts) > 8)
    assert "bdi" in hostile.tags
    assert not any("\u202e" in text for page in pages.values() for text in page.texts)
    speed_page = next(page for file, page in pages.items() if file.name == "speed.html")
    assert sum(seen in text for text in speed_page.texts) > 8
    index = (site / "index.html").read_text()
    assert not re.search(r"https?://(?!arxiv|github)", index), "something is fetched from elsewhere"
    assert (site / "methods" / "pictures" / "alpha-masking.svg").is_file()


def test_the_same_records_give_the_same_bytes_and_leave_files_alone(
    everything: list[Record], tmp_path: Path
) -> None:
    records = everything[:-1]
    site = render(tmp_path, *records)
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in site.rglob("*") if f.is_file()}
    rendering.report(tmp_path / "results", site)
    assert before == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in site.rglob("*") if f.is_file()}
    source = load(tmp_path / "results")
    backwards = dataclasses.replace(source, records=source.records[::-1])
    assert rendered(backwards) == rendered(source)


def test_pages_of_deleted_records_go_and_strangers_stay(suite: Any, tmp_path: Path) -> None:
    site = render(tmp_path, made(seed=0), made(seed=1))
    stranger = site / "runs" / "mine.html"
    stranger.write_text("mine")
    gone = made(seed=1)
    record.place(gone, tmp_path / "results").unlink()
    render(tmp_path)
    assert not (site / "runs" / f"{gone.id}.html").exists()
    assert (site / "runs" / f"{made(seed=0).id}.html").is_file()
    assert stranger.is_file()


def test_no_records_yet(suite: Any, tmp_path: Path) -> None:
    site = render(tmp_path)
    crawl(site)
    assert "mimbench run --method" in (site / "index.html").read_text()


def test_a_damaged_record_is_named_and_the_rest_rendered(suite: Any, tmp_path: Path) -> None:
    bad = record.place(made(seed=1), tmp_path / "results")
    bad.parent.mkdir(parents=True)
    bad.write_text('{"schema": 1, "id"')
    index = (render(tmp_path, made(seed=0)) / "index.html").read_text()
    assert "1 file could not be read" in index
    assert bad.name in index
    assert str(tmp_path) not in index
    assert "60.0" in index


def test_parity_is_shown_beside_the_method_and_with_its_numbers(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "code_of", lambda slug: "today")
    rows = [certificate.Comparison("pred", 4.4e-7, 1e-5), certificate.Comparison("grad_norm", 1e-5, 1e-4)]
    good = certificate.Certificate("alpha", "alpha", "today", "them/alpha", "abcdef1234", "2.13", rows)

    def pages(*found: certificate.Certificate) -> tuple[str, str, str]:
        source = Source([made()], certificates=list(found))
        site = rendered(source)
        names = ("index", "methods/alpha", "protocols/linear")
        return tuple(site[f"{name}.html"].decode() for name in names)  # type: ignore[return-value]

    index, page, protocol = pages(good)
    assert '#parity">4e-07</a>' in index
    assert "equals the authors’ code to 4e-07</a>" in protocol
    assert "them/alpha</bdi> abcdef1" in page
    assert "4.4e-07" in page
    index, _, protocol = pages(dataclasses.replace(good, code="older"))
    assert "equals the authors’ code to 4e-07, before a change" in protocol
    assert 'title="the code has changed since"' in index
    wrong = dataclasses.replace(good, rows=[certificate.Comparison("pred", 0.1, 1e-5)])
    assert '#parity">differs</a>' in pages(wrong)[0]
    assert "#parity" not in pages()[0]


def test_weights_from_elsewhere_are_said_to_be(suite: Any) -> None:
    pretrain = dataclasses.replace(
        made().pretrain, dataset="mae.pth", images=0, steps=0, epochs=0, seconds=0.0
    )
    site = rendered(Source([made(pretrain=pretrain, overrides={"weights": "0123"})]))
    page = site["protocols/linear.html"].decode()
    assert '<bdi>mae.pth</bdi><span class="small">trained elsewhere</span>' in page
    assert "vit 4x64/4</bdi>, <bdi>mae.pth</bdi>" in site["index.html"].decode()


def timed(name: str = "knn", **more: Any) -> speed.Comparison:
    """A comparison with a bar of each verdict; every text of it is ``name``."""
    fields: dict[str, Any] = {
        "name": name,
        "title": name,
        "work": name,
        "ours": "mimbench",
        "timings": [
            speed.Timing("mimbench", [1.0, 2.0, 4.0], "0.1.0"),
            speed.Timing("fast", [1.0, 1.5, 3.0], name, name),
            speed.Timing(name, [9.0, 6.0, 5.0]),
        ],
        "agreement": [name],
        "limit": speed.Limit(name, 0.5),
        "bars": [speed.Bar("fast", 1.2), speed.Bar(name, 3.0), speed.Bar("absent", 7.0)],
        "skipped": {"absent": f"{name} is not installed"},
        "growth": [speed.Scale(name, 3.0, 5 * 2**20), speed.Scale("2x", 6.0)],
        "created": "2026-11-21T12:00:00Z",
        "environment": {"cpu": name, "gpu": None, "cores": 2, "python": name, "driver": "unseen"},
        "threads": 2,
    }
    return speed.Comparison(**(fields | more))


def test_a_comparison_shows_what_was_reached_and_what_was_missed(suite: Any, tmp_path: Path) -> None:
    empty = (render(tmp_path) / "speed.html").read_text()
    assert "make bench" in empty
    assert 'href="speed.html"' in (tmp_path / "site" / "index.html").read_text()
    file = speed.write(timed(name="knn-large"))
    assert file.parent == tmp_path / "results" / "speed"
    text = (render(tmp_path) / "speed.html").read_text()
    words = " ".join(" ".join(Page(text).texts).split())
    for expected in (
        *(
            "Of 3 bars, 1 reached, 1 missed, 1 not run",
            "should take at least 1.2 times",
            "it takes 0.75 times",
        ),
        *("it takes 3.00 times as long", "absent should take at least 7 times as long as ours"),
        *("Ours takes 4.00 times the limit", "knn-large is not installed", "5 MiB", "not measured"),
        *("21 November 2026", "2 threads of 2 cores", "1 to 4", "python benchmark/speed/knn.py --threads 2"),
    ):
        assert expected in words, expected
    assert "unseen" not in words
    assert re.findall(r'class="badge verdict ([\w-]+)"', text) == 2 * ["missed", "reached", "not-run"]
    names = re.findall(r'<th scope="row">(?:<bdi>)?([\w -]+)', text.partition('class="speed"')[2])
    assert names[:4] == ["the limit", "fast", "mimbench", "knn-large"]
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", text)]
    assert widths == [8.3, 25.0, 33.3, 100.0]  # 0.5, 1.5, 2 and 6 s


def test_comparisons_of_a_gpu_name_it_and_its_device(suite: Any) -> None:
    facts = {"cpu": "A processor", "gpu": "A GPU", "driver": "595", "cuda": "13"}
    view = speeds.speed_views([timed(device="cuda", environment=facts, threads=1)])[0]
    assert (view["machine"], view["versions"]) == ("A GPU", "driver 595, cuda 13")
    assert view["command"] == "python benchmark/speed/knn.py --threads 1 --device cuda"


def test_a_damaged_comparison_is_named_and_the_rest_rendered(suite: Any, tmp_path: Path) -> None:
    file = speed.write(timed("knn"))
    file.with_name("torn.json").write_text("{")
    site = render(tmp_path, made())
    assert "speed/torn.json is no speed comparison" in (site / "index.html").read_text()
    assert 'id="s-knn' in (site / "speed.html").read_text()


def test_views_can_be_chosen_where_there_are_several(suite: Any, tmp_path: Path) -> None:
    site = render(tmp_path, made())
    assert "<fieldset" not in (site / "protocols" / "linear.html").read_text()
    assert 'name="view"' not in (site / "index.html").read_text()
    render(tmp_path, budgeted("alpha", 50, "200000img"))
    crawl(site)
    text = (site / "index.html").read_text()
    views = re.findall(r'<option value="(b-\w+)">([^<]+)', text)
    assert [name for _, name in views] == ["by epochs", "budget 200,000 images"]
    assert re.findall(r'<section class="board" id="(b-\w+)"', text) == [anchor for anchor, _ in views]
    assert '<form class="controls" hidden' in text, "without JavaScript a control that does nothing"
    text = (site / "protocols" / "linear.html").read_text()
    assert re.findall(r'name="view" value="(\w*)"', text) == ["", "epochs", "200000img"]
    assert '<fieldset class="views" hidden>' in text, "without JavaScript a control that does nothing"
    assert re.findall(r'<(\w+)[^>]* data-view="(\w+)"', text).count(("div", "epochs")) == 1
    assert not re.search(r"data-view=[^>]* hidden", text), "without JavaScript all tables are shown"
    assert "budget 200,000 images: 3.0 epochs, 150,000 images, 117 s" in text


def test_every_paper_says_what_runs_what_is_planned_and_what_it_reports(suite: Any, tmp_path: Path) -> None:
    catalogue(tmp_path, suite)
    (suite["alpha"].folder / "reported.csv").write_text(
        f"{REPORTED_HEADER}alpha,,,,,linear,cifar-10,top1,68.0,%,paper,Table 1,verified\n"
    )
    site = render(tmp_path, made(seed=0), made(seed=1))
    pages = crawl(site)
    listing = (site / "papers.html").read_text()
    assert "data-sortable" in listing
    alpha, later, silent = (
        " ".join(" ".join(Page(f"<table><tr>{line}</table>").texts).split())
        for line in listing.partition("<tbody>")[2].partition("</tbody>")[0].split("<tr>")[1:]
    )
    assert "runs today 2 runs, 1 protocol 1 1 verified image-ssl 2022" in alpha
    assert "planned, not here yet 2 1 verified" in later
    assert "planned, not here yet none text 2018" in silent
    words = " ".join(" ".join(Page(listing).texts).split())
    assert "3 papers: 1 runs here today, 2 are planned and not here yet." in words
    assert "3 reported numbers are held, 2 of them read" in words
    assert 'href="methods/alpha.html#reported"' in listing
    assert sorted(f.name for f in pages if f.parent.name == "papers") == ["later.html", "silent.html"]
    numbers = " ".join(" ".join(pages[site / "papers" / "later.html"].texts).split())
    for text in ("planned and not here yet", "71.25", "Table 3", "rival", "Table 9, row 2", "secondary"):
        assert text in numbers, text
    assert "No number of this paper" in (site / "papers" / "silent.html").read_text()


def test_a_damaged_catalogue_is_named_and_the_rest_rendered(suite: Any, tmp_path: Path) -> None:
    catalogue(tmp_path, suite)
    file = tmp_path / "papers" / "papers.csv"
    file.write_text(file.read_text() + "alpha,again\n")
    site = render(tmp_path, made())
    index = (site / "index.html").read_text()
    assert "papers.csv, line 5" in index
    assert str(tmp_path) not in index
    assert "No catalogue of papers" in (site / "papers.html").read_text()


def test_a_damaged_csv_is_named_and_the_rest_rendered(suite: Any, tmp_path: Path) -> None:
    (suite["alpha"].folder / "reported.csv").write_text("method,value\nalpha,1\n")
    index = (render(tmp_path, made()) / "index.html").read_text()
    assert "reported.csv, line 1" in index
    assert "60.0" in index


def test_a_run_shows_all_of_its_record(suite: Any, tmp_path: Path) -> None:
    run = made(details={"chosen": 30}, warnings=["the loss rose"], overrides={"mask_ratio": 0.75})
    page = Page((render(tmp_path, run) / "runs" / f"{run.id}.html").read_text())
    shown = "\n".join(page.texts)
    content = dataclasses.asdict(run)
    for name in ("curve", "metrics", "correct", "details", "seconds", "warnings"):
        del content[name]
    for _, value in words.flatten(content):
        assert value in shown or value == "[]", value
    for text in ("the loss rose", "30", "360", "94.00 to 96.00", "features", "1.2 s"):
        assert text in shown, text


def test_hundreds_of_records_differ_only_in_number(suite: Any, tmp_path: Path) -> None:
    records = [made("alpha", 50 + i / 10, seed=i, preset=f"p{i % 20}") for i in range(300)]
    found = rendered(Source(records, []))
    assert sum(path.startswith("runs/") for path in found) == 300
    assert found["index.html"].count(b'scope="row"') == 20


def test_a_folder_that_cannot_be_written_is_said(suite: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(record.ResultsError, match="cannot be written"):
        rendering.report(tmp_path / "results", tmp_path / "file")


def test_a_site_from_elsewhere_reaches_nothing_outside(suite: Any, tmp_path: Path) -> None:
    site = render(tmp_path, made("alpha", 60.0))
    mine, below = tmp_path / "mine.txt", tmp_path / "below"
    mine.write_text("keep")
    below.mkdir()
    (below / "x").write_text("keep")
    (site / "linked").symlink_to(below)
    names = ["../mine.txt", str(mine), "a/../../mine.txt", "linked/x", "..", "", "x" * 5000, "\0", "old.html"]
    (site / "old.html").write_text("a page of a former call")
    (site / rendering.LISTING).write_text("\n".join(names))
    render(tmp_path, made("alpha", 60.0))
    assert not (site / "old.html").exists()
    for own in (rendering.LISTING, rendering.LOCK, rendering.PART):
        (site / own).unlink(missing_ok=True)
        (site / own).symlink_to(mine)
        render(tmp_path, made("alpha", 61.0))
    (site / rendering.LISTING).write_bytes(b"\xff\xfe")
    render(tmp_path, made("alpha", 60.0))
    assert (mine.read_text(), (below / "x").read_text()) == ("keep", "keep")
    (site / "methods").rename(site / "moved")
    (site / "methods").symlink_to(below)
    with pytest.raises(
        record.ResultsError, match=r"leads elsewhere, so no page is written to it\. Remove it"
    ):
        render(tmp_path, made("alpha", 60.0))
    assert [file.name for file in below.iterdir()] == ["x"]


def test_the_clones_own_methods_and_protocols_render(tmp_path: Path) -> None:
    site = rendering.report(tmp_path / "results", tmp_path / "site").parent
    pages = crawl(site)
    planned = [file for file in pages if file.parent.name == "papers"]
    listed = [paper for paper in reporting.catalogue() if paper.slug not in registry.methods()]
    assert len(planned) == len(listed) > 0
    assert all(file.stat().st_size < 500_000 for file in pages)


# What it offers beside the pages


def test_a_table_exports_what_the_leaderboard_says(suite: Any, tmp_path: Path) -> None:
    hostile = '=1+1,"two"\nlines'
    records = [
        *(made("alpha", value, seed) for seed, value in enumerate((60.0, 61.0, 65.1))),
        *(made("beta", 62.5), made("noise", 40), made("labels", 90), budgeted("alpha", 41, "2m")),
        *(made("beta", 58, preset=hostile), made("beta", 20, recipe="mae")),
    ]
    site = render(tmp_path, *records)
    columns = [name for name in export.COLUMNS if name not in ("rank", "rank_to")]
    ours: list[Any] = []
    for file in (site / "data").glob("t-*.parquet"):
        held = pyarrow.parquet.read_table(file)
        assert held.column_names == list(export.COLUMNS)
        with file.with_suffix(".csv").open(encoding="utf-8", newline="") as text:
            read = [{name: cell or None for name, cell in row.items()} for row in csv.DictReader(text)]
        assert [row["preset"] for row in read] == held["preset"].to_pylist()
        assert [float(row["mean"] or "nan") for row in read] == held["mean"].to_pylist()
        assert [row["rank"] and int(row["rank"]) for row in read] == held["rank"].to_pylist()
        ours += [tuple(row[name] for name in columns) for row in held.to_pylist()]
    with duckdb.connect(str(site / export.DATABASE), read_only=True) as database_:
        theirs = database_.execute(f"SELECT {', '.join(columns)} FROM leaderboard").fetchall()
    assert len(ours) == 8  # the floor stands in both views
    for our, their in zip(sorted(ours, key=str), sorted(theirs, key=str), strict=True):
        assert our == pytest.approx(their), our


def test_the_published_database_holds_all_and_nothing_of_this_machine(
    everything: list[Record], tmp_path: Path
) -> None:
    site = render(tmp_path, *everything[:-1])
    database.update(tmp_path / "results")
    counts = "SELECT (SELECT count(*) FROM {}), (SELECT count(*) FROM {}), (SELECT count(*) FROM {})"
    query = counts.format("metrics", "reported", "papers")
    published = site / "data"
    assert database.query(query, published) == database.query(query, tmp_path / "results")
    _, files = database.query("SELECT path, run, inode FROM files ORDER BY path", published)
    assert (len(files), {inode for *_, inode in files}) == (len(everything) - 1, {None})
    assert all((tmp_path / "results" / path).is_file() and Path(path).stem == run for path, run, _ in files)


def test_the_published_database_is_written_when_its_content_changes(suite: Any, tmp_path: Path) -> None:
    render(tmp_path, made())
    file = tmp_path / "site" / export.DATABASE
    first = file.read_bytes()

    def value() -> Any:
        return database.query("SELECT id, value FROM runs ORDER BY id", file.parent)[1]

    render(tmp_path)
    assert file.read_bytes() == first  # another writing would have another random number in it
    render(tmp_path, made(value=61))
    assert [held for _, held in value()] == [61]
    (suite["alpha"].folder / "method.py").write_text("CHANGED = 1\n")
    record.method_code.cache_clear()
    render(tmp_path)
    assert "changed" in database.query("SELECT stale FROM runs", file.parent)[1][0][0]
    for damage in (b"", b"no database", first[:5000]):
        file.write_bytes(damage)
        render(tmp_path)
        assert value() == [(made().id, 61)]
    assert [f.name for f in file.parent.iterdir() if f.suffix not in (".csv", ".parquet")] == [file.name]


def test_a_badge_says_a_methods_usual_value_or_its_parity(everything: list[Record], tmp_path: Path) -> None:
    pages = rendered(dataclasses.replace(load(tmp_path), records=everything))
    badges = {path: text.decode() for path, text in pages.items() if path.startswith("badges/")}

    def texts(slug: str) -> list[str]:
        drawing = ElementTree.fromstring(next(text for path, text in badges.items() if f"/{slug}" in path))
        space = "{http://www.w3.org/2000/svg}"
        title = drawing.findtext(f"{space}title")
        assert title == drawing.get("aria-label")
        return [title or "", *(each.text or "" for each in drawing.iter(f"{space}text"))]

    title, label, value = texts("alpha")  # linear comes before robustness on its card
    assert (label, value) == ("linear top1, digits", "61.0 % (58.5 to 63.5)")
    assert "3 seeds, smoke preset, vit 4x64/4" in title
    assert texts("beta")[2] == "55.0 % (54.0 to 56.0)", "a stale row is not taken before a fresh one"
    assert "script" in texts("script")[0]
    assert len(badges) == 5
    for text in badges.values():
        assert not re.search(r"url\(|@import|href|http(?!://www.w3.org/2000/svg)", text)
    suite_table = tables(made("beta", 58, method=MethodUsed("beta", "other")))
    parity = {"passed": True, "fresh": True, "worst": 4.9e-7}

    def said(*found: Any) -> str:
        return export.badge("beta", ("linear",), *found)["value"]

    assert said(suite_table, parity) == "parity 5e-07"
    assert said(suite_table, None) == "58.0 % (57.0 to 59.0), stale"
    assert said([], parity | {"fresh": False}) == "parity 5e-07, before a change"
    assert said([], parity | {"passed": False}) == "differs from the authors’ code"
    assert said([], None) == "not measured yet"


def test_citations_are_sound_bibtex(suite: dict[str, registry.Card], tmp_path: Path) -> None:
    odd = dataclasses.replace(suite["alpha"], title="50 % of {A_B} & C\\D\n goes", year=2022)
    assert export.citation(odd) == (
        "@misc{alpha,\n"
        r"  title = {{50 \% of \textbraceleft{}A\_B\textbraceright{} \& C\textbackslash{}D goes}}," + "\n"
        "  key = {alpha},\n  year = {2022},\n  note = {CVPR 2022},\n  eprint = {2111.06377},\n"
        "  archiveprefix = {arXiv},\n  url = {https://arxiv.org/abs/2111.06377},\n}"
    )
    site = render(tmp_path, made(seed=1))
    text = "\n".join(Page((site / "methods" / "alpha.html").read_text()).texts)
    assert "@misc{alpha" in text
    assert "1 run record, the newest of 2026-11-11}" in text
    assert "year = {2026}" in text
    floor = "\n".join(Page((site / "methods" / "noise.html").read_text()).texts)
    assert (floor.count("@misc"), floor.count("@misc{mimbench,")) == (1, 1)


def test_the_front_page_as_one_file_asks_for_nothing(
    everything: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "load", lambda folder: Source(everything))
    site = rendering.report(tmp_path, tmp_path / "site").parent
    file = rendering.single_file(tmp_path / "results", tmp_path / "mail" / "page.html")
    text = file.read_text(encoding="utf-8")
    page, front = Page(text), Page((site / "index.html").read_text(encoding="utf-8"))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"link", "img", "iframe", "base"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)
    assert "default-src 'none'" in text
    cells = [tag for tag in front.tags if tag in ("td", "th", "svg", "table")]
    assert [tag for tag in page.tags if tag in ("td", "th", "svg", "table")] == cells
    for name in ("style.css", "tables.js"):
        assert (paths.static() / name).read_text() in text
    assert text.count("</script>") == text.count("<script>") == 1
    before = file.stat().st_mtime_ns
    rendering.single_file(tmp_path / "results", file)
    assert file.stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    with pytest.raises(record.ResultsError, match="cannot be written"):
        rendering.single_file(tmp_path / "results", tmp_path / "file" / "page.html")


Maker = Callable[..., Record]
