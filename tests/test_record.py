"""Records: what is written can be read for ever, and a write never loses or tears a result."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimbench import config, record, registry
from mimbench.curve import Curve
from mimbench.errors import ResultsError
from mimbench.record import DataUsed, EncoderUsed, MethodUsed, Pretraining, ProtocolUsed, Record
from mimbench.task import Metric

FIXTURES = Path(__file__).parent / "fixtures" / "records"


def make_record(
    method: str = "mae", protocol: str = "knn", seed: int = 0, score: float = 61.25, **changes: Any
) -> Record:
    """A complete record of a made-up run."""
    values: dict[str, Any] = {
        "command": f"mimbench run --method {method} --protocol {protocol} --dataset cifar10 --seed {seed}",
        "method": MethodUsed(method, "0123456789ab"),
        "protocol": ProtocolUsed(protocol, 1, "dino", "ba9876543210", {"recipe": "dino", "k": [10, 20]}),
        "config": {"mask_ratio": 0.75, "recipe": {"epochs": 100.0, "budget": None}},
        "preset": "cifar",
        "overrides": {},
        "seed": seed,
        "pretrain": Pretraining(
            *("cifar10", "aaa", "key0", 4500, 90, 1.5, 12.5, 12.5, 0, 1 << 30),
            precision="fp32",
            compiled=True,
        ),
        "data": DataUsed("cifar10", "aaa+bbb", "", 50000, 400),
        "encoder": EncoderUsed(5_400_000, "mean of patches", 192, 32, [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]),
        "backbone": "vit 12x192/4",
        "environment": {"torch": "2.13.0", "device": "cpu", "cuda": None, "cores": 2},
        "git": {"commit": "f" * 40, "dirty": False},
        "seconds": {"pretrain": 12.5, "evaluate": 1.25},
        "curve": [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 0.1 + 0.2}],
        "metrics": {
            "top1": Metric(score, score - 4.5, score + 4.5, 400),
            "seconds": Metric(1.5, n=None, unit="s"),
        },
        "primary": "top1",
        "details": {"k": 20},
        "correct": record.pack(np.arange(400) < round(4 * score)),
        "warnings": ["few epochs"],
        "created": "2026-01-02T03:04:05+00:00",
    }
    return Record(**(values | changes))


def test_a_record_reads_back_as_it_was_and_rewrites_to_the_same_bytes(tmp_path: Path) -> None:
    run = make_record()
    file = record.write(run, tmp_path)
    assert file == tmp_path / "runs" / "mae" / "knn" / f"{run.id}.json"
    assert record.read(file) == run
    before = file.read_bytes()
    assert record.write(record.read(file), tmp_path).read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_record_of_schema_1_loads_for_ever() -> None:
    run = record.read(FIXTURES / "schema1.json")
    assert (run.method.slug, run.protocol.name, run.seed) == ("mae", "knn", 0)
    assert run.score == Metric(61.25, 56.75, 65.75, 400)
    assert run.pretrain.epochs == 1.5
    assert run.pretrain.compiled is False
    assert run.config["recipe"]["budget"] is None
    assert record.unpack(run.correct or "").sum() == 245


def test_the_id_names_the_request_and_the_fingerprint_the_way_of_scoring() -> None:
    run = make_record()
    same = make_record(score=10.0, created="2027-01-01T00:00:00+00:00", warnings=[], seconds={})
    assert same.id == run.id
    assert make_record(seed=1).id != run.id
    assert make_record(overrides={"mask_ratio": 0.5}).id != run.id
    assert make_record(seed=1).fingerprint == run.fingerprint

    for changed in (
        dataclasses.replace(run, protocol=dataclasses.replace(run.protocol, version=2)),
        dataclasses.replace(run, protocol=dataclasses.replace(run.protocol, settings={"k": [10]})),
        dataclasses.replace(run, data=dataclasses.replace(run.data, fingerprint="ccc")),
        dataclasses.replace(run, encoder=dataclasses.replace(run.encoder, input_size=64)),
    ):
        assert changed.fingerprint != run.fingerprint
        assert changed.id == run.id
    # How a method reads its own encoder is the method's, so that it still ranks beside the others.
    other = dataclasses.replace(run, encoder=dataclasses.replace(run.encoder, readout="class token"))
    assert other.fingerprint == run.fingerprint


def test_the_home_folder_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    place = "imagefolder:/home/somebody/flowers"
    run = make_record(command=f"mimbench run --dataset {place}", data=DataUsed(place, "a", "", 9, 9))
    run = dataclasses.replace(
        run, protocol=dataclasses.replace(run.protocol, settings={"bank": "/home/somebody/x"})
    )
    file = record.write(run, tmp_path)
    assert "somebody" not in file.read_text()
    again = record.read(file)
    assert again.data.name == "imagefolder:~/flowers"
    assert (again.id, again.fingerprint) == (run.id, run.fingerprint)


@given(st.lists(st.booleans(), max_size=40))
def test_correct_items_survive_packing(items: list[bool]) -> None:
    assert record.unpack(record.pack(np.array(items, bool))).tolist() == items


@pytest.mark.parametrize("text", ["", "9:AA==", "x:AA==", "8:A?==", "8"])
def test_damaged_correct_items_are_refused(text: str) -> None:
    with pytest.raises(ResultsError, match="damaged"):
        record.unpack(text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"details": {"per_class": [1.0, float("nan")]}}, r"details\.per_class\[1\] is nan"),
        ({"metrics": {"top1": Metric(float("inf"))}}, r"metrics\.top1\.value is inf"),
        ({"details": {"k": np.int64(3)}}, "int64"),
        ({"seconds": {"pretrain": "long"}}, "seconds: pretrain should be float"),
        ({"seed": True}, "seed should be int, not True"),
        ({"primary": "top5"}, "'top5' is not among the metrics"),
    ],
)
def test_what_no_record_may_hold_is_refused_but_kept(
    changes: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_record(**changes)
    with pytest.raises(ResultsError, match=named) as raised:
        record.write(run, tmp_path)
    assert not (tmp_path / "runs").exists()
    kept = tmp_path / "cache" / "unsaved" / "runs" / "mae" / "knn" / f"{run.id}.json"
    assert kept.is_file()
    assert str(kept) in str(raised.value)


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.write_text("a file where the folder should be")
    run = make_record()
    with pytest.raises(ResultsError, match="MIMBENCH_RESULTS") as raised:
        record.write(run, results)
    assert str(results) in str(raised.value)
    kept = record.place(run, tmp_path / "cache" / "unsaved")
    assert str(kept) in str(raised.value)
    assert record.read(kept) == run


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir(mode=0o500)
    with pytest.raises(ResultsError, match="kept in"):
        record.write(make_record(), tmp_path / "results")


def test_a_full_disk_leaves_the_old_record_and_prints_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = record.write(make_record(), tmp_path)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    newer = make_record(score=50.0)
    with pytest.raises(ResultsError, match=r"No space left on device.*printed above"):
        record.write(newer, tmp_path)
    assert record.loads(capsys.readouterr().out, "output") == newer
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_an_interrupted_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record.write(make_record(), tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def _edited(changes: dict[str, Any], drop: str = "") -> str:
    content = json.loads(record.dumps(make_record())) | changes
    content.pop(drop, None)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is not JSON"),
        ("<<<<<<< HEAD\n{}", "is not JSON"),
        ("[]", "no schema number"),
        ('{"schema": true}', "no schema number"),
        (_edited({"schema": 4}), "schema 4, newer than 3"),
        (_edited({"schema": 0}), "schema 0, which never existed"),
        (_edited({"speed": 1}), "unknown keys: speed"),
        (_edited({}, drop="seed"), "lacks: seed"),
        (_edited({"seed": "0"}), "seed should be int, not '0'"),
        (_edited({"correct": 1}), "correct should be str or NoneType, not 1"),
        (_edited({"warnings": "none"}), "warnings should be list"),
        (_edited({"method": {"slug": "mae"}}), "method lacks: code_hash"),
        (_edited({"method": "mae"}), "method should be a table"),
        (_edited({"metrics": {"top1": {"value": None}}}), "metrics: top1 lacks: high, low, n, unit"),
        (_edited({"seed": 3}), "its id does not follow"),
        (_edited({"fingerprint": "0"}), "its fingerprint does not follow"),
        (_edited({"created": "yesterday"}), "created is 'yesterday'"),
        (_edited({"created": "2026-01-02T03:04:05"}), "not a time with its zone"),
        (_edited({"seconds": {"a": float("nan")}}), "holds NaN"),
    ],
)
def test_a_damaged_record_is_named_with_its_fault(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(ResultsError, match=named) as raised:
        record.read(file)
    assert str(file) in str(raised.value)


def test_a_record_of_schema_2_loads_for_ever() -> None:
    assert record.read(FIXTURES / "schema2.json") == make_record()


def test_a_record_of_schema_3_loads_for_ever() -> None:
    details = {"chosen_on": "test", "chosen_k": 20}
    run = record.read(FIXTURES / "schema3.json")
    assert run == make_record(test_reads=8, details=details)
    assert record.test_selected(run)
    assert not record.test_selected(make_record())


def test_a_run_of_before_reads_were_counted_read_once_or_looked_at_no_label() -> None:
    content = json.loads((FIXTURES / "schema2.json").read_text())
    assert record.loads(json.dumps(content), "old").test_reads == 1
    content = json.loads(record.dumps(make_record(protocol="throughput")))
    del content["test_reads"]
    assert record.loads(json.dumps(content | {"schema": 2}), "old").test_reads == 0


def test_seeds_that_got_differently_far_within_a_budget_share_a_setting() -> None:
    def trained(epochs: float, budget: str | None, seed: int) -> str:
        run = make_record(seed=seed, config={"recipe": {"epochs": 100.0, "budget": budget}})
        return record.setting(
            dataclasses.replace(run, pretrain=dataclasses.replace(run.pretrain, epochs=epochs))
        )

    assert trained(3.1, "2m", 0) == trained(2.9, "2m", 1)
    assert trained(3.1, "2m", 0) != trained(3.1, "4m", 0)
    assert trained(3.1, None, 0) != trained(2.9, None, 0)


def test_older_schemas_migrate_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    old = json.loads(record.dumps(make_record()))
    old["schema"] = 1
    old["seed_number"] = old.pop("seed")
    monkeypatch.setattr(record, "SCHEMA", 3)
    steps = []

    def rename(content: dict[str, Any]) -> dict[str, Any]:
        steps.append(content["schema"])
        return {**{k: v for k, v in content.items() if k != "seed_number"}, "seed": 0, "schema": 2}

    def count(content: dict[str, Any]) -> dict[str, Any]:
        steps.append(content["schema"])
        return {**content, "schema": 3}

    monkeypatch.setattr(record, "MIGRATIONS", {1: rename, 2: count})
    run = record.loads(json.dumps(old), "old")
    assert (run.seed, run.schema, steps) == (0, 3, [1, 2])


def test_one_broken_file_does_not_hide_the_rest(tmp_path: Path) -> None:
    runs = [make_record(seed=seed) for seed in range(3)]
    written = [record.write(run, tmp_path) for run in runs]
    written[0].with_name("torn.json").write_text("{")
    written[0].with_name("image.json").write_bytes(b"\xff\xd8")
    copy = written[0].with_name("copy.json")
    copy.write_bytes(written[0].read_bytes())
    found, faults = record.scan(tmp_path)
    assert sorted(r.seed for r in found) == [0, 1, 2]
    assert sorted(str(f).split(" ")[0].rpartition("/")[2] for f in faults) == [
        "copy.json",
        "image.json",
        "torn.json",
    ]
    assert record.scan(tmp_path / "nowhere") == ([], [])


def test_a_record_is_stale_when_the_code_that_made_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "mae", tmp_path / "knn.py"
    folder.mkdir()

    def code(method: str, protocol: str, version: int = 1) -> None:
        (folder / "method.py").write_text(method)
        file.write_text(protocol)
        cards = {"mae": registry.Card("mae", folder, "MAE", "", ())}
        protocols = {"knn": registry.ProtocolCard("knn", file, version, "", ())}
        monkeypatch.setattr(registry, "methods", lambda: cards)
        monkeypatch.setattr(registry, "protocols", lambda: protocols)
        record.method_code.cache_clear()
        record.protocol_code.cache_clear()

    code("x = 1", "y = 1")
    run = make_record()
    run = dataclasses.replace(
        run,
        method=MethodUsed("mae", record.method_code("mae")),
        protocol=dataclasses.replace(run.protocol, code_hash=record.protocol_code("knn")),
    )
    assert record.stale(run) is None
    code("x = 1  # why", '"""Words."""\ny = 1')
    assert record.stale(run) is None
    code("x = 2", "y = 1")
    assert record.stale(run) == "the code of mae has changed"
    code("x = 1", "y = 2")
    assert record.stale(run) == "the code of knn has changed"
    code("x = 1", "y = 2", version=2)
    assert record.stale(run) == "knn is now at version 2, this is of version 1"
    assert record.stale(make_record(method="gone")) == "method gone is no longer here"
    assert record.stale(make_record(protocol="gone")) == "protocol gone is no longer here"
    record.method_code.cache_clear()
    record.protocol_code.cache_clear()


def test_a_record_is_plain_tables_for_templates() -> None:
    content = config.to_dict(make_record())
    assert content["metrics"]["top1"]["value"] == 61.25
    assert content["method"]["slug"] == "mae"


def test_a_curve_is_read_by_column_as_by_point() -> None:
    points = [
        {"step": 1, "loss": 2.5, "lr": 1e-3},
        {"loss": 2.25},
        {"step": 4, "lr": 2e-3},
        {"step": 9, "loss": 2, "lr": 3e-3},
    ]
    curve = Curve.of(points)
    assert curve == points
    assert Curve.of(curve) is curve
    for name in curve.names:
        expected = [(p.get("step", place), p[name]) for place, p in enumerate(points) if name in p]
        assert curve.series(name) == expected
    assert curve.series("loss") == [(1, 2.5), (1, 2.25), (9, 2)]
    assert curve.series("accuracy") == Curve.of([]).series("loss") == []
