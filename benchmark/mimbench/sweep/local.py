"""Tasks as processes of this machine, as many at a time as its cores, GPUs and memory allow."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from mimbench import runner
from mimbench.environment import environment
from mimbench.errors import ConfigError
from mimbench.sweep import task as process
from mimbench.sweep.file import Resources, Sweep
from mimbench.sweep.plan import Plan, Task, written
from mimbench.sweep.schedule import USER_ERROR, Ended, Running


class Local:
    """See ``schedule.Executor``. Tasks write into the results folder and the cache of this machine themselves."""

    def __init__(
        self,
        plan: Plan,
        logs: Path,
        *,
        workers: int | None = None,
        gpus: list[str] | None = None,
    ) -> None:
        """At most ``workers`` tasks at a time, by default as many as have cores; ``gpus`` as CUDA names them.

        Raises ConfigError where a task asks for what this machine does not have.
        """
        facts = environment()
        self.cores = int(facts["cores"] or 1)
        self.memory = float(facts["memory_gib"] or 0.0)
        self.workers = workers
        self.gpus = dict.fromkeys(visible_gpus() if gpus is None else gpus, 1.0)  # share that is free
        self.logs = logs
        self.processes: dict[str, tuple[Task, subprocess.Popen[bytes], float, str | None]] = {}
        if plan.todo and plan.sweep.device == "cuda" and not self.gpus:
            runner.choose_device("cuda")
        for name in plan.todo:
            self._check(plan.sweep, plan.tasks[name])

    def _check(self, sweep: Sweep, task: Task) -> None:
        asked = task.resources.memory_gib
        if asked > self.memory > 0:
            raise ConfigError(
                f"{task.label} asks for {asked:g} GiB of memory, but this machine has {self.memory:g}",
                "Lower memory_gib in its resources",
            )

    def room(self, task: Task) -> bool:
        """Whether cores, memory and a GPU are free for it. Cores do not count where workers were given."""
        running = [other.resources for other, *_ in self.processes.values()]
        if self.workers is not None and len(running) >= self.workers:
            return False
        if self.workers is None and sum(map(self._cpus, running)) + self._cpus(task.resources) > self.cores:
            return False
        if self.memory and sum(r.memory_gib for r in running) + task.resources.memory_gib > self.memory:
            return False
        return not self.gpus or not task.resources.gpus or self._gpu(task.resources) is not None

    def _cpus(self, resources: Resources) -> int:
        """Cores that a task gets: all there are where it asks for more."""
        return min(resources.cpus, self.cores)

    def _gpu(self, resources: Resources) -> str | None:
        """The GPU that has most room for a task, or None."""
        name = max(self.gpus, key=lambda gpu: self.gpus[gpu], default=None)
        return name if name is not None and self.gpus[name] >= resources.gpus - 1e-9 else None

    def start(self, task: Task) -> None:
        """Starts its process, which sees one GPU or none."""
        gpu = self._gpu(task.resources) if task.resources.gpus else None
        if gpu is not None:
            self.gpus[gpu] -= task.resources.gpus
        shown = None if not self.gpus and task.resources.gpus else gpu or ""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / task.log
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"$ {task.command}\n")
        child = process.start(task.words, log, process.variables(self._cpus(task.resources), shown))
        self.processes[task.id] = (task, child, time.monotonic(), gpu)

    def wait(self, seconds: float) -> list[Ended]:
        """See ``schedule.Executor``."""
        deadline = time.monotonic() + seconds
        while True:
            over = [entry for entry in self.processes.values() if entry[1].poll() is not None]
            if over or time.monotonic() >= deadline:
                return [self._ended(*entry) for entry in over]
            time.sleep(0.02)

    def _ended(self, task: Task, child: subprocess.Popen[bytes], since: float, gpu: str | None) -> Ended:
        del self.processes[task.id]
        if gpu is not None:
            self.gpus[gpu] += task.resources.gpus
        seconds = time.monotonic() - since
        code = child.returncode
        if code:
            return Ended(task.id, code, seconds, said(code, process.last_line(self.logs / task.log)))
        if missing := left_nothing(task):
            return Ended(task.id, USER_ERROR, seconds, missing)
        return Ended(task.id, 0, seconds)

    def running(self) -> dict[str, Running]:
        """See ``schedule.Executor``."""
        return {
            name: Running(since, process.last_line(self.logs / task.log))
            for name, (task, _, since, _) in self.processes.items()
        }

    def stop(self) -> None:
        """See ``schedule.Executor``."""
        process.stop([child for _, child, *_ in self.processes.values()])
        self.processes.clear()


def said(code: int, last: str) -> str:
    """Why a task failed: what it said of a wrong setting, or how it ended."""
    last = last.removeprefix("error: ")
    if code == USER_ERROR:
        return last
    return f"{process.why(code)}{f': {last}' if code > 0 and last else ''}"


def left_nothing(task: Task) -> str:
    """What is wrong where a task ended well and yet what it should leave is not there, or ""."""
    what = "weights" if task.kind == "pretrain" else "record"
    missing = f"no {what} under the name that was planned: has code changed since? Start again"
    return "" if written(task) else missing


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(n) for n in range(count)]
