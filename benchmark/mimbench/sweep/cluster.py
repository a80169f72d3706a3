"""Tasks on a Ray cluster. A task returns the content of its records, so no disk need be shared.

Weights travel as content too: what a pretraining leaves comes back to the machine that runs the sweep, is kept in
its cache, so that the next call finds it, and goes from there through Ray's object store to whichever machine
evaluates it. Nothing is lost with a machine: the sweep holds all that was finished and repeats what was not. Above
``MOST`` bytes weights do not travel; then all machines must share ``MIMBENCH_CACHE``, which is noticed.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from mimbench import checkpoint, paths, record
from mimbench.errors import ConfigError, MimbenchError
from mimbench.sweep import local
from mimbench.sweep import task as process
from mimbench.sweep.plan import Plan, Task
from mimbench.sweep.schedule import USER_ERROR, Ended, Running

MOST = 2 * 2**30  # bytes of one pretraining's weights that go through the object store
EVERY = 2.0  # seconds between two messages of a task's log
CRASH = 1  # exit code of a task whose machine was lost


@dataclass(frozen=True)
class Order:
    """What a machine is to do."""

    words: tuple[str, ...]
    cpus: int
    gpus: float
    place: str  # of a pretraining's weights in the cache; "" for an evaluation
    sign: str  # a file that the sweep wrote into its cache, by which a shared one is known
    most: int = MOST


Files = dict[str, bytes]  # relative path to content


def work(order: Order, weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Runs on some machine of the cluster. Yields ("started", its name), ("log", text) ... and ("ended", what).

    ``weights`` maps places in the cache to references of their files; what is there already is not fetched.
    """
    import ray

    yield "started", {"machine": platform.node(), "pid": os.getpid()}
    with tempfile.TemporaryDirectory(prefix="mimbench-task-") as name:
        folder = Path(name)
        try:
            for place, reference in weights.items():
                there = paths.cache() / place
                if not (there / "history.json").is_file():
                    unpack(ray.get(reference) if reference is not None else None, there)
        except MimbenchError as fault:
            yield "ended", {"code": USER_ERROR, "last": str(fault), "records": [], "weights": None}
            return
        log, results = folder / "log", folder / "results"
        variables = process.variables(order.cpus, None if order.gpus else "")
        child = process.start(order.words, log, variables | {"MIMBENCH_RESULTS": str(results)})
        with open(log, encoding="utf-8", errors="replace") as stream:
            try:
                last = time.monotonic()
                while child.poll() is None:
                    time.sleep(0.1)
                    if time.monotonic() - last > EVERY and (text := stream.read()):
                        last = time.monotonic()
                        yield "log", text
            finally:  # also when the sweep was interrupted
                process.stop([child])
            yield "log", stream.read()
        found: dict[str, Any] = {"code": child.returncode, "last": process.last_line(log), "weights": None}
        found["records"] = [file.read_text(encoding="utf-8") for file in record.files(results)]
        if order.place and not child.returncode and not (paths.cache() / order.sign).is_file():
            try:
                found["weights"] = pack(paths.cache() / order.place, order.most)
            except MimbenchError as fault:
                found |= {"code": USER_ERROR, "last": str(fault)}
        yield "ended", found


def pack(folder: Path, most: int = MOST) -> Files:
    """What a finished pretraining left, features and training state aside. Raises ConfigError above ``most`` bytes."""
    files = []
    if (folder / "history.json").is_file():
        inner = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
        files = [file for file in inner if not _passing(file)]
    size = sum((folder / file).stat().st_size for file in files)
    if size > most:
        raise ConfigError(
            f"the weights in {folder} are {size / 2**30:.1f} GiB, more than the {most / 2**30:.1f} that are sent",
            "Let all machines share a folder and name it in MIMBENCH_CACHE",
        )
    return {file.as_posix(): (folder / file).read_bytes() for file in files}


def _passing(file: Path) -> bool:
    """Whether a file of a pretraining's folder is of no use elsewhere."""
    return file.parts[0] == "features" or any(part.startswith((".", "step-")) for part in file.parts)


