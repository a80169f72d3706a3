"""Sweeps: what a file asks for, in which order it is done, and that nothing is lost when something is."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
from rich.console import Console

from mimbench import checkpoint, config, database, paths, progress, record, registry, runner
from mimbench.errors import ConfigError, MimbenchError, UnknownName
from mimbench.sweep import board, cluster, file, local, plan, schedule
from mimbench.sweep.plan import Plan, Task
from mimbench.sweep.schedule import Ended, Running

# mae and random_init as small as they go.
TINY = """
[runs.per_method.mae]
set.image_size = 16
set.backbone = { width = 16, depth = 1, heads = 1 }
set.decoder = { width = 16, depth = 1, heads = 1 }
set.recipe.epochs = EPOCHS
set.recipe.checkpoint_minutes = 0
[runs.per_method.random_init]
set.image_size = 16
set.vit = { width = 16, depth = 1, heads = 1 }
"""
QUICK = """
backoff = 0.1
[[runs]]
methods = ["mae", "random_init"]
protocols = ["knn", "linear"]
preset = "smoke"
set.linear = { c_steps = 5, c_powers = [-4.0, 2.0] }
"""
TINY_MAE = TINY.partition("[runs.per_method.random_init]")[0]
OF_MAE = QUICK.replace(', "random_init"]', "]") + TINY_MAE


def written(tmp_path: Path, text: str, epochs: int = 1) -> Path:
    place = tmp_path / "tiny.toml"
    place.write_text(text.replace("EPOCHS", str(epochs)), encoding="utf-8")
    return place


def planned(tmp_path: Path, text: str, **options: Any) -> Plan:
    return plan.plan(file.read(written(tmp_path, text)), progress.quiet(), **options)


# The file


@pytest.mark.parametrize(
    ("text", "fault", "message"),
    [
        ("retrys = 2\n[[runs]]", UnknownName, "unknown key in tiny.toml 'retrys'. Did you mean retries?"),
        ("[[runs]]\nmethod = 'mae'", UnknownName, "unknown key of runs 1 'method'. Did you mean methods"),
        ("[[runs]]\n[[runs]]\nprotocl = 'knn'", UnknownName, "unknown key of runs 2 'protocl'.*protocols"),
        ("[defaults]\nsed = 3\n[[runs]]", UnknownName, "unknown key of defaults 'sed'. Did you mean seeds"),
        ("[resources.evalute]\ncpus = 1\n[[runs]]", UnknownName, "Did you mean evaluate"),
        ("[resources.knn]\ngpu = 1\n[[runs]]", UnknownName, "unknown setting of resources.knn 'gpu'.*gpus"),
        ("[resources.pretrain]\ngpus = 2\n[[runs]]", ConfigError, "a task uses one GPU. Pretrain on several"),
        ("[resources.pretrain]\ncpus = 0\n[[runs]]", ConfigError, "resources.cpus = 0 should be above 0"),
        ("[[runs]]\nexclude.mae = ''", ConfigError, "leaves out mae without a reason"),
        ("[[runs]]\nexclude.maee = 'slow'", UnknownName, "method or protocol in runs 1.exclude 'maee'.*mae"),
        ("[[runs]]\nper_method.mae.seeds = 2", UnknownName, "unknown key of runs 1.per_method.mae 'seeds'"),
        ("[[runs]]\nper_method.maee.budget = '1m'", UnknownName, "unknown method 'maee'. Did you mean mae"),
        ("[[runs]]\ngrid.mask_ratio = 0.5", ConfigError, "grid.mask_ratio = 0.5 should be a list"),
        ("[[runs]]\nseeds = 0", ConfigError, "how many, or a list of seeds"),
        ("[[runs]]\nseeds = []", ConfigError, "how many, or a list of seeds"),
        ("[[runs]]\nseeds = '3'", ConfigError, "runs 1.seeds = '3' does not fit"),
        ("[[runs]]\neval_dataset.segmentaton = 'camvid'", UnknownName, "segmentation"),
        ("name = '../up'\n[[runs]]", ConfigError, "It names a folder"),
        ("[[runs]]\ncpu.seed = 3", UnknownName, "unknown key of runs 1.cpu 'seed'. Did you mean seeds"),
        ("[[runs]]\ncuda = 3", ConfigError, "runs 1.cuda = 3 should be a table"),
        ("device = 'tpu'\n[[runs]]", ConfigError, "not one of auto, cpu and cuda"),
        ("retries = -1\n[[runs]]", ConfigError, "sweep.retries = -1 should be 0 or more"),
        ("name = 'nothing'", ConfigError, r"has no \[\[runs\]\]"),
        ("runs = 3", ConfigError, r"has no \[\[runs\]\]"),
        ("runs = [3]", ConfigError, "runs 1 = 3 should be a table"),
        ("[[runs]", ConfigError, "is no TOML"),
        ("[[runs]]\nset.x = " + "[" * 3000, ConfigError, "nested too deep"),
        ("[[runs]]\nset.x = " + "[" * 200 + "]" * 200, ConfigError, "nested too deep"),
        ("[[runs]]\nset.x = " + "1" * 5000, ConfigError, "is no TOML"),
        ("[[runs]]\nseeds = 1000000000", ConfigError, "asks for 1,000,000,000 combinations"),
        ("[[runs]]\nseeds = 2\ngrid = { x = [1], y = [" + "1," * 501 + "] }", ConfigError, "1,002 comb"),
        (f"name = '{'x' * 300}'\n[[runs]]", ConfigError, "at most 80 letters"),
    ],
)
def test_a_file_is_read_strictly(text: str, fault: type[MimbenchError], message: str, tmp_path: Path) -> None:
    with pytest.raises(fault, match=message):
        file.read(written(tmp_path, text))


def test_one_file_for_a_gpu_and_for_processors(tmp_path: Path) -> None:
    place = written(
        tmp_path,
        """
        [defaults]
        methods = ["mae"]
        set.mask_ratio = 0.5
        [defaults.cuda]
        preset = "cifar"
        [defaults.cpu]
        preset = "laptop"
        budget = "100img"
        set.recipe.precision = "bf16"
        [[runs]]
        seeds = 3
        budget = "900img"
        cpu.seeds = 1
        per_method.mae.cuda.budget = "7m"
        [[runs]]
        preset = "smoke"
        cpu.preset = "paper"
        """,
    )
    small = file.read(place, "cpu").runs
    assert [(runs.preset, runs.budget, runs.seeds) for runs in small] == [
        ("laptop", "900img", 1),
        ("paper", "100img", 1),
    ]
    assert small[0].set == {"mask_ratio": 0.5, "recipe": {"precision": "bf16"}}
    assert small[0].per_method == {"mae": {}}
    large = file.read(place, "cuda").runs
    assert [(runs.preset, runs.budget, runs.seeds) for runs in large] == [
        ("cifar", "900img", 3),
        ("smoke", None, 1),
    ]
    assert large[0].set == {"mask_ratio": 0.5}
    assert large[0].per_method == {"mae": {"budget": "7m"}}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        file.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "value", [1, 0.5, 1e-4, True, "8m", "run:mae backbone.width=384", "true", "3", 'a "b"', [1, 2.5], ["a"], "x=1"]
)  # fmt: skip
def test_a_setting_is_written_as_the_command_line_reads_it(value: Any) -> None:
    found = config.parse_overrides([file.as_item("recipe.x", value)])
    assert found == {"recipe": {"x": value}}
    assert type(found["recipe"]["x"]) is type(value)


def test_all_means_all_that_fit_and_nothing_is_left_out_silently(tmp_path: Path) -> None:
    made = file.read(written(tmp_path, "[[runs]]\nexclude = { timm = 'no net', generation = 'no encoder' }"))
    found, left_out = file.cases(made.runs[0])
    cards = registry.methods()
    assert {(case.method, case.protocol) for case in found} == {
        (slug, name)
        for slug, card in cards.items()
        for name in card.protocols
        if slug != "timm" and name != "generation"
    }
    assert {each.what: each.reason for each in left_out} == {"timm": "no net", "generation": "no encoder"}

    made = file.read(written(tmp_path, "[[runs]]\nprotocols = ['generation']"))
    found, left_out = file.cases(made.runs[0])
    able = {slug for slug, card in cards.items() if "generation" in card.protocols}
    assert {case.method for case in found} == able
    assert {each.what for each in left_out} == {f"{slug}/generation" for slug in cards if slug not in able}

    made = file.read(written(tmp_path, "[[runs]]\nmethods = ['mae']\nprotocols = ['generation']"))
    with pytest.raises(ConfigError, match="runs 1, mae by generation: mae does not support"):
        plan.plan(made, progress.quiet())


def test_defaults_exceptions_grids_and_data_of_a_protocol(tmp_path: Path) -> None:
    made = file.read(
        written(
            tmp_path,
            """
            device = "cpu"
            [resources]
            evaluate = { cpus = 2 }
            segmentation = { cpus = 3, gpus = 0.5 }
            [defaults]
            methods = ["mae", "simmim"]
            protocols = ["knn:dino", "segmentation"]
            seeds = 2
            set = { recipe = { base_lr = 0.1, batch_size = 8 }, knn.k = 3 }
            eval_dataset.segmentation = "camvid"
            exclude = { "simmim/knn" = "an example" }
            [[runs]]
            grid = { mask_ratio = [0.5, 0.75], "recipe.epochs" = [1, 2] }
            set.recipe.base_lr = 0.2
            [[runs]]
            seeds = [7]
            protocols = []
            per_method.mae = { budget = "1m", dataset = "digit-scenes", set.recipe.batch_size = 4 }
            budget = "2m"
            """,
        )
    )
    first, _ = file.cases(made.runs[0])
    kinds = {(case.method, case.protocol, case.eval_dataset, case.seeds) for case in first}
    assert kinds == {
        ("mae", "knn:dino", None, (0, 1)),
        ("mae", "segmentation", "camvid", (0, 1)),
        ("simmim", "segmentation", "camvid", (0, 1)),
    }
    assert len(first) == 3 * 4
    plain = ("recipe.base_lr=0.2", "recipe.batch_size=8")
    points = {case.overrides for case in first if case.protocol == "segmentation"}
    assert points == {
        (*plain, f"mask_ratio={ratio}", f"recipe.epochs={epochs}")
        for ratio in (0.5, 0.75)
        for epochs in (1, 2)
    }
    assert all("knn.k=3" in case.overrides for case in first if case.protocol == "knn:dino")
    second, _ = file.cases(made.runs[1])
    assert [(case.method, case.protocol, case.dataset, case.seeds) for case in second] == [
        ("mae", "", "digit-scenes", (7,)),
        ("simmim", "", "digits", (7,)),
    ]
    assert second[0].overrides == ("recipe.base_lr=0.1", "recipe.batch_size=4", "recipe.budget=1m")
    assert second[1].overrides == ("recipe.base_lr=0.1", "recipe.batch_size=8", "recipe.budget=2m")
    assert made.resources_of("evaluate", "segmentation") == file.Resources(cpus=3, gpus=0)
    assert made.resources_of("evaluate", "knn") == file.Resources(cpus=2, gpus=0)
    assert made.resources_of("pretrain") == file.Resources(cpus=1, gpus=0)


# The plan


def test_what_several_need_is_pretrained_once_and_teachers_come_first(tmp_path: Path) -> None:
    text = "[[runs]]\nmethods = ['dmae', 'beitv2', 'mae']\nprotocols = ['knn', 'linear']\npreset = 'smoke'\nseeds = 2"
    made = planned(tmp_path, text)
    pretrainings = [task for task in made.tasks.values() if task.kind == "pretrain"]
    # mae serves itself and beitv2; dmae learns from a wider one, which nobody evaluates.
    assert sorted((task.method, task.seed) for task in pretrainings) == [
        *(("beitv2", seed) for seed in (0, 1)),
        *(("dmae", seed) for seed in (0, 1)),
        *(("mae", seed) for seed in (0, 0, 1, 1)),
    ]
    assert (made.count("pretrain", True), made.count("evaluate", True)) == (8, 12)
    order = {name: position for position, name in enumerate(made.todo)}
    for task in made.tasks.values():
        assert all(order[need] < order[task.id] for need in task.needs)
        assert all(made.tasks[need].seed == task.seed for need in task.needs)
    student = next(task for task in pretrainings if task.method == "dmae" and task.seed == 1)
    (teacher,) = student.needs
    assert "backbone.width=128" in made.tasks[teacher].words
    assert made.tasks[teacher].words[made.tasks[teacher].words.index("--preset") + 1] == "smoke"
    evaluation = next(
        t for t in made.tasks.values() if t.method == "dmae" and t.seed == 1 and t.group == "knn"
    )
    assert evaluation.needs == (teacher, student.id)
    seeds = [made.tasks[name].seed for name in made.todo]
    assert seeds == sorted(seeds)
    for task in made.tasks.values():
        assert shlex.split(task.command)[:2] == ["mimbench", task.kind]


def test_one_budget_is_one_run_of_what_is_not_trained(tmp_path: Path) -> None:
    text = """
    [defaults]
    methods = ["mae", "random_init"]
    protocols = ["knn"]
    preset = "smoke"
    [[runs]]
    budget = "640img"
    [[runs]]
    budget = "3s"
    """
    made = planned(tmp_path, text)
    evaluated = [(t.method, "budget" in t.command) for t in made.tasks.values() if t.kind == "evaluate"]
    assert sorted(evaluated) == [("mae", True), ("mae", True), ("random_init", False)]
    made = planned(tmp_path, text, budget="5s")
    assert len(made.tasks) == 4
    assert {"recipe.budget=5s" in t.command for t in made.tasks.values() if t.method == "mae"} == {True}


def test_what_the_data_lack_is_said_before_anything_runs(tmp_path: Path) -> None:
    text = "[[runs]]\nmethods = ['mae', 'cropmae']\nprotocols = ['knn']\nset.pairs = 'frames'"
    with pytest.raises(ConfigError, match="runs 1, mae by knn: unknown setting 'pairs'"):
        planned(tmp_path, text)
    text = (
        "[[runs]]\nmethods = ['mae', 'cropmae']\nprotocols = ['knn']\nper_method.cropmae.set.pairs = 'frames'"
    )
    with pytest.raises(ConfigError, match="runs 1, cropmae by knn: cropmae with these settings needs frames"):
        planned(tmp_path, text)
    with pytest.raises(ConfigError, match="runs 1, mae by segmentation: segmentation needs masks"):
        planned(
            tmp_path, "[[runs]]\nmethods='mae'\nprotocols='segmentation'\neval_dataset.segmentation='digits'"
        )


def test_what_is_recorded_is_not_planned_again_nor_what_it_alone_needed(tmp_path: Path) -> None:
    text = QUICK + TINY
    made = planned(tmp_path, text)
    assert len(made.todo) == 6
    task = next(task for task in made.tasks.values() if task.method == "random_init" and task.group == "knn")
    words = list(task.words)
    request = runner.Request(
        ("random_init",), ("knn",), preset="smoke",
        overrides=tuple(words[n + 1] for n, word in enumerate(words) if word == "--set"),
    )  # fmt: skip
    (outcome,) = runner.run(request, progress.quiet())
    assert outcome.record.id == task.id
    assert outcome.record.pretrain.key == task.needs[-1]
    assert outcome.file == paths.results() / task.place
    left = planned(tmp_path, text)
    assert left.tasks == made.tasks
    assert set(made.todo) - set(left.todo) == {task.id, *task.needs}
    assert set(planned(tmp_path, text, force=True).todo) == set(made.todo) - set(task.needs)


# The order


class Machines:
    """An executor without processes: each task ends when it is looked at, with the next code of its script."""

    def __init__(self, scripts: dict[str, list[int]] | None = None, slots: int = 2) -> None:
        self.scripts = scripts or {}
        self.slots = slots
        self.active: dict[str, float] = {}
        self.begun: list[str] = []
        self.most = 0
        self.stopped = False

    def room(self, task: Task) -> bool:
        return len(self.active) < self.slots

    def start(self, task: Task) -> None:
        self.begun.append(task.id)
        self.active[task.id] = time.monotonic()
        self.most = max(self.most, len(self.active))

    def wait(self, seconds: float) -> list[Ended]:
        if not self.active:
            time.sleep(0.01)
            return []
        name = next(iter(self.active))
        del self.active[name]
        codes = self.scripts.get(name, [])
        code = codes.pop(0) if codes else 0
        if code == 130:
            raise KeyboardInterrupt
        return [Ended(name, code, 1.0, "why" if code else "")]

    def running(self) -> dict[str, Running]:
        return {name: Running(since, "") for name, since in self.active.items()}

    def stop(self) -> None:
        self.stopped = True


class Silent:
    """A board that keeps what it is told."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, str]] = []

    def started(self, task: Task) -> None: ...

    def ended(self, task: Task, ended: Ended, state: str, note: str) -> None:
        self.ends.append((task.id, state))

    def show(self, state: schedule.State) -> None: ...


