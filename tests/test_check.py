"""The regression check: baselines from records, and what becomes of records that leave them."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from test_record import make_record

from mimbench import check, record
from mimbench.errors import ResultsError
from mimbench.record import Record
from mimbench.task import Metric

SCORES = [61.0, 62.5, 60.25]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder; the code is that of the records, except where a record says it is older."""
    monkeypatch.setattr(
        record,
        "stale",
        lambda made: "the code of mae has changed" if made.method.code_hash == "older" else None,
    )
    return tmp_path / "results"


def seeds(scores: list[float], **changes: Any) -> list[Record]:
    return [make_record(seed=seed, score=score, **changes) for seed, score in enumerate(scores)]


def record_all(records: list[Record], folder: Path) -> None:
    for made in records:
        record.write(made, folder)


def test_several_seeds_give_students_interval_widened_by_the_error_over_test_images() -> None:
    found = check.baseline(seeds(SCORES))
    reference = scipy.stats.ttest_1samp(SCORES, 0).confidence_interval(0.95)
    mean = sum(SCORES) / 3
    half = math.hypot(mean - reference.low, 4.5)  # make_record gives +- 4.5
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert found.identity.seeds == [0, 1, 2]
    assert found.identity.run_ids() == [made.id for made in seeds(SCORES)]
    assert found.origin.how.startswith("3 seeds")
    assert (found.metric, found.unit, found.origin.values) == ("top1", "%", SCORES)


def test_one_seed_gives_the_interval_over_test_images() -> None:
    found = check.baseline([make_record(seed=4)])
    assert (found.low, found.high) == pytest.approx((56.75, 65.75))
    assert found.identity.seeds == [4]
    assert found.origin.how.startswith("1 seed:")


def test_a_metric_without_an_interval_needs_two_seeds() -> None:
    bare = {"metrics": {"rate": Metric(100.0, unit="images/s")}, "primary": "rate"}
    with pytest.raises(ResultsError, match="two seeds or more"):
        check.baseline([make_record(**bare)])
    found = check.baseline([make_record(**bare), make_record(seed=1, **bare)])
    assert (found.low, found.high) == (100.0, 100.0)


def test_runs_of_different_settings_give_no_baseline() -> None:
    with pytest.raises(ResultsError, match="differ by more than their seed"):
        check.baseline([make_record(), make_record(seed=1, preset="smoke")])
    other = make_record(seed=1, data=dataclasses.replace(make_record().data, fingerprint="other"))
    with pytest.raises(ResultsError, match="not all scored in the same way"):
        check.baseline([make_record(), other])


def test_a_baseline_survives_its_file(folder: Path) -> None:
    found = check.baseline(seeds(SCORES, overrides={"recipe": {"epochs": 3.0}}))
    file = check.write(found, folder)
    assert file == folder / "baselines" / f"{found.identity.name}.json"
    assert check.read(file) == found
    assert check.read_all(folder) == [found]


def test_records_inside_their_interval_pass_and_outside_fail(folder: Path) -> None:
    record_all(seeds(SCORES), folder)
    check.update(folder)
    (row,) = check.check(folder)
    assert (row.status, row.note, row.seeds) == ("ok", "", 3)
    assert row.value == pytest.approx(sum(SCORES) / 3)
    assert not check.failed([row])

    record_all(seeds([score - 8 for score in SCORES]), folder)
    (row,) = check.check(folder)
    assert (row.status, row.note) == ("failed", "outside the interval")
    assert check.failed([row])

    record_all(seeds([score + 8 for score in SCORES]), folder)  # too good is a change as well
    assert check.check(folder)[0].status == "failed"


def test_a_missing_record_fails_and_is_named(folder: Path) -> None:
    record_all(seeds(SCORES), folder)
    check.update(folder)
    record.place(make_record(seed=1), folder).unlink()
    (row,) = check.check(folder)
    assert (row.status, row.note, row.value) == ("missing", "no record for seed 1", None)
    assert check.failed([row])


def test_a_broken_record_or_a_vanished_metric_fails(folder: Path) -> None:
    record_all(seeds(SCORES), folder)
    check.update(folder)
    record.place(make_record(seed=1), folder).write_text("{")
    assert "is not JSON" in check.check(folder)[0].note
    record.write(make_record(seed=1, metrics={"top5": Metric(1.0)}, primary="top5"), folder)
    (row,) = check.check(folder)
    assert (row.status, row.note) == ("failed", "a record has no metric 'top1'")


