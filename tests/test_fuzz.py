"""A small share of the fuzzer's inputs, and that the fuzzer sees what it is there to see. ``make fuzz`` tries more."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from unittest import mock

import fuzz
import pytest
from fuzz import __main__ as fuzzer

from mimbench.errors import ConfigError

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the fuzzer's limits on memory and time are those of Linux"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that has not started threads, as those that pytest's may have are lost in a fork."""
    variables = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False
    )


def test_a_hundred_inputs_are_stood() -> None:
    done = python("-m", "fuzz", "--inputs", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    tried = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()[:-1]}
    assert tried == {name: fuzz.WEIGHTS[name] for name in fuzz.every_target()}
    assert sum(tried.values()) >= 100


def test_inputs_are_the_same_each_time_and_differ_from_each_other() -> None:
    drawn = {
        (name, number, seed): fuzz.generator(name, number, seed).random()
        for name in ("sql", "cli")
        for number in range(3)
        for seed in range(2)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert all(fuzz.generator(*key).random() == value for key, value in drawn.items())
    pairs = fuzz.plan(300, list(fuzz.every_target()))
    assert len(pairs) == len(set(pairs)) >= 300
    assert {name for name, _ in pairs} == set(fuzz.every_target())


class TwoLines(ConfigError):
    """An error that was put together wrongly."""

    def __str__(self) -> str:
        return "one\ntwo"


def fine(rng: Random, folder: Path) -> None:
    (folder / "x").write_text("x")


def refuses(rng: Random, folder: Path) -> None:
    raise ConfigError("it is not right", "Mend it")


def raises(rng: Random, folder: Path) -> None:
    _ = {}["nothing"]


def says_two_lines(rng: Random, folder: Path) -> None:
    raise TwoLines("one")


def leaves(rng: Random, folder: Path) -> None:
    sys.exit(0)


def vanishes(rng: Random, folder: Path) -> None:
    os._exit(0)


def crashes(rng: Random, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def computes(rng: Random, folder: Path) -> None:
    while True:
        pass


def waits(rng: Random, folder: Path) -> None:
    if os.fork() == 0:  # who holds the pipe open as well
        time.sleep(1000)
    time.sleep(1000)


def takes(rng: Random, folder: Path) -> None:
    len(b"x" * 300 * fuzzer.MIB)


def asks_for(rng: Random, folder: Path) -> None:
    len(bytes(64 * 2**30))


PLANTED: dict[Callable[[Random, Path], None], str] = {
    fine: "",
    refuses: "",
    raises: "KeyError: 'nothing'",
    says_two_lines: "an error of several lines",
    leaves: "SystemExit: 0",
    vanishes: "the process was ended by itself",
    crashes: "the process was ended by SIGSEGV",
    computes: "no answer after",
    waits: "no answer after",
    takes: r"it took 3\d\d MiB, 100 are allowed",
    asks_for: "MemoryError",
}


def plant() -> None:
    """In a process of its own: what the fuzzer says of targets whose faults are known."""
    targets = {function.__name__: function for function in PLANTED}
    options = argparse.Namespace(seed=0, seconds=1.0, memory=100, keep=None)
    with (
        mock.patch.object(fuzzer, "every_target", return_value=targets),
        mock.patch.object(fuzzer, "PATIENCE", 5),
    ):
        sys.exit(fuzzer.run([(name, 0) for name in targets], options))


def test_every_kind_of_fault_is_seen() -> None:
    done = python("-c", "import test_fuzz; test_fuzz.plant()")
    assert done.returncode == 1, done.stderr
    reports = {report.split()[0]: report.partition("\n")[2] for report in done.stdout.split("FAILED ")[1:]}
    expected = {function.__name__: fault for function, fault in PLANTED.items() if fault}
    assert set(reports) == set(expected)
    for name, fault in expected.items():
        assert re.search(fault, reports[name]), f"{name}: {reports[name]}"
    assert re.search(r"\n +refuses +1 inputs, +1 refused, +0 faults", done.stdout.replace("\n", "\n "))
    assert re.search(r"\nall, in \d+ s +11 inputs, +1 refused, +9 faults, at most 3\d\d MiB", done.stdout)


def test_a_target_that_is_not_there_is_said() -> None:
    done = python("-m", "fuzz", "--only", "nonesuch")
    assert done.returncode == 2
    assert "no target begins with nonesuch; there are archives.official" in done.stderr