def task(name: str, *needs: str, kind: Any = "evaluate", seed: int = 0) -> Task:
    return Task(
        *(name, kind, "mae", seed, name, (kind,), needs, file.Resources()),
        group="pretrain" if kind == "pretrain" else "knn",
        place=name,
        lock=f"{name}.lock",
    )


def a_plan(*tasks: Task, done: tuple[str, ...] = (), retries: int = 2) -> Plan:
    sweep = file.Sweep("test", (), {}, retries=retries, backoff=0.01)
    return Plan(sweep, {t.id: t for t in tasks}, [t.id for t in tasks if t.id not in done], [])


TEACHER, STUDENT = task("teacher", kind="pretrain"), task("student", "teacher", kind="pretrain")
FAMILY = (TEACHER, STUDENT, task("first", "teacher", "student"), task("second", "teacher", "student"))
OTHERS = (task("other", kind="pretrain"), task("third", "other"))


def test_needs_come_first_and_what_is_done_counts(tmp_path: Path) -> None:
    machines = Machines(slots=3)
    state = schedule.run(a_plan(*FAMILY, *OTHERS), machines, Silent())
    place = {name: n for n, name in enumerate(machines.begun)}
    assert set(state.done) == set(place) == {t.id for t in (*FAMILY, *OTHERS)}
    for each in (*FAMILY, *OTHERS):
        assert all(place[need] < place[each.id] for need in each.needs)
    assert machines.most == 3
    machines = Machines()
    schedule.run(a_plan(*FAMILY, done=("teacher", "student")), machines, Silent())
    assert machines.begun == ["first", "second"]


