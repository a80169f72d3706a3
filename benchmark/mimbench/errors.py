"""Faults that the user can mend. The command prints them as one line and exits with their code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mimbench.visible import one_line


class MimbenchError(Exception):
    """A fault named in one sentence, with its remedy in another, on one line whatever names are in it.

    Everything that bad input can cause is raised as this class or a child of it; any other exception
    that reaches the command line is a bug of ours.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = one_line(problem.rstrip("."))
        self.remedy = one_line(remedy.rstrip("."))
        sentences = [self.problem, *([self.remedy] if remedy else [])]
        super().__init__(" ".join(text if text.endswith("?") else f"{text}." for text in sentences))


class UnknownName(MimbenchError):
    """A name that nothing answers to; suggests the nearest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known) or 'none'}."
        super().__init__(f"unknown {kind} '{name}'", f"{hint} {remedy}".rstrip())


class ConfigError(MimbenchError):
    """A setting with a wrong name, type or value."""


class DataError(MimbenchError):
    """Data that is missing, damaged or of the wrong kind."""


class CheckpointError(MimbenchError):
    """A checkpoint that is damaged or does not fit the model."""


class NonFiniteLoss(MimbenchError):
    """Training met a NaN or an infinity; the last good checkpoint is kept."""


class ProcessLost(MimbenchError):
    """One of several processes that train together has ended, or cannot be reached."""


class ResultsError(MimbenchError):
    """Results could not be written or read."""


class DatabaseBusy(ResultsError):
    """Another process is bringing the database up to date."""


class OutOfMemory(MimbenchError):
    """A training step did not fit into memory."""


def ran_out_of_memory(fault: BaseException) -> bool:
    """Whether an exception says that memory is used up: Python's and NumPy's, torch's on a GPU, its allocator's."""
    if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":
        return True  # torch's, which is not imported for its name alone
    told = (
        "can't allocate memory",
        "not enough memory",
        "size calculation overflowed",
        "multiplication overflow",
    )
    return isinstance(fault, RuntimeError) and any(words in str(fault) for words in told)


class LabelLeak(MimbenchError):
    """A protocol asked for test labels before its choices were final. Always a bug in the protocol."""
