"""Many runs from one file: which there are (``file``, ``plan``), in which order and how often tried (``schedule``),
and where: on this machine (``local``) or on a Ray cluster (``cluster``)."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimbench.sweep.cluster import Cluster
    from mimbench.sweep.plan import Plan
    from mimbench.sweep.schedule import State


@dataclass(frozen=True)
class Swept:
    """A sweep that ran to its end."""

    state: State
    seconds: float
    logs: Path

    def summary(self) -> list[str]:
        """See ``board.summary``."""
        from mimbench.sweep import board

        return board.summary(self.state, self.seconds, self.logs)

    def content(self) -> dict[str, Any]:
        """See ``board.content``."""
        from mimbench.sweep import board

        return board.content(self.state, self.seconds)


def run(
    plan: Plan,
    executor: str,
    *,
    workers: int | None = None,
    address: str | None = None,
    logs: Path | None = None,
    quiet: bool = False,
) -> Swept:
    """Does what a plan has left to do, by the executor "local" or "ray", and brings the database up to date.

    SIGTERM, by which batch systems announce the end of a job, stops it as Ctrl-C does: with KeyboardInterrupt, after
    all that runs has saved its state.
    """
    from mimbench import database, paths
    from mimbench.sweep import schedule
    from mimbench.sweep.board import Board
    from mimbench.sweep.local import Local

    logs = logs or paths.cache() / "sweeps" / plan.sweep.name
    began = time.monotonic()
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            machines: Cluster | Local
            warnings = []
            if executor == "ray" and plan.todo:
                from mimbench.sweep import cluster

                ray = stack.enter_context(cluster.connected(address, logs / "ray.log"))
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own, which aborts
                machines = cluster.Cluster(ray, plan, logs)
                stack.callback(machines.close)
                warnings = machines.warnings()
            else:
                machines = Local(plan, logs, workers=workers)
            board = stack.enter_context(Board(plan, logs, quiet=quiet))
            for warning in warnings:
                board.say(f"warning: {warning}")
            try:
                state = schedule.run(plan, machines, board, schedule.Claims(hold=executor == "local"))
            finally:
                database.catch_up(paths.results(), board.say)
    finally:
        signal.signal(signal.SIGTERM, usual)
    return Swept(state, time.monotonic() - began, logs)