def test_evaluations_of_other_weights_are_preferred_to_those_that_are_read_already() -> None:
    tasks = [task(f"{key}{n}", key) for key in "ab" for n in range(3)]
    machines = Machines(slots=2)
    weights = [task(key, kind="pretrain") for key in "ab"]
    schedule.run(a_plan(*weights, *tasks, done=("a", "b")), machines, Silent())
    assert machines.begun[:2] == ["a0", "b0"]


def test_a_crash_is_repeated_and_a_wrong_setting_is_not() -> None:
    machines, seen = Machines({"teacher": [-9, 1], "third": [2]}), Silent()
    state = schedule.run(a_plan(*FAMILY, *OTHERS), machines, seen)
    assert machines.begun.count("teacher") == 3
    assert machines.begun.count("third") == 1
    assert state.repeated == 2
    assert set(state.failed) == {"third"}
    assert not state.blocked
    assert [end for name, end in seen.ends if name == "teacher"] == ["again", "again", "done"]


def test_what_fails_holds_up_only_what_needs_it() -> None:
    machines = Machines({"teacher": [-9, -9, -9]})
    state = schedule.run(a_plan(*FAMILY, *OTHERS), machines, Silent())
    assert set(state.failed) == {"teacher"}
    assert state.blocked == {"student": "teacher", "first": "teacher", "second": "teacher"}
    assert set(state.done) == {"other", "third"}
    lines = "\n".join(board.summary(state, 3.0, Path("logs")))
    assert "1 failed, 3 that need them were not tried" in lines
    assert "teacher (holds up 3): why" in lines
    assert "  mimbench pretrain" in lines
    assert board.content(state, 3.0)["failed"][0]["command"] == "mimbench pretrain"


