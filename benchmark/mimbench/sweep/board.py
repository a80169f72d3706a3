"""What the user sees of a sweep: a live table on a terminal, a line for each event elsewhere, a summary at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mimbench.sweep.plan import Plan, Task, groups
from mimbench.sweep.schedule import Ended, State

MOST_ROWS = 16  # of running tasks on a terminal


class Board:
    """See ``schedule.Board``. Use as a context: the live table is gone at its end."""

    def __init__(self, plan: Plan, logs: Path, console: Console | None = None, quiet: bool = False) -> None:
        self.plan, self.logs, self.quiet = plan, logs, quiet
        self.console = console or Console(stderr=True, quiet=quiet)
        self.total = len(plan.todo)
        self.began = time.monotonic()
        self.settled = 0  # tasks that are done, failed or blocked
        self.left: float | None = None
        self.live = (
            Live(console=self.console, refresh_per_second=2, transient=True)
            if self.console.is_terminal and not quiet
            else None
        )

    def __enter__(self) -> Board:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, task: Task) -> None:
        """A task began to run."""
        if self.live is None:
            self.say(f"start   {task.label}")

    def ended(self, task: Task, ended: Ended, state: str, note: str) -> None:
        """A task ended: "done", "again" where it will be repeated, or "failed"."""
        if state == "done":
            if self.live is None:
                left = "" if self.left is None else f", about {duration(self.left)} left"
                count = f"{self.settled + 1} of {self.total}{left}"
                self.say(f"done    {task.label}, in {duration(ended.seconds)}: {count}")
            return
        where = f"; log: {self.logs / task.log}" if state == "failed" else ""
        self.say(f"{state:7} {task.label}: {'; '.join(filter(None, (ended.why, note)))}{where}")

    def show(self, state: State) -> None:
        """Redraws the table, or keeps what the next line needs."""
        self.settled = sum(map(len, (state.done, state.found, state.failed, state.blocked)))
        self.left = state.seconds_left()
        if self.live is not None:
            self.live.update(self.table(state))

    def table(self, state: State) -> Group:
        """How far the sweep is, by kind of task, and what runs."""
        counts = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("", "done", "running", "waiting", "failed"):
            counts.add_column(column, justify="left" if not column else "right")
        tasks = self.plan.tasks
        for group in groups(self.plan):
            parts = (
                [*state.done, *state.found],
                state.running,
                [*state.waiting, *(name for name in state.started if name not in state.running)],
                [*state.failed, *state.blocked],
            )
            numbers = [sum(tasks[name].group == group for name in part) for part in parts]
            if sum(numbers):
                counts.add_row(group, *(str(number or "") for number in numbers))
        running = Table(box=None, pad_edge=False, show_header=False)
        running.add_column(no_wrap=True)
        running.add_column(justify="right", no_wrap=True)
        running.add_column(no_wrap=True, overflow="ellipsis", style="dim")
        now = time.monotonic()
        for name, at in list(state.running.items())[:MOST_ROWS]:
            running.add_row(tasks[name].label, duration(now - at.since), Text(at.note))
        if len(state.running) > MOST_ROWS:
            running.add_row(f"and {len(state.running) - MOST_ROWS} more")
        left = "" if self.left is None else f", about {duration(self.left)} left"
        head = f"{self.plan.sweep.name}: {self.settled} of {self.total} in {duration(now - self.began)}{left}"
        if state.elsewhere:
            head += f"; {len(state.elsewhere)} with another process"
        return Group(
            Text(head),
            ProgressBar(total=max(1, self.total), completed=self.settled, width=60),
            counts,
            running,
        )


def duration(seconds: float) -> str:
    """A time for people, as coarse as it may be."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def summary(state: State, seconds: float, logs: Path) -> list[str]:
    """The lines at the end: counts, then what failed, why, and how to repeat it."""
    tasks = state.plan.tasks
    recorded = sum(tasks[name].kind == "evaluate" for name in state.done)
    head = f"{recorded} records and {len(state.done) - recorded} pretrainings in {duration(seconds)}"
    if state.found:
        head += f", {len(state.found)} more by other processes"
    if state.repeated:
        head += f"; {state.repeated} times a task crashed and was repeated"
    lines = [f"{head}."]
    if state.failed:
        lines += ["", f"{len(state.failed)} failed, {len(state.blocked)} that need them were not tried:"]
        for name, why in state.failed.items():
            held_up = sum(first == name for first in state.blocked.values())
            more = f" (holds up {held_up})" if held_up else ""
            lines += [f"  {tasks[name].label}{more}: {why}", f"    log: {logs / tasks[name].log}"]
        lines += ["", "To repeat these alone (the sweep does it too, with all that needs them):"]
        lines += [f"  {tasks[name].command}" for name in state.failed]
    return lines


def content(state: State, seconds: float) -> dict[str, Any]:
    """How a sweep ended, as plain tables and lists."""
    tasks = state.plan.tasks
    ready = set(tasks) - set(state.plan.todo)
    return {
        "name": state.plan.sweep.name,
        "seconds": seconds,
        "repeated": state.repeated,
        "already": {kind: sum(tasks[n].kind == kind for n in ready) for kind in ("pretrain", "evaluate")},
        "done": [
            {"id": name, "task": tasks[name].label, "seconds": taken} for name, taken in state.done.items()
        ],
        "found": [{"id": name, "task": tasks[name].label} for name in sorted(state.found)],
        "failed": [
            {"id": name, "task": tasks[name].label, "why": why, "command": tasks[name].command}
            for name, why in state.failed.items()
        ],
        "blocked": [{"id": name, "task": tasks[name].label, "by": by} for name, by in state.blocked.items()],
    }