def test_older_code_or_another_way_of_scoring_is_stale_inside_and_failed_outside(folder: Path) -> None:
    record_all(seeds(SCORES), folder)
    check.update(folder)
    older = dataclasses.replace(make_record().method, code_hash="older")
    record_all([dataclasses.replace(made, method=older) for made in seeds(SCORES)], folder)
    (row,) = check.check(folder)
    assert (row.status, row.note) == ("stale", "the code of mae has changed")
    assert not check.failed([row])

    record_all([dataclasses.replace(made, method=older) for made in seeds([1.0, 1.0, 1.0])], folder)
    (row,) = check.check(folder)
    assert (row.status, row.note) == ("failed", "outside the interval; the code of mae has changed")

    data = dataclasses.replace(make_record().data, fingerprint="other")
    record_all(seeds(SCORES, data=data), folder)
    (row,) = check.check(folder)
    assert (row.status, row.note) == ("stale", "scored in another way than the baseline")


def test_update_writes_what_todays_code_made_and_says_what_it_left_out(folder: Path) -> None:
    older = dataclasses.replace(make_record().method, code_hash="older")
    record_all([*seeds(SCORES), make_record(protocol="linear")], folder)
    record.write(dataclasses.replace(make_record(preset="smoke"), method=older), folder)
    rate = {"rate": Metric(100.0, unit="images/s")}
    record.write(make_record(protocol="throughput", metrics=rate, primary="rate"), folder)
    (folder / "runs" / "mae" / "knn" / "torn.json").write_text("{")
    written, left_out = check.update(folder)
    assert [check.read(file).identity.protocol for file in written] == ["knn", "linear"]
    assert check.read(written[0]).identity.seeds == [0, 1, 2]
    assert len(left_out) == 3
    for part in ("torn.json is not JSON", "the code of mae has changed", "Run it with two seeds"):
        assert sum(part in sentence for sentence in left_out) == 1
    before = [file.read_bytes() for file in written]
    assert [file.read_bytes() for file in check.update(folder)[0]] == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 2}, "has schema 2, not 1"),
        ({"low": "0"}, "low should be float"),
        ({"extra": 1}, "unknown keys: extra"),
        ({"low": 90.0, "high": 10.0}, "no interval"),
        ({"low": float("nan")}, "holds NaN"),
    ],
)
def test_a_damaged_baseline_is_an_error_and_never_a_pass(
    change: dict[str, Any], named: str, folder: Path
) -> None:
    file = check.write(check.baseline(seeds(SCORES)), folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ResultsError, match=named) as raised:
        check.check(folder)
    assert str(file) in str(raised.value)
    file.write_text("{")
    with pytest.raises(ResultsError, match="cannot be read"):
        check.check(folder)


def test_without_baselines_there_is_nothing_to_say(folder: Path) -> None:
    assert check.check(folder) == []


def test_run_repeats_only_what_is_missing_or_stale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_all(seeds(SCORES), folder)
    check.update(folder)
    record.place(make_record(seed=1), folder).unlink()
    older = dataclasses.replace(make_record().method, code_hash="older")
    record.write(dataclasses.replace(make_record(seed=2), method=older), folder)
    commands = []

    def pretend(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["env"]["MIMBENCH_RESULTS"] == str(folder)
        commands.append(command)
        seed = int(command[-1])
        record.write(make_record(seed=seed, score=SCORES[seed]), folder)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    (row,) = check.check(folder, run=True)
    assert row.status == "ok"
    assert [command[-1] for command in commands] == ["1", "2"]
    assert commands[0][:5] == [sys.executable, "-m", "mimbench", "run", "--method"]

    record.place(make_record(seed=1), folder).unlink()
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    (row,) = check.check(folder, run=True)
    assert row.status == "failed"
    assert row.note.endswith("--seed 1' ended with code 3")


def test_run_executes_nothing_but_mimbench(folder: Path) -> None:
    check.write(check.baseline([make_record(command="rm -rf somewhere")]), folder)
    (row,) = check.check(folder, run=True)
    assert row.status == "failed"
    assert row.note.endswith("was not made by 'mimbench run' but by: rm -rf somewhere.")