def test_ctrl_c_stops_what_runs() -> None:
    machines = Machines({"teacher": [130]})
    with pytest.raises(KeyboardInterrupt):
        schedule.run(a_plan(*FAMILY), machines, Silent())
    assert machines.stopped
    assert machines.begun == ["teacher"]


def test_what_another_process_is_at_waits_for_its_turn() -> None:
    class Busy(schedule.Claims):
        def __init__(self, looks: int, then: Callable[[], object] = lambda: None) -> None:
            super().__init__()
            self.looks, self.then = looks, then

        def take(self, asked: Task) -> bool:
            if asked.id == "teacher":
                self.looks -= 1
                if not self.looks:
                    self.then()
                if self.looks > 0:
                    return False
            return super().take(asked)

    machines, claims = Machines(), Busy(4)
    state = schedule.run(a_plan(*FAMILY, *OTHERS), machines, Silent(), claims)
    assert machines.begun[0] == "other"
    assert len(state.done) == 6
    assert not claims.held

    # And what it has done by then is not done again.
    machines = Machines()
    claims = Busy(1, lambda: checkpoint.save_json(paths.cache() / "teacher" / "history.json", {}))
    state = schedule.run(a_plan(*FAMILY, *OTHERS), machines, Silent(), claims)
    assert not claims.held
    assert state.found == {"teacher"}
    assert set(machines.begun) == set(state.done) == {"student", "first", "second", "other", "third"}
    assert "1 more by other processes" in board.summary(state, 1.0, Path())[0]


