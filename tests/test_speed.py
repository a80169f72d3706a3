"""The speed harness: fair turns, honest numbers, records that read back; and each script in its quick mode."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimbench import paths, speed
from mimbench.errors import ResultsError
from mimbench.speed import Bar, Comparison, Limit, Scale, Timing

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmark" / "speed").glob("*.py"))


def compared(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "name": "knn",
        "title": "Neighbours",
        "work": "k = 20",
        "ours": "mimbench",
        "timings": [
            Timing("mimbench", [1.0, 2.0, 9.0], "0.1.0"),
            Timing("peer", [3.0, 5.0, 4.0], "1.2", "brute force"),
        ],
        "agreement": ["all neighbours equal"],
        "limit": Limit("the matrix product", 0.5),
        "bars": [Bar("peer", 1.5)],
        "skipped": {"absent": "it is not installed"},
        "growth": [Scale("1x", 2.0, 3 * 2**20), Scale("2x", 4.0)],
        "created": "2026-11-21T12:00:00Z",
        "environment": {"cpu": "A processor", "gpu": None, "cores": 2, "device": "cpu"},
    }
    return Comparison(**(values | changes))


# The harness


def test_contenders_take_turns_each_first_once_and_the_first_round_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mimbench import machine

    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: order.append(name) for name in "abc"}

    def timed(call: Callable[[], object], device: object) -> float:
        call()
        return float(len(order))

    monkeypatch.setattr(machine, "seconds", timed)
    found = speed.measure(calls, rounds=4)
    assert "".join(order) == "abcbcacababc"
    assert found == {"a": [6.0, 8.0, 10.0], "b": [4.0, 9.0, 11.0], "c": [5.0, 7.0, 12.0]}


def test_medians_give_the_ratio_and_the_distance_to_the_limit() -> None:
    found = compared()
    assert (found.timing("mimbench").median, found.timing("peer").median) == (2.0, 4.0)
    assert (found.ratio("peer"), found.ratio("mimbench"), found.of_limit) == (2.0, 1.0, 4.0)
    assert compared(limit=None).of_limit is None


def test_a_comparison_reads_back_as_it_was_and_replaces_one_of_the_same_machine() -> None:
    for changes in ({}, {"limit": None, "bars": [], "growth": [], "skipped": {}}):
        found = compared(**changes)
        file = speed.write(found)
        assert speed.read(file) == found
    assert list(file.parent.iterdir()) == [file]
    faster = dataclasses.replace(found, environment=found.environment | {"cores": 64})
    threaded = dataclasses.replace(found, threads=2)
    files = {file, speed.write(faster), speed.write(threaded)}
    assert set(speed.files(paths.results())) == files
    assert len(files) == 3
    assert file.is_relative_to(paths.results())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": 99}, "schema is 99"),
        ({"timings": []}, "lack ours"),
        ({"ours": "other"}, "lack ours"),
        ({"timings": [{"name": "mimbench", "seconds": [], "version": "", "note": ""}], "bars": []}, "is missing"),
        ({"timings": [{"name": "mimbench", "seconds": ["1"], "version": "", "note": ""}]}, "should be float"),
        ({"limit": {"what": "", "seconds": 0.0}}, "missing or not above 0"),
        ({"limit": {"what": ""}}, "lacks: seconds"),
        ({"bars": [{"against": "nobody", "ratio": 2.0}]}, "not there"),
        ({"title": "<b>", "more": 1}, "unknown keys: more"),
        ({"created": "2026-11-21T12:00:00"}, "without its zone"),
        ({"created": ""}, "no time"),
        ({"growth": [{"size": "1x", "seconds": float("nan"), "peak_bytes": None}]}, "holds NaN"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_its_name(change: dict[str, Any], why: str) -> None:
    file = speed.write(compared())
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ResultsError, match=r"knn-\w+\.json is no speed comparison.*make bench") as raised:
        speed.read(file)
    assert why in str(raised.value)
    good = speed.write(compared(name="linear"))
    found, faults = speed.scan(paths.results())
    assert (found, len(faults)) == ([speed.read(good)], 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\ufeff", "[" * 100_000])
def test_what_is_no_comparison_at_all_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ResultsError, match="no speed comparison"):
        speed.read(tmp_path / "x.json")


def test_what_is_printed_names_bars_missed_as_well_as_reached(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    speed.show(compared(bars=[Bar("peer", 1.5), Bar("peer", 2.5), Bar("absent", 3.0)]))
    printed = capsys.readouterr().out
    for text in (
        *("bar: 1.5x peer: reached (2.00x)", "bar: 2.5x peer: missed (2.00x)", "bar: 3x absent: not run"),
        *(
            "limit: 0.5 s, the matrix product; ours takes 4.00 times that",
            "skipped: absent: it is not installed",
        ),
        *("growth: 1x: 2 s, 3 MiB more at its peak", "growth: 2x: 4 s\n", "agreement: all neighbours equal"),
        *("cpu, 1 thread, median of 3 interleaved rounds", "peer 1.2", "3 to 5", "brute force"),
    ):
        assert text in printed, text


# The scripts


def quick(arguments: list[str], folder: Path, threads: str = "1") -> str:
    """What a script prints in quick mode; it must neither fail nor leave anything in the results."""
    results = folder / "results"
    places = {"MIMBENCH_RESULTS": str(results), "MIMBENCH_CACHE": str(folder / "cache")}
    command = [sys.executable, *arguments, "--quick", "--rounds", "2"]
    environment = os.environ | places | {"OMP_NUM_THREADS": threads, "COLUMNS": "160"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert not results.exists(), "quick mode is not saved"
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_runs_and_its_contenders_agree(script: Path, tmp_path: Path) -> None:
    printed = quick([str(script)], tmp_path)
    assert "mimbench" in printed
    assert "agreement: " in printed
    assert "cpu, 1 thread, median of 1 interleaved rounds" in printed


def test_peers_that_are_not_installed_are_skipped_with_a_reason(tmp_path: Path) -> None:
    # None in sys.modules makes an import fail as if the package were not there.
    blocked = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('faiss', 'lightly', 'sklearn'))); "
        f"sys.argv[0] = {str(SCRIPTS[0].with_name('knn.py'))!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    printed = quick(["-c", blocked], tmp_path)
    for name in ("faiss IndexFlatIP", "scikit-learn", "lightly knn_predict"):
        assert f"skipped: {name}: " in printed
    assert "torch mm + topk" in printed
    assert "bar: 1.2x faiss IndexFlatIP: not run" in printed


def test_threads_are_pinned_before_any_library_is_loaded(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from mimbench.speed import Comparison, Timing, main\n"
        "def run(options):\n"
        "    import torch\n"
        "    threads = f\"{os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()}\"\n"
        "    yield Comparison('x', threads, '', 'a', [Timing('a', [1.0])], ['equal'])\n"
        "main(run, 'a script')\n"
    )
    assert quick([str(script), "--threads", "2"], tmp_path, threads="1").startswith("\n2 2\n")
