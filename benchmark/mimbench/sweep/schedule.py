"""The order in which tasks are done: what they need comes first, what crashes is tried again, what fails holds up
only what needs it."""

from __future__ import annotations

import collections
import time
from dataclasses import dataclass, field
from typing import Protocol

import filelock

from mimbench import paths, runner
from mimbench.sweep.plan import Plan, Task, written

USER_ERROR = 2  # exit code of a command that was asked for what cannot be: repeating it changes nothing
PAUSE = 0.5  # seconds between looks at what runs


@dataclass(frozen=True)
class Ended:
    """A task that ran to its end."""

    id: str
    code: int  # 0: all it should leave is there
    seconds: float
    why: str = ""  # what was wrong


@dataclass(frozen=True)
class Running:
    """A task that is being done."""

    since: float  # of time.monotonic
    note: str  # what it last said


class Executor(Protocol):
    """Where tasks run."""

    def room(self, task: Task) -> bool:
        """Whether a task can be started now."""
        ...

    def start(self, task: Task) -> None:
        """Starts a task."""
        ...

    def wait(self, seconds: float) -> list[Ended]:
        """The tasks that have ended, as soon as one has or when the time is over."""
        ...

    def running(self) -> dict[str, Running]:
        """The tasks that run now; those that wait for a machine are not among them."""
        ...

    def stop(self) -> None:
        """Ends all that runs, so that it can go on later."""
        ...


class Board(Protocol):
    """Who shows the user what happens."""

    def started(self, task: Task) -> None: ...

    def ended(self, task: Task, ended: Ended, state: str, note: str) -> None: ...

    def show(self, state: State) -> None: ...


@dataclass
class State:
    """How far a sweep is."""

    plan: Plan
    waiting: dict[str, Task]
    started: set[str] = field(default_factory=set)  # handed to the executor and not ended
    running: dict[str, Running] = field(default_factory=dict)  # of those, the ones that run
    found: set[str] = field(default_factory=set)  # that another process has done meanwhile
    done: dict[str, float] = field(default_factory=dict)  # and the seconds it took
    failed: dict[str, str] = field(default_factory=dict)  # and why
    blocked: dict[str, str] = field(default_factory=dict)  # and the task that failed before
    elsewhere: set[str] = field(default_factory=set)  # that another process is at
    repeated: int = 0

    def seconds_left(self) -> float | None:
        """About how long all that is left takes, from the means of its kind so far; None before there are any."""
        if not self.done:
            return None
        taken = collections.defaultdict(list)
        for name, seconds in self.done.items():
            taken[self.plan.tasks[name].group].append(seconds)
        overall = sum(self.done.values()) / len(self.done)
        means = {group: sum(times) / len(times) for group, times in taken.items()}
        now = time.monotonic()
        left = 0.0
        for name in [*self.waiting, *self.started]:
            mean = means.get(self.plan.tasks[name].group, overall)
            since = self.running[name].since if name in self.running else now
            left += max(0.0, mean - (now - since))
        return left / max(1, len(self.running))


class Claims:
    """The tasks that a sweep has taken, which other sweeps with the same cache then leave alone.

    A task itself holds its lock only once its process has begun, which takes seconds: sweeps that begin together
    would all choose the same one and wait for it. The locks of a sweep that was killed are free at once.
    """

    def __init__(self, hold: bool = True) -> None:
        """Without ``hold`` it only sees what others are at: Ray gets more tasks at once than files may be open."""
        self.hold = hold
        self.held: dict[str, filelock.BaseFileLock] = {}

    def take(self, task: Task) -> bool:
        """Takes a task; False where another process is at it."""
        if runner.held(paths.cache() / task.lock):
            return False
        if self.hold:
            file = paths.cache() / f"{task.lock}.taken"
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(file)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                return False
            self.held[task.id] = lock
        return True

    def leave(self, task: Task) -> None:
        """Gives a task back."""
        if lock := self.held.pop(task.id, None):
            lock.release()


def run(plan: Plan, executor: Executor, board: Board, claims: Claims | None = None) -> State:
    """Does all that a plan has left to do and says how it ended.

    What another process is at waits for its turn, and is not started when it is done by then. On Ctrl-C what runs is
    stopped before KeyboardInterrupt goes on.
    """
    claims = claims or Claims()
    sweep = plan.sweep
    state = State(plan, {name: plan.tasks[name] for name in plan.todo})
    tries: collections.Counter[str] = collections.Counter()
    not_before: dict[str, float] = {}
    try:
        while state.waiting or state.started:
            now = time.monotonic()
            ready = [
                task
                for task in state.waiting.values()
                if not_before.get(task.id, 0.0) <= now
                and not any(need in state.waiting or need in state.started for need in task.needs)
            ]
            state.elsewhere.clear()
            while (task := _next(ready, state, executor, claims)) is not None:
                ready.remove(task)
                del state.waiting[task.id]
                if written(task) != plan.before.get(task.id, 0):
                    state.found.add(task.id)
                    claims.leave(task)
                    continue
                state.started.add(task.id)
                executor.start(task)
            _look(state, executor, board)
            for ended in executor.wait(PAUSE):
                task = plan.tasks[ended.id]
                claims.leave(task)
                state.started.remove(task.id)
                if ended.code == 0:
                    state.done[task.id] = ended.seconds
                    board.ended(task, ended, "done", "")
                elif ended.code != USER_ERROR and tries[task.id] < sweep.retries:
                    pause = sweep.backoff * 2 ** tries[task.id]
                    tries[task.id] += 1
                    state.repeated += 1
                    state.waiting[task.id] = task
                    not_before[task.id] = time.monotonic() + pause
                    note = f"again in {pause:.0f} s ({tries[task.id]} of {sweep.retries})"
                    board.ended(task, ended, "again", note)
                else:
                    state.failed[task.id] = ended.why
                    lost = [other for other in state.waiting.values() if task.id in other.needs]
                    for other in lost:
                        del state.waiting[other.id]
                        state.blocked[other.id] = task.id
                    board.ended(task, ended, "failed", f"{len(lost)} tasks need it" if lost else "")
            _look(state, executor, board)
    except BaseException:
        executor.stop()
        raise
    return state


def _look(state: State, executor: Executor, board: Board) -> None:
    """Tells the board of what runs."""
    before, state.running = state.running, executor.running()
    for name, at in state.running.items():
        if name not in before or before[name].since != at.since:
            board.started(state.plan.tasks[name])
    board.show(state)


def _next(ready: list[Task], state: State, executor: Executor, claims: Claims) -> Task | None:
    """The task to start now: evaluations first, and of those one whose weights no other one is reading.

    Two evaluations of the same weights at once would both compute the features that the second could have read.
    """
    at_work = collections.Counter(state.plan.tasks[name].needs[-1:] for name in state.started)
    ordered = sorted(ready, key=lambda task: (task.kind == "pretrain", at_work[task.needs[-1:]]))
    for task in ordered:
        if executor.room(task):
            if claims.take(task):
                return task
            state.elsewhere.add(task.id)
    return None