def test_only_one_of_several_sweeps_takes_a_task() -> None:
    asked = task("weights", kind="pretrain")
    first, second, ray = schedule.Claims(), schedule.Claims(), schedule.Claims(hold=False)
    paths.cache().mkdir(parents=True)
    with filelock.FileLock(paths.cache() / "weights.lock"):  # a run that is no sweep
        assert not any(claims.take(asked) for claims in (first, ray))
    assert ray.take(asked)
    assert first.take(asked)
    assert not second.take(asked)
    assert second.take(task("others", kind="pretrain"))
    first.leave(asked)
    assert second.take(asked)


def test_the_time_left_is_that_of_tasks_of_the_same_kind() -> None:
    state = schedule.State(a_plan(*FAMILY, *OTHERS), {"first": FAMILY[2], "second": FAMILY[3]})
    assert state.seconds_left() is None
    state.done = {"teacher": 100.0, "other": 200.0, "third": 10.0}
    assert state.seconds_left() == pytest.approx(20.0)
    state.started, state.running = {"student"}, {"student": Running(time.monotonic() - 50, "")}
    assert state.seconds_left() == pytest.approx(20.0 + 100.0, abs=1.0)


def test_the_table_and_the_lines_say_how_far_it_is(tmp_path: Path) -> None:
    made = a_plan(*FAMILY, *OTHERS)
    state = schedule.State(made, {"first": FAMILY[2]}, elsewhere={"first"})
    state.started, state.running = {"student"}, {"student": Running(time.monotonic() - 70, "step 3 of 9")}
    state.done, state.failed, state.blocked = {"teacher": 60.0}, {"other": "why"}, {"third": "other"}
    screen = io.StringIO()
    shown = board.Board(
        made, tmp_path, Console(file=screen, force_terminal=True, width=100, color_system=None)
    )
    shown.show(state)
    shown.console.print(shown.table(state))
    text = screen.getvalue()
    assert "test: 3 of 6 in 0 s, about " in text
    assert "1 with another process" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["pretrain", "1", "1", "1"] in rows
    assert ["knn", "1", "1"] in rows
    assert any(row[:3] == ["student", "70", "s"] and row[3:] == ["step", "3", "of", "9"] for row in rows)

    lines = io.StringIO()
    plain = board.Board(made, tmp_path, Console(file=lines, width=40))
    plain.show(state)
    plain.started(STUDENT)
    plain.ended(STUDENT, Ended("student", 0, 61.0), "done", "")
    plain.ended(OTHERS[0], Ended("other", -9, 1.0, "was killed by SIGKILL"), "again", "again in 5 s (1 of 2)")
    plain.ended(OTHERS[0], Ended("other", 2, 1.0, "the loss is not finite"), "failed", "1 tasks need it")
    assert lines.getvalue().splitlines() == [
        "start   student",
        lines.getvalue().splitlines()[1],
        "again   other: was killed by SIGKILL; again in 5 s (1 of 2)",
        f"failed  other: the loss is not finite; 1 tasks need it; log: {tmp_path / OTHERS[0].log}",
    ]
    assert lines.getvalue().splitlines()[1].startswith("done    student, in 61 s: 4 of 6, about ")


# Processes of this machine


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of tasks that ``Local`` starts, as processes that end at once."""
    seen: list[dict[str, str]] = []

    def start(words: tuple[str, ...], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        seen.append(variables)
        return subprocess.Popen([sys.executable, "-S", "-c", ""])

    monkeypatch.setattr(local.process, "start", start)
    return seen


def with_resources(name: str, **resources: Any) -> Task:
    return dataclasses.replace(task(name), resources=file.Resources(**resources))


def test_each_task_gets_its_gpu_and_no_more_run_than_have_room(
    tmp_path: Path, began: list[dict[str, str]]
) -> None:
    half, whole, none = (
        with_resources(name, gpus=share) for name, share in (("h", 0.5), ("w", 1.0), ("n", 0.0))
    )
    machine = local.Local(a_plan(half, whole, none), tmp_path, workers=9, gpus=["3", "5"])
    given = []
    for each in (half, whole, half, none):
        assert machine.room(each)
        machine.start(dataclasses.replace(each, id=f"{each.id}{len(given)}"))
        given.append(began[-1]["CUDA_VISIBLE_DEVICES"])
    assert given == ["3", "5", "3", ""]
    assert not machine.room(half)
    assert machine.room(none)
    ended: list[Ended] = []
    while len(ended) < 4:
        ended += machine.wait(1.0)
    assert machine.gpus == {"3": 1.0, "5": 1.0}
    assert {each.code for each in ended} == {2}  # they left no record
    assert all("no record under the name that was planned" in each.why for each in ended)


def test_without_a_gpu_tasks_run_on_cores(tmp_path: Path, began: list[dict[str, str]]) -> None:
    one, many = with_resources("one"), with_resources("many", cpus=1000)
    machine = local.Local(a_plan(one, many), tmp_path, gpus=[])
    machine.start(many)
    assert not machine.room(one)
    assert began == [{"OMP_NUM_THREADS": str(machine.cores)}]
    while not machine.wait(1.0):
        pass
    assert machine.room(one)
    machine = local.Local(a_plan(one, many), tmp_path, workers=2, gpus=[])
    for name in "ab":
        assert machine.room(one)
        machine.start(dataclasses.replace(one, id=name))
    assert not machine.room(one)
    machine.stop()


def test_what_the_machine_does_not_have_is_refused(tmp_path: Path) -> None:
    huge = with_resources("huge", memory_gib=1e6)
    with pytest.raises(ConfigError, match=r"huge asks for 1e\+06 GiB of memory, but this machine has"):
        local.Local(a_plan(huge), tmp_path)
    made = a_plan(task("one"))
    made.sweep = dataclasses.replace(made.sweep, device="cuda")
    with pytest.raises(ConfigError, match="there is no usable GPU here"):
        local.Local(made, tmp_path, gpus=[])


class ACluster:
    """What Ray says of a cluster."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def remote(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.resources}]


