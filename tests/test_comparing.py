"""What the comparison page is given: rows with keys, and a script for each table with what they are compared by."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_report
from test_report import HOSTILE, card, made, rendered

from mimbench import compare, record, stats
from mimbench.record import MethodUsed, Record, setting
from mimbench.report import comparing, ranking
from mimbench.report.source import Source
from mimbench.task import Metric

suite = test_report.suite


def judged(slug: str = "alpha", seed: int = 0, shift: int = 0, **more: Any) -> Record:
    right = np.arange(360) % 10 < 7
    right = np.roll(right, shift)
    fields: dict[str, Any] = {"metrics": {"top1": stats.accuracy(right)}, "correct": record.pack(right)}
    return made(slug, seed=seed, **(fields | more))


def scripts(*records: Record) -> list[dict[str, Any]]:
    """What the scripts hand over, each checked to be one call with plain data."""
    tables = ranking.tables(records, ())
    _, files = comparing.comparisons(tables, records)
    found = []
    for path, content in files.items():
        text = content.decode("ascii")
        call = re.fullmatch(r'mimbench\.bits\("(t-\w+)",(\{.*\})\);\n', text)
        assert call, text[:100]
        assert path == f"data/bits/{call[1]}.js"
        assert not re.search("[<>&]", text)
        found.append(json.loads(call[2]))
    return found


def test_a_row_says_all_that_it_is_compared_by(suite: Any) -> None:
    def run(seed: int, cat: float) -> Record:
        taken = dataclasses.replace(made().pretrain, images=1000 + seed, device_seconds=10.0 * seed)
        return judged(
            seed=seed, pretrain=taken, details={"accuracy": {"dog": 50.0, "cat": cat, "none": None}}
        )

    ours = [run(1, 1 / 3), run(2, 60.0)]
    (found,) = scripts(*ours, judged("beta", details={"accuracy": {"bird": 5.0}}))
    assert found["labels"] == {"accuracy": ["bird", "cat", "dog"]}
    alpha = found["rows"]["alpha"]
    assert alpha["seeds"] == [1, 2]
    assert alpha["correct"] == [each.correct for each in ours]
    assert alpha["classes"] == {"accuracy": [[None, 0.333333, 50.0], [None, 60.0, 50.0]]}
    assert (alpha["images"], alpha["device_seconds"], alpha["trained"]) == (1001.5, 15.0, True)
    assert alpha["machines"] == ["A processor, threads: None"]
    assert alpha["settings"]["mask_ratio"] == "0.75"
    assert alpha["settings"]["backbone"] == "vit 4x64/4"
    assert (found["metric"], found["unit"]) == ("top1", "%")
    assert alpha["faults"] == [None, None]


def test_keys_and_labels_tell_the_settings_of_a_method_apart(suite: Any) -> None:
    masked = {"overrides": {"mask_ratio": 0.9}, "config": {"mask_ratio": 0.9, "recipe": {"epochs": 20}}}
    records = [
        judged(),
        judged(**masked),
        judged(preset="cifar"),
        judged(config={"mask_ratio": 0.1}),  # nothing but its setting's hash is another
        judged("beta"),
    ]
    (table,) = ranking.tables(records, ())
    found = {choice.key: choice.label for choice in comparing.choices(table)}
    hashes = [setting(each)[:8] for each in records]
    assert found == {
        hashes[0]: f"alpha, smoke, setting {hashes[0]}",
        hashes[1]: "alpha, smoke, mask_ratio=0.9",
        hashes[2]: "alpha, cifar",
        hashes[3]: f"alpha, smoke, setting {hashes[3]}",
        "beta": "beta",
    }
    (content,) = scripts(*records)
    assert {key: row["hash"] for key, row in content["rows"].items()} == {
        **{each: each for each in hashes[:4]},
        "beta": hashes[4],
    }


def test_the_terminal_knows_a_row_by_the_name_that_the_page_gives(suite: Any, tmp_path: Path) -> None:
    suite["two words"] = card(tmp_path / "methods", "two words")
    masked = {"overrides": {"mask_ratio": 0.9}, "config": {"mask_ratio": 0.9, "recipe": {"epochs": 20}}}
    records = [
        *(judged(seed=seed) for seed in (0, 1)),
        *(judged(seed=seed, **masked) for seed in (0, 1)),  # no name: neither the plain preset nor one run
        judged("beta", method=MethodUsed("beta", "former code")),
        judged("beta", preset="cifar"),
        judged("two words"),
    ]
    (content,) = scripts(*records)
    (table,) = ranking.tables(records, ())
    assert content["options"] == "--protocol linear:cached --dataset digits"
    named = 0
    for choice in comparing.choices(table):
        row = content["rows"][choice.key]
        if row["name"] is None:
            assert choice.row.overrides
            continue
        other = next(run.id for run in records if run not in choice.row.runs)
        words = shlex.split(row["name"])
        chosen = compare.choose([*words, other], records, "linear:cached", "digits", row["preset"])[0]
        assert chosen.runs == tuple(choice.row.runs)
        named += 1
    assert named == 4
    page = rendered(Source(records))["compare.html"].decode()
    command = "mimbench compare alpha beta --protocol linear:cached --dataset digits --preset smoke"
    assert command in page or command.replace("alpha beta", "beta alpha") in page


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"correct": None}, "has no per-image correctness of top1"),
        ({"metrics": {"top1": Metric(12.0)}}, "has per-image correctness that does not make up its top1"),
        ({"correct": "360:AA=="}, "has a damaged list of correct test items"),
        ({"correct": HOSTILE}, "has a damaged list of correct test items"),
    ],
)
def test_what_cannot_be_compared_is_named_and_the_rest_rendered(suite: Any, change: Any, fault: str) -> None:
    records = [judged(), judged("beta", **change)]
    (found,) = scripts(*records)
    assert found["rows"]["beta"]["faults"] == [fault]
    assert "“" not in fault
    page = rendered(Source(records))["compare.html"].decode()
    assert ("not recorded image by image" in page) == (change == {"correct": None})


def test_tables_of_one_row_have_nothing_to_compare(suite: Any) -> None:
    assert scripts(judged(), judged("beta", recipe="mae")) == []
    site = rendered(Source([judged()]))
    assert "No two rows share a table yet" in site["compare.html"].decode()
    assert not any(path.startswith("data/bits/") for path in site)
    assert "No two rows share a table yet" in rendered(Source())["compare.html"].decode()


def test_hostile_text_is_data(suite: Any) -> None:
    hostile = judged(
        HOSTILE,
        preset=HOSTILE,
        backbone=HOSTILE,
        config={HOSTILE: [HOSTILE]},
        overrides={HOSTILE: HOSTILE},
        details={"accuracy": {HOSTILE: 1.0}},
    )
    (found,) = scripts(hostile, judged("alpha"))
    seen = HOSTILE.replace("\u202e", "\\u202e")
    assert found["labels"]["accuracy"] == [seen]
    assert found["rows"][HOSTILE]["label"] == seen
    assert "\u202e" not in json.dumps(list(found["rows"].values()), ensure_ascii=False)
