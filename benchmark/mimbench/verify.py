"""Does a recorded run come out again here? Its command is run anew, and its metrics set beside the recorded ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimbench import record
from mimbench.environment import environment
from mimbench.errors import ConfigError, ResultsError
from mimbench.record import Record

# What may move a number in its last digits; the rest of an environment says who ran it where.
TELLING = (
    "python",
    "mimbench",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "cpu",
    "threads",
    "device",
    "gpu",
    "cuda",
)

# Those of ``runner.Job.command``.
OPTIONS = frozenset(
    f"--{name}"
    for name in ("method", "protocol", "dataset", "eval-dataset", "preset", "seed", "set", "weights")
)


@dataclass(frozen=True)
class Line:
    """A metric as it was recorded and as it came out now."""

    name: str
    recorded: float
    low: float | None  # of the recorded interval
    high: float | None
    repeated: float
    unit: str
    verdict: str  # "equal" to the last digit, "inside" or "outside" the recorded interval, "no interval"


@dataclass(frozen=True)
class Verification:
    """What a repetition came to."""

    run: str
    primary: str
    lines: list[Line]
    environment: dict[str, tuple[Any, Any]]  # what differs: then and now
    code: str  # how today's code differs from that of the record, or ""
    seconds: float  # of pretraining and evaluation, now

    @property
    def passed(self) -> bool:
        """Whether the metric that ranks is equal or inside its recorded interval."""
        return next(line.verdict for line in self.lines if line.name == self.primary) in ("equal", "inside")


def verify(run: Record, *, reuse: bool = False, quiet: bool = False) -> Verification:
    """Repeats ``run`` by its own command, pretraining included, and leaves no record.

    ``reuse`` takes a pretraining that is in the cache already, so that only the evaluation is repeated. Raises
    ConfigError for a record whose command may not be run, see ``words_of``, and ResultsError where the repetition
    fails.
    """
    words = words_of(run.command, f"run {run.id}")
    with tempfile.TemporaryDirectory(prefix="mimbench-verify-") as place:
        results = Path(place) / "results"
        variables = {**os.environ, "MIMBENCH_RESULTS": str(results)}
        if not reuse:
            variables["MIMBENCH_CACHE"] = str(Path(place) / "cache")
        # Another process, as the user would start it: no state of this one can leak into the result.
        done = subprocess.run(
            [sys.executable, "-m", "mimbench", *words, *(["--quiet"] if quiet else [])],
            env=variables,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        found, _ = record.scan(results)
        again = next((made for made in found if made.id == run.id), None)
        if done.returncode or again is None:
            raise ResultsError(
                f"run {run.id} could not be repeated: its command ended with {done.returncode}",
                f"It is: {run.command}",
            )
    return compared(run, again)


def words_of(command: str, whose: str) -> list[str]:
    """The words after ``mimbench`` of a recorded command, which may come from a stranger.

    It must be ``mimbench run`` with the options that records are made with, each with its value: none of them
    writes anywhere but to the results and the cache. ``~`` is the user's home folder. Raises ConfigError for all else.
    """
    try:
        program, *words = shlex.split(command)
    except ValueError as fault:
        raise ConfigError(f"the command of {whose} is damaged: {fault}") from None
    if [program, *words[:1]] != ["mimbench", "run"]:
        raise ConfigError(f"{whose} was not made by 'mimbench run' but by: {command}")
    options, values = words[1::2], words[2::2]
    if len(options) != len(values) or not set(options) <= OPTIONS or "\0" in command:
        allowed = ", ".join(sorted(OPTIONS))
        raise ConfigError(
            f"{whose} has a command that no run has: {command}",
            f"Each option is one of {allowed}, with its value",
        )
    if re.search(r"hf[-_]hub:|local-dir:", command, re.IGNORECASE):
        raise ConfigError(
            f"the command of {whose} names weights that anybody may have published: {command}",
            "Run it yourself if you trust them",
        )
    return ["run", *(os.path.expanduser(word) for word in words[1:])]


def compared(run: Record, again: Record) -> Verification:
    """The metrics of a recorded run beside those of its repetition."""
    lines = []
    for name, metric in run.metrics.items():
        if name not in again.metrics:
            raise ResultsError(f"the repetition of {run.id} has no {name}")
        value = again.metrics[name].value
        verdict = "no interval"
        if value == metric.value:
            verdict = "equal"
        elif metric.low is not None and metric.high is not None:
            verdict = "inside" if metric.low <= value <= metric.high else "outside"
        lines.append(Line(name, metric.value, metric.low, metric.high, value, metric.unit, verdict))
    now = {**environment(), **again.environment}
    differs = {
        name: (run.environment.get(name), now.get(name))
        for name in TELLING
        if run.environment.get(name) != now.get(name)
    }
    seconds = again.pretrain.seconds + again.seconds.get("total", 0.0)
    return Verification(run.id, run.primary, lines, differs, record.stale(run) or "", seconds)