def test_a_cluster_says_before_what_will_surprise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "visible_gpus", list)
    made = a_plan(*OTHERS)
    made.sweep = dataclasses.replace(made.sweep, device="auto")
    enough = {"CPU": 8, "GPU": 2, "memory": 2.0**40}
    (said,) = cluster.Cluster(ACluster(**enough), made, tmp_path).warnings()
    assert "the cluster has GPUs, but this machine has none" in said
    assert "--device cuda" in said
    (said,) = cluster.Cluster(ACluster(CPU=8, memory=2.0**40), made, tmp_path).warnings()
    assert "no GPU: all tasks run on CPUs" in said
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0"])
    assert cluster.Cluster(ACluster(**enough), made, tmp_path).warnings() == []
    (said,) = cluster.Cluster(ACluster(**enough | {"CPU": 0}), made, tmp_path).warnings()
    assert "it waits until one joins" in said


# The whole command


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ``mimbench LINE`` in a process of its own; what still runs at the end of the test is stopped."""
    processes: list[subprocess.Popen[str]] = []

    def begin(line: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mimbench", *shlex.split(line)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ids(where: Path | None = None) -> dict[str, record.Record]:
    made, faults = record.scan(where or paths.results())
    assert not faults
    return {each.id: each for each in made}


def tasks_of(process: int) -> list[int]:
    """The ids of the processes that a sweep has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "mimbench.sweep.task" in words and str(process) in words:
            found.append(int(folder.name))
    return found


