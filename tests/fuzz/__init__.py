"""A fuzzer: inputs that nobody would write, by seed, and what mimbench may do with them.

A *target* is a function of a random generator and an empty folder. It makes one input, feeds it to mimbench and
returns; it may raise a ``MimbenchError`` of one line. Anything else is a failure: another exception, a check of its
own that does not hold, more time or memory than it may take, or a wrong exit code.

``make fuzz`` gives each input a process of its own; ``tests/test_fuzz.py`` runs a small share within pytest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

Target = Callable[[Random, Path], None]

TARGETS: dict[str, Target] = {}
WEIGHTS: dict[str, int] = {}  # how many inputs of a target there are for each of the others


def target(name: str, weight: int = 1) -> Callable[[Target], Target]:
    """Registers a function under a name such as ``images.decode``."""

    def register(function: Target) -> Target:
        TARGETS[name], WEIGHTS[name] = function, weight
        return function

    return register


PREPARED: list[Callable[[], Any]] = []


def prepared(function: Callable[[], Any]) -> Callable[[], Any]:
    """What inputs of a target begin with, made once and before any of them."""
    PREPARED.append(functools.cache(function))
    return PREPARED[-1]


def every_target() -> dict[str, Target]:
    """All targets by name, in a stable order."""
    from fuzz import commands, documents, pictures, tables, tensors  # noqa: F401 - they register themselves

    return dict(sorted(TARGETS.items()))


def plan(inputs: int, names: Sequence[str]) -> list[tuple[str, int]]:
    """At least ``inputs`` (target, number) pairs, shared out by weight over the targets ``names``."""
    rounds = -(-inputs // sum(WEIGHTS[name] for name in names))
    return [
        (name, turn * WEIGHTS[name] + n)
        for turn in range(rounds)
        for name in names
        for n in range(WEIGHTS[name])
    ]


def generator(name: str, number: int, seed: int = 0) -> Random:
    """The random numbers of one input."""
    return Random(f"{seed}/{name}/{number}")
