"""mimbench verify: a recorded run is repeated by its own command, and its metrics set beside the recorded ones."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from mimbench import cli, record, verify
from mimbench.errors import ConfigError, ResultsError
from mimbench.task import Metric


def mimbench(line: str) -> int:
    """The exit code of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mimbench", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> record.Record:
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMBENCH_RESULTS", str(folder / "results"))
        patch.setenv("MIMBENCH_CACHE", str(folder / "cache"))
        assert (
            mimbench("run --method mae --protocol knn --set recipe.epochs=1 --set recipe.warmup_epochs=0 -q")
            == 0
        )
    (file,) = record.files(folder / "results")
    return record.read(file)


def test_a_run_comes_out_again_and_leaves_no_record(
    recorded: record.Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MIMBENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("MIMBENCH_CACHE", str(tmp_path / "cache"))
    file = record.write(recorded, tmp_path / "results")
    before = file.read_bytes()
    assert mimbench(f"verify {recorded.id[:6]} --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(line["name"], line["verdict"]) for line in found["lines"]] == [("top1", "equal")]
    assert found["passed"]
    assert found["environment"] == {}
    assert file.read_bytes() == before
    assert not (tmp_path / "cache" / "pretrain").exists(), "a pretraining of this cache would prove nothing"


def test_another_result_fails_and_says_so(
    recorded: record.Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MIMBENCH_RESULTS", str(tmp_path / "results"))
    wrong = recorded.score.value + 20
    claimed = dataclasses.replace(
        recorded,
        metrics={"top1": Metric(wrong, wrong - 1, wrong + 1, recorded.score.n)},
        environment=recorded.environment | {"torch": "1.0"},
        correct=None,
    )
    record.write(claimed, tmp_path / "results")
    assert mimbench(f"verify {recorded.id} -q") == 1
    said = capsys.readouterr().out
    assert "OUTSIDE" in said
    assert "torch was 1.0 and is " in said


@pytest.mark.parametrize(
    ("value", "interval", "verdict"),
    [(50.0, (49.0, 51.0), "equal"), (50.5, (49.0, 51.0), "inside"), (48.0, (49.0, 51.0), "outside")],
)
def test_the_recorded_interval_decides(
    recorded: record.Record, value: float, interval: tuple[float, float], verdict: str
) -> None:
    then = dataclasses.replace(recorded, metrics={"top1": Metric(50.0, *interval, 100), "bare": Metric(1.0)})
    now = dataclasses.replace(recorded, metrics={"top1": Metric(value, None, None, 100), "bare": Metric(2.0)})
    found = verify.compared(then, now)
    assert [line.verdict for line in found.lines] == [verdict, "no interval"]
    assert found.passed == (verdict != "outside")


def test_only_mimbench_is_run(recorded: record.Record) -> None:
    for command in ("rm -rf x", "mimbench pretrain --method mae", "bash -c 'mimbench run'"):
        with pytest.raises(ConfigError, match="was not made by"):
            verify.verify(dataclasses.replace(recorded, command=command))


def test_a_command_that_no_longer_works_is_named(recorded: record.Record) -> None:
    command = "mimbench run --method mae --protocol knn --set no_such_setting=1"
    with pytest.raises(ResultsError, match="could not be repeated"):
        verify.verify(dataclasses.replace(recorded, command=command), quiet=True)