def tasks_of_machine(cache: Path) -> list[int]:
    """The ids of the processes that do tasks with this cache."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"mimbench.sweep.task" in words and f"MIMBENCH_CACHE={cache}\0".encode() in variables:
            found.append(int(folder.name))
    return found


linux = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by /proc")


@linux
def test_a_sweep_survives_a_killed_task_and_a_wrong_setting_and_goes_on(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_cli import call

    text = QUICK.replace(', "linear"]', "]") + TINY
    bad = '[[runs]]\nmethods = "mae"\nprotocols = "knn"\npreset = "smoke"\nset.recipe.base_lr = 1e30\n'
    sweep = start(f"sweep {written(tmp_path, text + bad + TINY_MAE)} --json --workers 2")
    assert sweep.stderr
    shown = ""
    while "start   random_init" not in shown:
        shown += sweep.stderr.readline()
    os.kill(tasks_of(sweep.pid)[0], signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1, err
    assert "was killed by SIGKILL; again in 0 s (1 of 2)" in err
    ended = json.loads(out)
    assert ended["repeated"] == 1
    assert [each["task"] for each in ended["failed"]] == ["mae, seed 0: pretraining on digits"]
    assert "loss" in ended["failed"][0]["why"]
    assert "recipe.base_lr=1e+30" in ended["failed"][0]["command"]
    assert [each["task"] for each in ended["blocked"]] == ["mae, seed 0: knn on digits"]
    assert len(ended["done"]) == 4
    found = ids()
    assert {(made.method.slug, made.test_reads) for made in found.values()} == {
        ("mae", 1),
        ("random_init", 1),
    }
    assert all(made.command.startswith("mimbench run --method ") for made in found.values())
    logs = list((paths.cache() / "sweeps" / "tiny").glob("*.log"))
    assert sum(log.read_text().count("$ mimbench") for log in logs) == len(logs) + 1 == 6

    # What is recorded is left alone, and is there for 'mimbench query'.
    before = {file: file.read_bytes() for file in record.files(paths.results())}
    again = call(f"sweep {written(tmp_path, text)} --json -q", capsys.readouterr)
    assert again.code == 0, again.err
    assert json.loads(again.out)["done"] == []
    assert json.loads(again.out)["already"] == {"pretrain": 2, "evaluate": 2}
    assert {file: file.read_bytes() for file in record.files(paths.results())} == before
    _, rows = database.query("select id from runs", paths.results())
    assert {row[0] for row in rows} == set(found)


@linux
def test_a_sweep_that_is_stopped_or_killed_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_cli import call

    place = written(tmp_path, OF_MAE, epochs=20)
    pretraining, *evaluations = plan.plan(file.read(place), progress.quiet()).tasks.values()

    def saved() -> set[Path]:
        return {*paths.cache().glob("pretrain/mae/*/step-*")}

    def begun(*tasks: Task) -> int:
        logs = [paths.cache() / "sweeps" / "tiny" / each.log for each in tasks]
        return sum(log.read_text().count("$ mimbench") for log in logs if log.is_file())

    moments: list[tuple[signal.Signals, int, Callable[[set[Path]], bool]]] = [
        (signal.SIGTERM, 130, lambda before: bool(saved() - before)),
        (signal.SIGKILL, -9, lambda before: bool(saved() - before)),
        (signal.SIGKILL, -9, lambda before: begun(*evaluations) == 2),  # so the first is recorded
    ]
    for how, code, now in moments:
        sweep = start(f"sweep {place} --workers 1")
        before = saved()
        deadline = time.monotonic() + 300
        while not now(before):
            assert sweep.poll() is None, sweep.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        sweep.send_signal(how)
        out, err = sweep.communicate(timeout=90)
        assert sweep.returncode == code
        assert not out
        if code == 130:
            assert err.splitlines()[-1].startswith("error: interrupted. What was finished is recorded")
            assert not tasks_of(sweep.pid)
        deadline = time.monotonic() + 90
        while tasks_of(sweep.pid):  # they see that their sweep is gone
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert saved() or ids()
    (early,) = record.files(paths.results())
    content = early.read_bytes()
    last = call(f"sweep {place} --json -q", capsys.readouterr)
    assert last.code == 0, last.err
    assert json.loads(last.out)["already"] == {"pretrain": 1, "evaluate": 1}
    found = ids()
    assert early.read_bytes() == content
    assert (begun(pretraining), begun(*evaluations)) == (3, 3)
    assert {(made.pretrain.resumed, made.test_reads) for made in found.values()} == {(2, 1)}

    monkeypatch.setenv("MIMBENCH_CACHE", str(tmp_path / "undisturbed"))
    monkeypatch.setenv("MIMBENCH_RESULTS", str(tmp_path / "undisturbed" / "results"))
    for each in (pretraining, *evaluations):
        assert call(shlex.join(each.words), capsys.readouterr).code == 0
    undisturbed = ids()
    assert {name: made.metrics for name, made in undisturbed.items()} == {
        name: made.metrics for name, made in found.items()
    }
    assert {made.pretrain.resumed for made in undisturbed.values()} == {0}


@linux
def test_two_sweeps_that_begin_together_share_the_work(tmp_path: Path, start: Start) -> None:
    place = written(tmp_path, QUICK.replace(', "linear"]', "]") + TINY)
    both = [start(f"sweep {place} --json --workers 1 --logs {tmp_path / str(n)}") for n in range(2)]
    done = []
    for sweep in both:
        out, err = sweep.communicate(timeout=300)
        assert sweep.returncode == 0, err
        done.append({each["id"] for each in json.loads(out)["done"]})
    assert not done[0] & done[1]
    assert done[0]
    assert done[1]
    assert len(done[0] | done[1]) == 4
    assert {made.test_reads for made in ids().values()} == {1}
    logs = [log.read_text() for log in tmp_path.glob("[01]/*.log")]
    assert len(logs) == 4
    assert not any("another process" in text for text in logs)


def test_a_dry_run_says_what_would_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_cli import call

    place = written(tmp_path, QUICK + "exclude.mage = 'too slow here'\n" + TINY)
    shown = call(f"sweep {place} --dry-run -q", capsys.readouterr)
    assert shown.code == 0
    assert "To do: 2 of 2 pretrainings and 4 of 4 evaluations" in shown.out
    assert "mage: too slow here" in shown.out
    listed = json.loads(call(f"sweep {place} --dry-run --json -q", capsys.readouterr).out)
    assert len(listed["tasks"]) == 6
    assert all(each["todo"] and each["command"].startswith("mimbench ") for each in listed["tasks"])
    assert not record.files(paths.results())
    for line, message in (
        (f"sweep {place} --executor slurm", "unknown executor 'slurm'"),
        (f"sweep {place} --executor ray --workers 2", "--workers is for the executor local"),
        (f"sweep {place} --executor ray --address ray://head:10001 -q", "on a machine of the cluster"),
        (f"sweep {tmp_path / 'none.toml'}", "none.toml cannot be read"),
    ):
        failed = call(line, capsys.readouterr)
        assert failed.code == 2
        assert message in failed.err
        assert not failed.out


# Weights and records that come from other machines


def test_weights_travel_without_what_is_of_no_use_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    for name in ("model.safetensors", "history.json", "config.json", "tokenizer/model.safetensors", ".lock",
                 "features/a.safetensors", "step-000000003/model.safetensors", "tokenizer/.lock"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    files = cluster.pack(folder)
    assert set(files) == {"model.safetensors", "history.json", "config.json", "tokenizer/model.safetensors"}
    there = tmp_path / "there"
    cluster.unpack(files, there)
    assert cluster.pack(there) == files
    cluster.unpack({"history.json": b"other"}, there)  # what is complete is left alone
    assert cluster.pack(there) == files
    with pytest.raises(
        ConfigError, match=r"are 0.0 GiB, more than the 0.0 that are sent. Let all machines share"
    ):
        cluster.pack(folder, most=60)
    for incomplete in (None, {}, {"model.safetensors": b""}):
        with pytest.raises(ConfigError, match="not here and too large to be sent"):
            cluster.unpack(incomplete, tmp_path / "nowhere")
    (folder / "history.json").unlink()
    assert cluster.pack(folder) == {}


def test_reads_of_test_labels_add_up_when_a_record_comes_from_elsewhere() -> None:
    from test_record import make_record

    made = make_record()
    reads = made.test_reads
    for times in (1, 2, 3):
        place = record.receive(made, paths.results())
        assert record.read(place) == dataclasses.replace(made, test_reads=times * reads)
    place.write_text("{")
    assert record.read(record.receive(made, paths.results())).test_reads == reads + 1


# Several processes


FLOOR = ("image_size=16", "vit.width=16", "vit.depth=1", "vit.heads=1")


def test_a_process_does_what_it_can_while_another_has_what_it_needs() -> None:
    settings = (*FLOOR, "linear.c_steps=3", "linear.c_powers=[-4.0, 2.0]")
    request = runner.Request(
        ("random_init",), ("knn", "linear"), preset="smoke", seeds=(0, 1), overrides=settings
    )
    first, second = runner.units(request, progress.quiet())
    (weights,) = first.lineage
    weights.folder.mkdir(parents=True)
    second.jobs[0].lock.parent.mkdir(parents=True)
    training = filelock.FileLock(weights.folder / ".lock")
    evaluating = filelock.FileLock(second.jobs[0].lock)
    training.acquire()
    evaluating.acquire()
    outcomes = runner.run(request, progress.quiet())

    def next_one() -> tuple[int, str]:
        made = next(outcomes).record
        return made.seed, made.protocol.name

    assert next_one() == (1, "linear")
    evaluating.release()
    assert next_one() == (1, "knn")
    training.release()
    assert next_one() == (0, "knn")
    assert next_one() == (0, "linear")
    assert next(outcomes, None) is None


def test_a_run_that_another_process_has_just_recorded_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = runner.Request(("random_init",), ("knn",), preset="smoke", overrides=FLOOR)
    (unit,) = runner.units(request, progress.quiet())
    (job,) = unit.jobs
    device = runner.choose_device("cpu")
    pretrained = unit.pretrain(device, progress.quiet())
    assert job.evaluate(pretrained, device, progress.quiet()).repeated
    said: list[str] = []
    waiting = progress.quiet()

    def release(text: str) -> None:
        said.append(text)
        lock.release()

    monkeypatch.setattr(waiting, "say", release)
    lock = filelock.FileLock(job.lock)
    lock.acquire()
    assert not job.evaluate(pretrained, device, waiting).repeated
    assert said == ["another process is evaluating random_init by knn on digits, seed 0: waiting for it"]


def test_eight_processes_at_once_lose_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crowd.py")), "--rounds", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["processes"], found["commands"], found["records"]) == (8, 8, 6)


# A Ray cluster


@linux
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_cluster_loses_a_machine_and_no_record(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the executor ray needs Ray: pip install 'mimbench[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or tasks starve where other programs run
    from ray.cluster_utils import Cluster

    one, two, three = (tmp_path / name for name in ("one", "two", "three"))  # caches of machines

    def machine(cache: Path, cpus: int) -> dict[str, Any]:
        own = {"MIMBENCH_CACHE": str(cache), "MIMBENCH_RESULTS": f"{cache}/results"}
        return {"num_cpus": cpus, "env_vars": own}

    machines = Cluster(initialize_head=True, head_node_args=machine(one, 1) | {"include_dashboard": False})

    def sweep(text: str) -> subprocess.Popen[str]:
        place = written(tmp_path, text, epochs=5)
        return start(f"sweep {place} --executor ray --address {machines.address} --json")

    def ready(cache: Path) -> set[str]:
        return {file.parent.name for file in cache.glob("pretrain/*/*/history.json")}

    try:
        victim = machines.add_node(**machine(two, 1))
        text = QUICK.replace(', "linear"]', "]") + TINY
        for stop in (True, False):
            running = sweep(text)
            deadline = time.monotonic() + 300
            while not tasks_of_machine(two):
                assert running.poll() is None, running.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if stop:
                running.terminate()
                _, err = running.communicate(timeout=120)
                assert running.returncode == 130
                assert err.splitlines()[-1].startswith("error: interrupted. What was finished is recorded")
                deadline = time.monotonic() + 120  # twice what they have before they are stopped by force
                while tasks_of_machine(one) + tasks_of_machine(two):
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
        machines.remove_node(victim, allow_graceful=False)  # SIGKILL
        out, err = running.communicate(timeout=300)
        assert running.returncode == 0, err
        assert " on digits: was lost: " in err
        ended = json.loads(out)
        assert ended["repeated"] >= 1
        assert (len(ended["done"]), ended["failed"]) == (4, [])
        first = ids()
        assert {made.method.slug for made in first.values()} == {"mae", "random_init"}
        assert {made.test_reads for made in first.values()} == {1}
        assert not tasks_of_machine(two)
        # Weights came with the results, and records are where the sweep runs, not where the tasks did.
        assert ready(paths.cache()) == ready(one) == {made.pretrain.key for made in first.values()}
        assert not [*one.glob("results/**/*.json"), *two.glob("results/**/*.json")]

        # A task that no machine can take waits for one, which gets weights that it never had.
        running = sweep("[resources]\nevaluate.cpus = 2\n" + OF_MAE.replace("backoff = 0.1\n", ""))
        machines.add_node(**machine(three, 2))
        out, err = running.communicate(timeout=300)
        assert running.returncode == 0, err
        assert json.loads(out)["already"] == {"pretrain": 1, "evaluate": 1}
        (added,) = set(ids()) - set(first)
        assert ready(three) == {ids()[added].pretrain.key}
        assert not [*paths.cache().glob("sweeps/.*.sign")]
    finally:
        machines.shutdown()
