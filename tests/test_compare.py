"""Comparisons: numbers where runs pair, reasons where they do not, and the command that shows both."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from mimbench import cli, compare, paths, record, registry, stats
from mimbench.errors import ConfigError, ResultsError, UnknownName
from mimbench.record import DataUsed, EncoderUsed, MethodUsed, Pretraining, ProtocolUsed, Record
from mimbench.task import Metric

DATA = DataUsed("digits", "d1", "", 1437, 200)
VERSION = registry.protocol("linear").version
CPU = {"device": "cpu", "cpu": "A processor", "threads": 2, "gpu": None}


def bits(share: float, seed: int, n: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


def made(slug: str = "mae", right: np.ndarray | None = None, seed: int = 0, **more: Any) -> Record:
    """A record under ``linear`` whose top1 is the mean of ``right``; ``more`` replaces fields."""
    right = bits(0.6, seed) if right is None else right
    score = stats.accuracy(right)
    fields: dict[str, Any] = {
        "command": f"mimbench run --method {slug}",
        "method": MethodUsed(slug, record.method_code(slug)),
        "protocol": ProtocolUsed(
            "linear", VERSION, "cached", record.protocol_code("linear"), {"pool": "mean"}
        ),
        "config": {"recipe": {"epochs": 20}},
        "preset": "smoke",
        "overrides": {},
        "seed": seed,
        "pretrain": Pretraining(
            *("digits", "d1", f"{slug}-{seed}", 30_000, 240, 20.0, 60.0, 60.0, 0, 10**8, "fp32", False)
        ),
        "data": DATA,
        "encoder": EncoderUsed(800_000, "mean of the patch tokens", 64, 32, [0.5] * 3, [0.25] * 3),
        "backbone": "vit-64x4/4",
        "environment": CPU,
        "git": {},
        "seconds": {"total": 4.5},
        "curve": [],
        "metrics": {"top1": score},
        "primary": "top1",
        "details": {"accuracy": {"cat": score.value - 10, "dog": score.value + 10, "none": None}},
        "correct": record.pack(right),
        "created": f"2026-11-{10 + seed:02d}T12:00:00+00:00",
    }
    return Record(**(fields | more))


def sides(*groups: list[Record]) -> list[compare.Side]:
    return [compare.Side(f"{group[0].method.slug} {i}", tuple(group)) for i, group in enumerate(groups)]


def pair(a: Record, b: Record) -> compare.Pair:
    return compare.compare(sides([a], [b])).pairs[0]


def test_two_runs_are_paired_item_by_item() -> None:
    a, b = bits(0.7, 1), bits(0.6, 2)
    found = pair(made("mae", a), made("simmim", b))
    assert found.paired == stats.paired(a, b)
    assert found.paired is not None
    wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
    assert (found.paired.only_a, found.paired.only_b) == (wins, losses)
    assert found.p_corrected == pytest.approx(scipy.stats.binomtest(wins, wins + losses).pvalue)
    assert found.paired.difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert found.obstacles == []


def test_several_pairs_are_corrected_and_grouped() -> None:
    base = bits(0.5, 1, 400)
    better = base | bits(0.5, 2, 400)
    near = base ^ bits(0.02, 3, 400)
    found = compare.compare(sides([made("mae", base)], [made("simmim", better)], [made("crossmae", near)]))
    raw = [each.paired.p for each in found.pairs if each.paired]
    assert [each.p_corrected for each in found.pairs] == stats.holm(raw)
    assert found.groups == {"mae 0": 2, "simmim 1": 1, "crossmae 2": 2}


def test_seeds_are_paired_with_their_like() -> None:
    ours = [made("mae", bits(0.7, 10 + seed), seed) for seed in (0, 1, 2)]
    theirs = [made("simmim", bits(0.6, 20 + seed), seed) for seed in (1, 2, 5)]
    found = compare.compare(sides(ours, theirs))
    expected = stats.paired(
        np.stack([bits(0.7, 11), bits(0.7, 12)]), np.stack([bits(0.6, 21), bits(0.6, 22)])
    )
    assert found.pairs[0].paired == expected
    assert any("2 seeds in common" in note for note in found.notes)
    apart = compare.compare(sides(ours[:2], [made("simmim", seed=seed) for seed in (5, 6)]))
    assert apart.pairs[0].obstacles == ["they have no seed in common"]
    assert pair(ours[0], theirs[2]).paired is not None  # a run each


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"data": dataclasses.replace(DATA, name="cifar10", fingerprint="c1")},
            "test items: digits and cifar10",
        ),
        ({"data": dataclasses.replace(DATA, fingerprint="d2")}, "other test items: two states of digits"),
        (
            {"protocol": ProtocolUsed("linear", VERSION, "cached", "x", {"pool": "cls"})},
            "other fingerprint: pool mean and cls",
        ),
        ({"protocol": ProtocolUsed("linear", 99, "cached", "x", {"pool": "mean"})}, "and 99 of linear"),
        ({"protocol": ProtocolUsed("knn", 1, "dino", "x", {})}, "other protocol: linear and knn"),
        ({"correct": None}, "simmim 1 has no per-image correctness of top1"),
        ({"correct": record.pack(bits(0.6, 0)[:-1] | True)}, "does not make up its top1"),
        (
            {"metrics": {"top1": Metric(100.0)}, "correct": record.pack(np.ones(199, bool))},
            "other test items: 199 and 200",
        ),
    ],
)
def test_what_cannot_be_compared_has_a_reason_and_no_number(change: dict[str, Any], reason: str) -> None:
    found = compare.compare(sides([made("mae")], [made("simmim", **change)]))
    assert found.pairs[0].paired is None
    assert found.pairs[0].p_corrected is None
    assert reason in "; ".join(found.pairs[0].obstacles)
    assert found.groups == {}
    same_items = change.keys() <= {"correct", "metrics"}
    assert bool(found.pairs[0].classes) == same_items
    assert "not comparable" in str(found.tables())


def test_a_damaged_list_of_correct_items_is_said() -> None:
    with pytest.raises(ResultsError, match="damaged"):
        pair(made("mae"), made("simmim", correct="200:AA=="))


def test_an_incomparable_pair_costs_the_others_no_correction() -> None:
    a, b, other = made("mae"), made("simmim", bits(0.5, 7)), made("crossmae", correct=None)
    found = compare.compare(sides([a], [b], [other]))
    assert found.pairs[0].paired is not None
    assert found.pairs[0].p_corrected == found.pairs[0].paired.p


def test_classes_are_means_over_seeds() -> None:
    def with_classes(slug: str, seed: int, cat: float | None, dog: float) -> Record:
        return made(slug, seed=seed, details={"accuracy": {"cat": cat, "dog": dog}, "chosen_C": 1.0})

    ours = [with_classes("mae", 0, 50, 80), with_classes("mae", 1, 60, 90)]
    theirs = [with_classes("simmim", 0, 40, 90), with_classes("simmim", 1, None, 94)]
    found = compare.compare(sides(ours, theirs)).pairs[0]
    assert found.classes == {"accuracy": {"dog": [85, 92, -7]}}  # no number for the cat in one run


def test_cost_is_a_ratio_on_one_machine_only() -> None:
    slow = dataclasses.replace(made().pretrain, device_seconds=180.0, images=15_000)
    found = pair(made("mae", pretrain=slow), made("simmim"))
    assert (found.seconds, found.images, found.cost_note) == (3, 0.5, "")
    gpu = {**CPU, "device": "cuda", "gpu": "A GPU"}
    found = pair(made("mae", pretrain=slow), made("simmim", environment=gpu))
    assert (found.seconds, found.images) == (None, 0.5)
    assert "different machines: A GPU and A processor, threads: 2" in found.cost_note
    idle = dataclasses.replace(slow, images=0, device_seconds=0.0)
    found = pair(made("mae"), made("random_init", pretrain=idle))
    assert (found.seconds, found.images) == (None, None)
    assert "nothing was pretrained here for random_init" in found.cost_note


def test_a_name_is_a_run_or_the_newest_fresh_runs_of_a_method() -> None:
    old = MethodUsed("mae", "former code")
    own = [
        made(seed=0),
        made(seed=1),
        made(seed=2, method=old, created="2026-12-01T00:00:00+00:00"),
        made(seed=0, overrides={"mask_ratio": 0.5}, config={"mask_ratio": 0.5}),
        made(seed=0, preset="cifar", data=dataclasses.replace(DATA, name="cifar10", fingerprint="c1")),
    ]
    other = made("simmim")
    chosen, theirs = compare.choose(["mae", "simmim"], [*own, other], "linear:cached", "digits")
    assert (chosen.name, chosen.runs, theirs.runs) == ("mae", tuple(own[:2]), (other,))
    stale_only = compare.choose(["mae", "simmim"], [own[2], other])
    assert stale_only[0].runs == (own[2],)
    assert any("mae is stale" in note for note in compare.compare(stale_only).notes)
    by_id = compare.choose([own[3].id[:9], "simmim"], [*own, other])
    assert by_id[0].runs == (own[3],)
    assert any("mask_ratio=0.5" in note for note in compare.compare(by_id).notes)


@pytest.mark.parametrize(
    ("names", "options", "kind", "text"),
    [
        (["mae"], {}, ConfigError, "two different names"),
        (["mae", "mae"], {}, ConfigError, "two different names"),
        (["mae", "simmim"], {}, ConfigError, "with preset cifar.*--preset"),
        (
            ["mae", "simmim"],
            {"preset": "cifr"},
            ConfigError,
            "no run of mae fits. Recorded are: linear:cached on",
        ),
        (["simmim", "crossmae"], {}, ConfigError, "Recorded are: none"),
        (["simmim", "simmin"], {}, UnknownName, "Did you mean simmim"),
        (["simmim", ""], {}, ConfigError, "begins 3 runs"),
    ],
)
def test_a_name_that_names_no_one_thing_is_refused(
    names: list[str], options: dict[str, str], kind: type[Exception], text: str
) -> None:
    records = [made(), made(preset="cifar"), made("simmim")]
    with pytest.raises(kind, match=text):
        compare.choose(names, records, **options)


def test_one_run_under_two_names_is_refused() -> None:
    only = made()
    with pytest.raises(ConfigError, match="same run"):
        compare.choose([only.id, only.id[:8]], [only])


def test_the_command_prints_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mimbench", "compare", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    a, b = bits(0.8, 1), bits(0.5, 2)
    many = {"accuracy": {f"class {i}": float(i) for i in range(30)}}
    for each in (made("mae", a, details=many), made("simmim", b, details=many)):
        record.write(each, Path(paths.results()))
    code, out, err = call("mae", "simmim", "--protocol", "linear")
    expected = stats.paired(a, b)
    assert (code, err) == (0, "")
    assert f"{expected.difference:+.2f}" in out
    assert f"{expected.low:+.2f} to {expected.high:+.2f}" in out
    assert "the 20 largest of 30 differences" in out
    assert "says nothing about another seed" in out
    code, out, _ = call("mae", "simmim", "--json")
    content = json.loads(out)
    assert content["pairs"][0]["paired"] == pytest.approx(dataclasses.asdict(expected))
    assert len(content["pairs"][0]["classes"]["accuracy"]) == 30
    assert [side["group"] for side in content["sides"]] == [1, 2]
    code, out, err = call("mae", "nobody")
    assert (code, out, err.count("\n")) == (2, "", 1)
