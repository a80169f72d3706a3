"""From a sweep's file to tasks: pretrainings, each once, and the evaluations that need them."""

from __future__ import annotations

import collections
import dataclasses
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mimbench import data, paths, registry, runner
from mimbench.data import Dataset
from mimbench.errors import ConfigError, MimbenchError
from mimbench.progress import Progress
from mimbench.sweep.file import Case, LeftOut, Resources, Sweep, cases


@dataclass(frozen=True)
class Task:
    """One process to be: a pretraining, or an evaluation that leaves a record."""

    id: str  # the key of the pretraining, or the id of the record
    kind: Literal["pretrain", "evaluate"]
    method: str
    seed: int
    label: str  # for people
    words: tuple[str, ...]  # after "mimbench"
    needs: tuple[str, ...]  # pretrainings, those that are done among them; the last is the one evaluated
    resources: Resources
    group: str  # tasks that take about as long: "pretrain", or a protocol
    place: str  # of the weights' folder in the cache, or of the record in the results, with / in between
    lock: str  # file in the cache that the process holds which is at it

    @property
    def command(self) -> str:
        """What does this task alone."""
        return shlex.join(["mimbench", *(word for word in self.words if word != "--no-database")])

    @property
    def log(self) -> str:
        """The name of its log."""
        name = "".join(c if c.isalnum() else "-" for c in f"{self.method} seed {self.seed} {self.group}")
        return f"{name}-{self.id}.log"


@dataclass
class Plan:
    """All tasks of a sweep, and which of them are left to do."""

    sweep: Sweep
    tasks: dict[str, Task]  # by id, in an order in which they can be done
    todo: list[str]
    left_out: list[LeftOut]
    before: dict[str, int] = field(
        default_factory=dict
    )  # when the records were written that are to be replaced

    def count(self, kind: str, todo: bool) -> int:
        """How many tasks of a kind there are, left to do or in all."""
        of = self.todo if todo else self.tasks
        return sum(self.tasks[name].kind == kind for name in of)


class _Data:
    """Data sets, each loaded once."""

    def __init__(self) -> None:
        self.loaded: dict[str, Dataset] = {}

    def __call__(self, place: str, progress: Progress) -> Dataset:
        if place not in self.loaded:
            self.loaded[place] = data.load(place, progress)
        return self.loaded[place]


def plan(
    sweep: Sweep,
    progress: Progress,
    *,
    force: bool = False,
    budget: str | None = None,
) -> Plan:
    """Checks every name, setting and data set of a sweep and finds what is left to do.

    A pretraining is left to do where an evaluation that is not recorded needs it, or where only pretraining was
    asked for. ``force`` repeats evaluations that are recorded; ``budget`` replaces that of every run. Raises what
    a request would, with the place in the file.
    """
    load = _Data()
    found: dict[str, Task] = {}
    wanted: set[str] = set()
    done: set[str] = set()
    left_out: dict[LeftOut, None] = {}
    for number, runs in enumerate(sweep.runs, 1):
        if budget is not None:
            exceptions = {
                name: {key: value for key, value in table.items() if key != "budget"}
                for name, table in runs.per_method.items()
            }
            runs = dataclasses.replace(runs, budget=budget, per_method=exceptions)
        listed, without = cases(runs)
        left_out |= dict.fromkeys(without)
        for case in progress.track(listed, f"planning runs {number}"):
            try:
                units = _units(case, sweep, force, progress, load)
                for wanted_first in units[0].lineage:
                    runner.check_needs(wanted_first.slug, _needs(wanted_first), units[0].dataset)
            except MimbenchError as fault:
                where = f"runs {number}, {case.method}{_by(case.protocol)}"
                raise ConfigError(f"{where}: {fault.problem}", fault.remedy) from None
            for unit in units:
                own = [_pretraining(each, unit, sweep) for each in unit.lineage]
                for task, each in zip(own, unit.lineage, strict=True):
                    found.setdefault(task.id, task)
                    if each.done:
                        done.add(task.id)
                needs = tuple(task.id for task in own)
                if not unit.jobs:
                    wanted.update(needs)
                for job in unit.jobs:
                    task = _evaluation(job, needs, sweep, force)
                    found.setdefault(task.id, task)
                    if job.recorded() is not None and not force:
                        done.add(task.id)
                    else:
                        wanted.update((*needs, task.id))
    # One seed of everything first: what is complete early says most.
    order = sorted(found.values(), key=lambda task: task.seed)
    todo = [task.id for task in order if task.id in wanted and task.id not in done]
    made = Plan(sweep, {task.id: task for task in order}, todo, list(left_out))
    made.before = {name: written(made.tasks[name]) for name in todo}
    return made


