"""Start-up: fresh processes until the help is printed, methods are listed, or the first training step is done.

The run gets an empty cache and an empty results folder each time. Its process ends itself after the optimiser's
first step, so that what is timed is all that a user waits for before training goes on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

from mimbench.errors import MimbenchError
from mimbench.speed import Bar, Comparison, Limit, Timing, main, measure, version

FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(42))
sys.argv = "mimbench run --method mae --dataset digits --preset smoke --protocol linear".split()
runpy.run_module("mimbench", run_name="__main__")
"""
LIGHTLY = "from mimbench.compat import torchvision; torchvision(); import lightly.transforms, lightly.models"
HELP, LIST, RUN, NOTHING = "mimbench --help", "mimbench list methods", "first training step", "python -c pass"
CALLS: dict[
    str, tuple[list[str], int, float | None]
] = {  # arguments, exit code, the most seconds it may take
    HELP: (["-m", "mimbench", "--help"], 0, 0.3),
    LIST: (["-m", "mimbench", "list", "methods"], 0, 0.5),
    RUN: (["-c", FIRST_STEP], 42, 6.0),
    NOTHING: (["-c", "pass"], 0, None),
    "import torch": (["-c", "import torch"], 0, None),
    "import lightly": (["-c", LIGHTLY], 0, None),
}


def start(name: str) -> None:
    """One process, from an empty cache; raises where it does not end as it should."""
    arguments, expected, _ = CALLS[name]
    with tempfile.TemporaryDirectory() as place:
        folders = {"MIMBENCH_CACHE": f"{place}/cache", "MIMBENCH_RESULTS": f"{place}/results"}
        done = subprocess.run(
            [sys.executable, *arguments], env=os.environ | folders, capture_output=True, text=True
        )
    if done.returncode != expected:
        raise MimbenchError(f"'{name}' ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def run(options: argparse.Namespace) -> Iterable[Comparison]:
    skipped = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in CALLS:
        try:
            start(name)
        except MimbenchError as fault:
            if name != "import lightly":
                raise
            skipped[name] = str(fault).partition("\n")[0]
        else:
            calls[name] = lambda name=name: start(name)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    timings = []
    for name, seconds in measure(calls, rounds).items():
        most, middle, note = CALLS[name][2], statistics.median(seconds), ""
        if most is not None:
            note = f"bar {most:g} s: {'reached' if middle < most else 'missed'}"
        package = {"import torch": "torch", "import lightly": "lightly"}.get(name, "mimbench")
        timings.append(Timing(name, seconds, "" if name == NOTHING else version(package), note))
    bare = next(timing.median for timing in timings if timing.name == NOTHING)
    yield Comparison(
        name="startup",
        title="Start-up",
        work="a fresh process each, with an empty cache; mae on digits, preset smoke, to the first step",
        ours=HELP,
        timings=timings,
        agreement=["each process ended as expected, the run after the optimiser's first step"],
        limit=Limit("a Python that does nothing", bare),
        bars=[Bar("import torch", 1.0)],
        skipped=skipped,
    )


if __name__ == "__main__":
    main(run, __doc__)