def unpack(files: Files | None, folder: Path) -> None:
    """Puts weights where this machine looks for them; the file that says that they are complete comes last."""
    if not files or "history.json" not in files:
        raise ConfigError(
            f"the weights that belong to {folder} are not here and too large to be sent",
            "Let all machines share a folder and name it in MIMBENCH_CACHE",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        if (folder / "history.json").is_file():
            return
        for name in sorted(files, key=lambda name: name == "history.json"):
            checkpoint.save_bytes(folder / name, files[name])


@contextlib.contextmanager
def connected(address: str | None, log: Path) -> Iterator[Any]:
    """Ray, connected to a cluster: at ``address``, at RAY_ADDRESS, one that runs here, or one that is started here.

    What Ray says of lost machines would go to standard output, which is for results; meanwhile it goes to ``log``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as aside, contextlib.redirect_stdout(aside):
        ray, ours = _connect(address)
        try:
            yield ray
        finally:
            if ours:
                ray.shutdown()


def _connect(address: str | None) -> tuple[Any, bool]:
    """Ray, and whether this made the connection."""
    try:
        import ray
    except ImportError:
        raise ConfigError("the executor ray needs Ray", "pip install 'mimbench[ray]'") from None
    if ray.is_initialized():
        return ray, False
    if (address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
        raise ConfigError(
            "the sweep must run on a machine of the cluster, not through Ray's client",
            "Start it there, or with 'ray job submit'",
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address or "RAY_ADDRESS" in os.environ:
            ray.init(address=address, **options)
            return ray, True
        try:
            ray.init(address="auto", **options)
        except ConnectionError:
            ray.init(include_dashboard=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as fault:
        reason = str(fault).strip().partition("\n")[0]
        raise ConfigError(f"there is no Ray cluster at {address or 'RAY_ADDRESS'}: {reason}") from None
    return ray, True


class Cluster:
    """See ``schedule.Executor``. Ray decides which task runs when and where."""

    def __init__(self, ray: Any, plan: Plan, logs: Path) -> None:
        self.ray, self.plan, self.logs = ray, plan, logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.remote = self.ray.remote(work)
        self.tasks: dict[str, tuple[Task, Any]] = {}
        self.since: dict[str, float] = {}  # when a machine took it up
        self.machine: dict[str, str] = {}
        self.stored: dict[str, Any] = {}  # references to weights
        self.users = collections.Counter(need for name in plan.todo for need in plan.tasks[name].needs)
        self.with_gpus = plan.sweep.device == "cuda" or bool(self.ray.cluster_resources().get("GPU"))
        self.sign = f"sweeps/.{secrets.token_hex(8)}.sign"
        checkpoint.save_json(paths.cache() / self.sign, {})

    def warnings(self) -> list[str]:
        """What the user should know before: no GPU, or tasks that no machine of now can take."""
        found = []
        todo = [self.plan.tasks[name] for name in self.plan.todo]
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not self.with_gpus and self.plan.sweep.device == "auto":
            found.append("the cluster has no GPU: all tasks run on CPUs")
        if self.with_gpus and self.plan.sweep.device == "auto" and not local.visible_gpus():
            found.append(
                "the cluster has GPUs, but this machine has none, and by it the file was read: "
                "--device cuda takes the file's cuda tables"
            )
        for asked, kind in {self._asked(task): task.group for task in todo}.items():
            if not any(all(has.get(name, 0) >= amount for name, amount in asked) for has in machines):
                wants = ", ".join(f"{name} {amount:g}" for name, amount in asked if amount)
                found.append(f"no machine now has what {kind} asks for ({wants}): it waits until one joins")
        return found

    def _asked(self, task: Task) -> tuple[tuple[str, float], ...]:
        resources = task.resources
        gpus = resources.gpus if self.with_gpus else 0.0
        return (("CPU", resources.cpus), ("GPU", gpus), ("memory", resources.memory_gib * 2**30))

    def room(self, task: Task) -> bool:
        """Always: what waits tells a cluster that can grow how much it should."""
        return True

    def start(self, task: Task) -> None:
        """Hands a task to Ray."""
        self._log(task, f"$ {task.command}\n")
        asked = dict(self._asked(task))
        order = Order(
            *(task.words, task.resources.cpus, asked["GPU"]),
            place=task.place if task.kind == "pretrain" else "",
            sign=self.sign,
        )
        weights = {self.plan.tasks[need].place: self._reference(need) for need in task.needs}
        options: dict[str, Any] = {"num_cpus": asked["CPU"], "num_gpus": asked["GPU"]}
        if asked["memory"]:
            options["memory"] = int(asked["memory"])
        remote = self.remote.options(num_returns="streaming", max_retries=0, name=task.label, **options)
        self.tasks[task.id] = (task, remote.remote(order, weights))

    def _reference(self, need: str) -> Any:
        """Where Ray has the weights of a pretraining; None where they are too large to be sent."""
        if need not in self.stored:
            try:
                self.stored[need] = self.ray.put(pack(paths.cache() / self.plan.tasks[need].place))
            except ConfigError:
                self.stored[need] = None
        return self.stored[need]

    def wait(self, seconds: float) -> list[Ended]:
        """See ``schedule.Executor``."""
        deadline = time.monotonic() + seconds
        while True:
            names = {stream: name for name, (_, stream) in self.tasks.items()}
            left = max(0.0, deadline - time.monotonic())
            if not names:
                time.sleep(left)
                return []
            ready, _ = self.ray.wait(list(names), timeout=left, fetch_local=False)
            over = [ended for stream in ready if (ended := self._hear(names[stream])) is not None]
            if over or time.monotonic() >= deadline:
                return over

    def _hear(self, name: str) -> Ended | None:
        """Takes in the next message of a task."""
        task, stream = self.tasks[name]
        try:
            kind, what = self.ray.get(next(stream))
        except (self.ray.exceptions.RayError, StopIteration) as fault:
            reason = str(fault).strip().partition("\n")[0].partition(". ")[0]
            return self._over(task, CRASH, f"was lost: {reason or type(fault).__name__}")
        if kind == "log":
            self._log(task, what)
        elif kind == "started":
            self.since[name] = time.monotonic()
            self.machine[name] = what["machine"]
            self._log(task, f"on {what['machine']}, process {what['pid']}\n")
        else:
            return self._take(task, what)
        return None

    def _take(self, task: Task, what: dict[str, Any]) -> Ended:
        """Keeps what a task has returned."""
        if what["code"]:
            return self._over(task, what["code"], local.said(what["code"], what["last"]))
        try:
            for text in what["records"]:
                made = record.loads(text, f"what {self.machine[task.id]} returned")
                if reason := record.stale(made):
                    why = f"{self.machine[task.id]} has other code than the sweep: {reason}"
                    return self._over(task, USER_ERROR, why)
                record.receive(made, paths.results())
            if what["weights"] is not None:
                unpack(what["weights"], paths.cache() / task.place)
                self.stored[task.id] = self.ray.put(what["weights"]) if self.users[task.id] else None
        except MimbenchError as fault:
            return self._over(task, USER_ERROR, str(fault))
        missing = local.left_nothing(task)
        return self._over(task, USER_ERROR if missing else 0, missing)

    def _over(self, task: Task, code: int, why: str) -> Ended:
        del self.tasks[task.id]
        self.machine.pop(task.id, None)
        seconds = time.monotonic() - self.since.pop(task.id, time.monotonic())
        if code in (0, USER_ERROR):
            for need in task.needs:
                self.users[need] -= 1
                if not self.users[need]:
                    self.stored.pop(need, None)  # which lets Ray forget them
        return Ended(task.id, code, seconds, why)

    def _log(self, task: Task, text: str) -> None:
        with open(self.logs / task.log, "a", encoding="utf-8") as stream:
            stream.write(text)

    def running(self) -> dict[str, Running]:
        """See ``schedule.Executor``."""
        said = {name: process.last_line(self.logs / self.tasks[name][0].log) for name in self.since}
        return {
            name: Running(since, f"{self.machine[name]}: {said[name]}") for name, since in self.since.items()
        }

    def stop(self) -> None:
        """See ``schedule.Executor``. The machines stop what they are at; the cluster stays."""
        for _, stream in self.tasks.values():
            with contextlib.suppress(Exception):  # the cluster may be gone, which is as good
                self.ray.cancel(stream)

    def close(self) -> None:
        """Removes what it left in the cache."""
        (paths.cache() / self.sign).unlink(missing_ok=True)