def written(task: Task) -> int:
    """When what a task leaves was written, in nanoseconds; 0 where it is not there."""
    folder = paths.cache() / task.place if task.kind == "pretrain" else paths.results()
    try:
        return (folder / ("history.json" if task.kind == "pretrain" else task.place)).stat().st_mtime_ns
    except OSError:
        return 0


def _by(protocol: str) -> str:
    return f" by {protocol}" if protocol else ""


def _units(
    case: Case, sweep: Sweep, force: bool, progress: Progress, load: Callable[[str, Progress], Dataset]
) -> list[runner.Unit]:
    request = runner.Request(
        methods=(case.method,),
        protocols=(case.protocol,) if case.protocol else (),
        dataset=case.dataset,
        eval_dataset=case.eval_dataset,
        preset=case.preset,
        seeds=case.seeds,
        overrides=case.overrides,
        device=sweep.device,
        force=force,
    )
    found = runner.units(request, progress, load)
    how_long = ("recipe.epochs=", "recipe.warmup_epochs=")
    plain = tuple(
        item for item in case.overrides if not item.startswith("recipe.") or item.startswith(how_long)
    )
    if plain != case.overrides and not found[0].settings.recipe.epochs:
        # What is not trained is the same however it would be.
        return runner.units(dataclasses.replace(request, overrides=plain), progress, load)
    return found


def _needs(wanted: runner.Wanted) -> tuple[str, ...]:
    """What a method learns from besides images; it is built only where its settings decide."""
    model = registry.load_method(wanted.slug).Model
    needs: tuple[str, ...] = model.needs if hasattr(model, "needs") else model(wanted.settings).needs
    return needs


def _pretraining(wanted: runner.Wanted, unit: runner.Unit, sweep: Sweep) -> Task:
    request = unit.plan.request
    words = ["pretrain", "--method", wanted.method, "--dataset", request.dataset, "--preset", wanted.preset]
    words += ["--seed", str(unit.seed)]
    for item in wanted.overrides:
        words += ["--set", item]
    earlier = [each.key for each in unit.lineage]
    place = wanted.folder.relative_to(paths.cache()).as_posix()
    return Task(
        *(wanted.key, "pretrain", wanted.method, unit.seed),
        label=f"{wanted.method}, seed {unit.seed}: pretraining on {request.dataset}",
        words=(*words, *_device(sweep)),
        needs=tuple(earlier[: earlier.index(wanted.key)]),
        resources=sweep.resources_of("pretrain"),
        group="pretrain",
        place=place,
        lock=f"{place}/.lock",
    )


def _evaluation(job: runner.Job, needs: tuple[str, ...], sweep: Sweep, force: bool) -> Task:
    words = shlex.split(job.command)[2:]
    return Task(
        *(job.id, "evaluate", job.method.text, job.seed),
        label=f"{job.method.text}, seed {job.seed}: {job.protocol.name} on {job.target.name}",
        words=("evaluate", *words, *_device(sweep), "--no-database", *(["--force"] if force else [])),
        needs=needs,
        resources=sweep.resources_of("evaluate", job.protocol.name),
        group=job.protocol.name,
        place=job.file.relative_to(paths.results()).as_posix(),
        lock=job.lock.relative_to(paths.cache()).as_posix(),
    )


def _device(sweep: Sweep) -> list[str]:
    return [] if sweep.device == "auto" else ["--device", sweep.device]


def content(made: Plan) -> dict[str, Any]:
    """A plan as plain tables and lists."""
    todo = set(made.todo)
    return {
        "name": made.sweep.name,
        "tasks": [
            {
                **dataclasses.asdict(task),
                "command": task.command,
                "todo": task.id in todo,
            }
            for task in made.tasks.values()
        ],
        "left_out": [dataclasses.asdict(each) for each in made.left_out],
    }


def overview(made: Plan) -> list[list[Any]]:
    """A row for each method: pretrainings left and in all, then evaluations left and in all by protocol."""
    todo = set(made.todo)
    counts: dict[str, collections.Counter[tuple[str, bool]]] = {}
    for task in made.tasks.values():
        counts.setdefault(task.method, collections.Counter())[task.group, task.id in todo] += 1

    def cell(of: Mapping[tuple[str, bool], int], group: str) -> str:
        left, ready = of.get((group, True), 0), of.get((group, False), 0)
        return "" if not left + ready else f"{left} of {left + ready}"

    return [[method, *(cell(of, group) for group in groups(made))] for method, of in counts.items()]


def groups(made: Plan) -> list[str]:
    """Pretraining and the protocols that a plan has, in their order."""
    present = {task.group for task in made.tasks.values()}
    return [name for name in ("pretrain", *registry.protocols()) if name in present]
