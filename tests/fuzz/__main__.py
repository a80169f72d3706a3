"""Gives each input a process of its own with limits, and reports every input that mimbench does not stand.

make fuzz
PYTHONPATH=tests .venv/bin/python -m fuzz --inputs 200 --only images --seed 1
PYTHONPATH=tests .venv/bin/python -m fuzz --only images.decode --number 17 --keep /tmp/input
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz import PREPARED, Target, every_target, generator, plan
from mimbench.compat import torchvision

MEMORY = 1024  # MiB that one input may take above what the process has before
SECONDS = 30.0  # of the processor that one input may take
PATIENCE = 10  # times as long it may take by the clock, on a machine that does other work as well
MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    name: str
    number: int
    fault: str  # empty where all is well
    refused: bool  # whether mimbench raised an error of its own
    seconds: float  # of the processor
    memory: float  # MiB above what the process had before


def feed(function: Target, name: str, number: int, seed: int, folder: Path) -> bool:
    """Makes one input and feeds it; whether mimbench refused it. Raises what no input may lead to."""
    from mimbench.errors import MimbenchError

    places = {f"MIMBENCH_{name.upper()}": str(folder / name) for name in ("cache", "results")}
    with mock.patch.dict(os.environ, places), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library, on the input
        try:
            function(generator(name, number, seed), folder)
        except MimbenchError as fault:
            said = str(fault)
            assert "\n" not in said, f"an error of several lines: {said!r:.200}"
            assert len(said) < 5000, f"an error of {len(said)} letters: {said:.200}"
            return True
    return False


def _child(
    function: Target, name: str, number: int, options: argparse.Namespace, folder: Path, pipe: int
) -> None:
    """In the new process: sets the limits, runs, and writes what came of it into the pipe."""
    os.setsid()  # so that what it starts ends with it
    # Threads reserve more than they use.
    space = _pages(0) * resource.getpagesize() + (3 * options.memory + 1024) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = math.ceil(options.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    known = set(sys.modules)
    answer: dict[str, Any] = {"fault": "", "refused": False}
    answer["before"] = _pages(1) * resource.getpagesize() / MIB
    try:
        answer["refused"] = feed(function, name, number, options.seed, folder)
    except BaseException as fault:
        answer["fault"] = "".join(traceback.format_exception(fault))[-3000:]
    imported = [name for name in sys.modules if name not in known and sys.modules[name] is not None]
    answer["imported"] = imported[:1000]
    with contextlib.suppress(OSError), os.fdopen(pipe, "wb") as stream:
        stream.write(json.dumps(answer).encode())
    os._exit(0)


def try_one(function: Target, name: str, number: int, options: argparse.Namespace, folder: Path) -> Outcome:
    """Feeds one input to a process of its own and waits for it, but not too long."""
    folder.mkdir(parents=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(function, name, number, options, folder, writing)
    os.close(writing)
    try:
        said, late = _answer(reading, time.monotonic() + PATIENCE * options.seconds)
    finally:
        os.close(reading)
        for end in (os.killpg, os.kill):  # all that it started, and itself where it has no group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "itself"
    try:
        answer = json.loads(said)
    except ValueError:
        answer = {"fault": f"the process was ended by {ended}", "refused": False, "before": 0}
    memory = used.ru_maxrss / 1024 - answer["before"]
    for module in answer.get("imported", ()):  # so that the next process need not
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    fault = str(answer["fault"])
    if late:
        fault = f"no answer after {PATIENCE * options.seconds:.0f} s"
    elif ended == "SIGXCPU":
        fault = f"no answer after {options.seconds:.0f} s of the processor"
    elif not fault and memory > options.memory:
        fault = f"it took {memory:.0f} MiB, {options.memory} are allowed"
    return Outcome(name, number, fault, bool(answer["refused"]), used.ru_utime + used.ru_stime, memory)


def _answer(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """What comes out of a pipe until it is closed, and whether that took too long."""
    said = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return said, True
        part = os.read(pipe, 2**16)
        if not part:
            return said, False
        said += part


def _pages(column: int) -> int:
    """Pages of this process: 0 for all that it has reserved, 1 for those in memory."""
    return int(Path("/proc/self/statm").read_text().split()[column])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2400, help="at least so many (default 2400)")
    parser.add_argument("--seed", type=int, default=0, help="other inputs (default 0)")
    parser.add_argument("--only", action="append", help="targets that begin so; may be given again")
    parser.add_argument("--number", type=int, help="this input alone of each target")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for one input (default {SECONDS:.0f})"
    )
    parser.add_argument("--memory", type=int, default=MEMORY, help=f"MiB for one input (default {MEMORY})")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that fail")
    options = parser.parse_args()
    chosen = tuple(options.only or [""])
    names = [name for name in every_target() if name.startswith(chosen)]
    if not names:
        parser.error(f"no target begins with {' or '.join(chosen)}; there are {', '.join(every_target())}")
    pairs = plan(options.inputs, names)
    if options.number is not None:
        pairs = [(name, options.number) for name in names]
    sys.exit(run(pairs, options))


def run(pairs: list[tuple[str, int]], options: argparse.Namespace) -> int:
    """Tries all inputs, or those until Ctrl-C or SIGTERM, prints what fails and a summary; 1 when anything did."""
    targets = every_target()
    torchvision()
    for prepare in PREPARED:
        prepare()
    outcomes: list[Outcome] = []
    began = time.monotonic()
    # Shells keep Ctrl-C from what runs in the background.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop = contextlib.suppress(KeyboardInterrupt)
    with stop, tempfile.TemporaryDirectory(prefix="mimbench-fuzz-") as top:
        for name, number in pairs:
            folder = Path(top) / f"{name}-{number}"
            outcomes.append(try_one(targets[name], name, number, options, folder))
            if outcomes[-1].fault:
                print(
                    f"FAILED {name} --number {number} --seed {options.seed}\n{outcomes[-1].fault}\n",
                    flush=True,
                )
                if options.keep:
                    shutil.copytree(folder, options.keep / folder.name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    if len(outcomes) < len(pairs):
        print(f"stopped before {len(pairs) - len(outcomes)} inputs more")
    print(summary(outcomes, time.monotonic() - began) if outcomes else "no input was tried")
    return int(any(outcome.fault for outcome in outcomes))


def summary(outcomes: list[Outcome], seconds: float) -> str:
    """A line a target, and one of all."""

    def line(some: list[Outcome]) -> str:
        refused, faults = sum(o.refused for o in some), sum(bool(o.fault) for o in some)
        worst = f"{max(o.memory for o in some):.0f} MiB, {max(o.seconds for o in some):.1f} s"
        return f"{len(some):5} inputs, {refused:5} refused, {faults:3} faults, at most {worst}"

    names = sorted({outcome.name for outcome in outcomes})
    lines = [f"{name:20} {line([o for o in outcomes if o.name == name])}" for name in names]
    return "\n".join([*lines, f"{f'all, in {seconds:.0f} s':20} {line(outcomes)}"])


if __name__ == "__main__":
    main()
