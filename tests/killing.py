"""Kills mimbench at random moments and looks at what is left. For ``test_faults.py`` and ``soak.py``.

A server, which has imported everything, forks a process for each command, so that hundreds of kills take minutes.
Nothing in the processes knows of this: when to kill is seen from outside, by the files that they write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TINY = (
    "--preset smoke --set image_size=16 --set backbone.width=16 --set backbone.depth=1 --set backbone.heads=1"
    " --set decoder.width=16 --set decoder.depth=1 --set decoder.heads=1"
    " --set recipe.precision=fp32 --set recipe.compile=false"
)
RUN = f"run -q --method mae --protocol knn,linear {TINY} --set recipe.epochs=3 --set recipe.checkpoint_minutes=0"
PATIENCE = 600.0  # seconds after which a process hangs: busy machines starve some for minutes


@dataclass
class Tally:
    """What came of the kills of one phase."""

    phase: str
    kills: int = 0
    hits: int = 0  # kills while the process was in the phase
    lost: int = 0  # records that were there, or said to be, and are no more
    torn: int = 0  # files under their final name that do not read back
    opened: int = 0  # times that the database opened and held what the records say
    equal: int = 0  # times that what was done again is what an undisturbed process gives
    again: int = 0  # of so many times
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was lost."""
        return (
            not (self.faults or self.lost or self.torn)
            and self.opened == self.kills
            and self.equal == self.again > 0
        )


class Processes:
    """Runs commands in forks of one process that has imported what they need."""

    def __init__(self, top: Path) -> None:
        self.log = top / "log"
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def _ask(self, **order: Any) -> Any:
        assert self.server.stdin
        assert self.server.stdout
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, line: str, folder: Path) -> int:
        """Starts ``mimbench LINE``, or ``record COUNT``, with its cache and results below ``folder``; gives its id."""
        return int(self._ask(line=line, folder=str(folder), log=str(self.log)))

    def ended(self, process: int) -> int | None:
        """The exit code, or None while it runs."""
        code: int | None = self._ask(process=process)
        return code

    def wait(self, process: int) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + PATIENCE
        while (code := self.ended(process)) is None:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGUSR1)  # it says where it is
                time.sleep(1)
                self.kill(process)
                raise TimeoutError(f"a process did not end in {PATIENCE:.0f} s: {self.said()}")
            time.sleep(0.002)
        return code

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)
        while self.ended(process) is None:
            time.sleep(0.0005)

    def run(self, line: str, folder: Path) -> str:
        """Runs a command to its end, which must be a good one; gives what it printed."""
        code = self.wait(self.start(line, folder))
        if code:
            raise RuntimeError(f"mimbench {line} ended with {code}: {self.said()}")
        return self.said()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def kill_when(self, line: str, folder: Path, seen: Callable[[], bool], delay: float) -> bool:
        """Starts a command and kills it ``delay`` seconds after something is ``seen``; False if it ended before."""
        process = self.start(line, folder)
        deadline = time.monotonic() + PATIENCE
        while not seen():
            if self.ended(process) is not None:
                return False
            if time.monotonic() > deadline:
                self.kill(process)
                raise TimeoutError(
                    f"mimbench {line}: nothing to be seen after {PATIENCE:.0f} s: {self.said()}"
                )
            time.sleep(0.0002)
        time.sleep(delay)
        if self.ended(process) is not None:
            return False
        self.kill(process)
        return True


@contextlib.contextmanager
def processes(top: Path) -> Iterator[Processes]:
    """A server while it is needed."""
    made = Processes(top)
    try:
        yield made
    finally:
        made.close()


class Kills:
    """All kinds of kills, in folders below ``top``, drawn from ``rng``."""

    def __init__(self, top: Path, rng: random.Random, server: Processes) -> None:
        self.top, self.rng, self.server = top, rng, server
        self.whole = top / "whole"  # of a run that nothing disturbs
        process = server.start(RUN, self.whole)
        began = time.perf_counter()
        while not self._trained(self.whole):
            assert server.ended(process) is None, server.said()
            time.sleep(0.002)
        between = time.perf_counter()
        assert server.wait(process) == 0, server.said()
        self.run_seconds = between - began, time.perf_counter() - between  # of pretraining and evaluation

    def all(self, kills: int) -> Iterator[Tally]:
        """So many kills in all, spread over the phases."""
        shares = {
            self.pretraining: 0.3,
            self.evaluation: 0.2,
            self.recording: 0.2,
            self.updating: 0.15,
            self.rendering: 0.15,
        }
        for phase, share in shares.items():
            yield phase(math.ceil(kills * share))

    # The phases

    def pretraining(self, kills: int) -> Tally:
        """Kills between and within steps, while checkpoints are written; up to four times in a row."""
        tally = Tally("pretraining")
        while tally.kills < kills:
            folder = self._fresh("run")
            for _ in range(min(self.rng.randint(1, 4), kills - tally.kills)):
                before = self._steps(folder)

                def seen(folder: Path = folder, before: int = before) -> bool:
                    return self._steps(folder) > before or self._trained(folder)

                delay = self.rng.uniform(0, self.run_seconds[0] / 4)
                self._kill(tally, RUN, folder, seen, delay, lambda folder=folder: not self._trained(folder))
            self._finish_run(tally, folder)
        return tally

    def evaluation(self, kills: int) -> Tally:
        """Kills after the last step: features, scores, the records of two protocols and the database."""
        tally = Tally("evaluation")
        while tally.kills < kills:
            folder = self._fresh("run")
            shutil.copytree(
                self.whole / "cache", folder / "cache", ignore=shutil.ignore_patterns("features", "evaluate")
            )
            for _ in range(min(self.rng.randint(1, 3), kills - tally.kills)):

                def seen(folder: Path = folder) -> bool:
                    return any((folder / "cache" / "evaluate").glob("mae/*"))

                self._kill(tally, RUN, folder, seen, self.rng.uniform(0, self.run_seconds[1]))
                if len(files(folder)) == 2:
                    break
            self._finish_run(tally, folder)
        return tally

    def recording(self, kills: int) -> Tally:
        """Kills a process that does nothing but write records, one after the other, and say when one is written."""
        tally = Tally("record writing")
        count = 40
        expected = self._fresh("records")
        began = time.perf_counter()
        self.server.run(f"record {count}", expected)
        seconds = time.perf_counter() - began
        for _ in range(kills):
            folder = self._fresh("run")
            told = folder / "told"

            def seen(told: Path = told) -> bool:
                return told.is_file()

            self._kill(tally, f"record {count}", folder, seen, self.rng.uniform(0, seconds / 2))
            said = told.read_text(encoding="utf-8").split("\n")[:-1]
            tally.lost += len(set(said) - {file.name for file in files(folder)})
            self.server.run(f"record {count}", folder)
            tally.again += 1
            tally.equal += contents(folder / "results" / "runs") == contents(expected / "results" / "runs")
        return tally

    def updating(self, kills: int) -> Tally:
        """Kills while the database is built, or brought up to date after a record has come or changed."""
        tally = Tally("database update")
        source = self._fresh("records")
        self.server.run("record 40", source)
        folder = self._fresh("run")
        results = folder / "results"
        shutil.copytree(source / "results" / "runs", results / "runs")
        everything = files(folder)

        def updating() -> bool:
            return any(results.glob("mimbench.duckdb.*.tmp"))

        for _ in range(kills):
            if self.rng.random() < 0.3:
                (results / "mimbench.duckdb").unlink(missing_ok=True)
            for file in self.rng.sample(everything, 5):  # records that have come, changed or gone
                if file.is_file() and self.rng.random() < 0.5:
                    file.unlink()
                else:
                    shutil.copyfile(source / file.relative_to(folder), file)

            self._kill(tally, "query 'select 1'", folder, updating, self.rng.uniform(0, 0.3), updating)
            self._again(tally, lambda: self._database_says(folder) and not updating())
        return tally

    def rendering(self, kills: int) -> Tally:
        """Kills while pages are rendered, over an older report or into a new folder."""
        tally = Tally("rendering")
        folder = self._fresh("run")
        self.server.run("record 8", folder)
        every = {file: file.read_bytes() for file in files(folder)}
        some = list(every)[:5]
        site = folder / "site"
        expected = {}
        for count in (len(some), len(every)):
            for file, content in every.items():
                file.write_bytes(content) if count == len(every) or file in some else file.unlink()
            began = time.perf_counter()
            self.server.run(f"report --out {folder / str(count)}", folder)
            seconds = time.perf_counter() - began
            expected[count] = contents(folder / str(count))
        for kill in range(kills):
            if self.rng.random() < 0.5:
                shutil.rmtree(site, ignore_errors=True)
            before = contents(site) if site.is_dir() else {}
            pages = expected[len(some) if kill % 2 else len(every)]
            for file, content in every.items():
                if kill % 2 == 0:
                    file.write_bytes(content)
                elif file not in some:
                    file.unlink(missing_ok=True)
            index = site / "index.html"
            former = index.stat().st_ino if index.is_file() else None  # it is among the first pages

            def seen(index: Path = index, former: int | None = former) -> bool:
                return index.is_file() and index.stat().st_ino != former

            delay = self.rng.uniform(0, seconds * 0.8)
            self._kill(tally, f"report --out {site}", folder, seen, delay)
            for path, content in contents(site).items():
                if content not in (pages.get(path), before.get(path)):
                    tally.torn += 1
                    tally.faults.append(f"{path} was half written")
            self._again(tally, lambda pages=pages: self._rendered(folder, site, pages))
        return tally

    def _rendered(self, folder: Path, site: Path, pages: dict[str, bytes]) -> bool:
        self.server.run(f"report --out {site}", folder)
        left = [path for path in site.rglob("*") if path.name.endswith((".tmp", ".wal", "-part", ".part"))]
        return contents(site) == pages and not left

    # What they share

    def _fresh(self, name: str) -> Path:
        folder = self.top / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _steps(self, folder: Path) -> int:
        places = (folder / "cache").glob("pretrain/mae/*/step-*")
        return max((int(place.name[5:]) for place in places), default=0)

    def _trained(self, folder: Path) -> bool:
        return any((folder / "cache").glob("pretrain/mae/*/history.json"))

    def _kill(
        self,
        tally: Tally,
        line: str,
        folder: Path,
        seen: Callable[[], bool],
        delay: float,
        within: Callable[[], bool] = lambda: True,
    ) -> None:
        """A kill, after which all records must be there that were, and the database must open.

        It hits its phase where the process had not ended before it, and ``within`` holds after it.
        """
        before = {file.name: file.read_bytes() for file in files(folder)}
        killed = self.server.kill_when(line, folder, seen, delay)
        tally.kills += 1
        tally.hits += killed and within()
        after = {file.name: file.read_bytes() for file in files(folder)}
        for name, content in before.items():
            tally.lost += name not in after or (len(after[name]) < len(content))
        from mimbench import record

        for fault in record.scan(folder / "results")[1]:
            tally.torn += 1
            tally.faults.append(str(fault))
        tally.opened += self._database_says(folder)

    def _database_says(self, folder: Path) -> bool:
        """Whether the database opens and has all records, and only them."""
        try:
            rows = json.loads(self.server.run("query --json 'select id from runs'", folder))
        except (RuntimeError, TimeoutError, ValueError) as fault:
            print(fault, file=sys.stderr)
            return False
        return {row["id"] for row in rows} == {file.stem for file in files(folder)}

    def _again(self, tally: Tally, same: Callable[[], bool]) -> None:
        tally.again += 1
        tally.equal += same()

    def _finish_run(self, tally: Tally, folder: Path) -> None:
        """Does the rest of the run, whose weights and records must be those of the undisturbed one, bit for bit."""
        self.server.run(RUN, folder)
        tally.again += 1
        same = all(
            outcome(folder / path) == outcome(self.whole / path)
            for path in {file.relative_to(self.whole) for file in files(self.whole)}
        )
        (ours,), (theirs,) = (
            list(place.glob("cache/pretrain/mae/*/model.safetensors")) for place in (folder, self.whole)
        )
        same &= ours.read_bytes() == theirs.read_bytes()
        left = [path.name for path in ours.parent.iterdir() if path.name.startswith(("step-", ".step-"))]
        if not same:
            tally.faults.append("the resumed run ended with other weights or metrics")
        tally.equal += same and not left


def files(folder: Path) -> list[Path]:
    """The records below a folder."""
    return sorted((folder / "results" / "runs").glob("*/*/*.json"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder that a reader may open, but databases, whose bytes are never the same."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts) and ".duckdb" not in name:
            with contextlib.suppress(OSError):  # one that has just been renamed
                found[name] = path.read_bytes()
    return {name: found[name] for name in found if (folder / name).is_file()}


def outcome(file: Path) -> dict[str, Any]:
    """What a record says that must not depend on interruptions."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kept = ("id", "fingerprint", "metrics", "details", "correct", "curve", "config", "encoder", "data")
    return {name: content[name] for name in kept} | {"images": content["pretrain"]["images"]}


# The server


def serve() -> None:
    """Answers orders from standard input: start a process, or say whether one has ended."""
    import duckdb  # noqa: F401
    import scipy.optimize  # noqa: F401

    from mimbench import database, registry, report, runner  # noqa: F401

    registry.load_method("mae")
    for protocol in ("knn", "linear"):
        registry.load_protocol(protocol)
    codes: dict[int, int] = {}
    for text in sys.stdin:
        order = json.loads(text)
        answer: int | None
        if "line" in order:
            answer = os.fork()
            if not answer:
                _be(order["line"], Path(order["folder"]), Path(order["log"]))
        else:
            process = order["process"]
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
            answer = codes.get(process)
        print(json.dumps(answer), flush=True)


def _be(line: str, folder: Path, log: Path) -> None:
    """Becomes a process that does ``line``; never returns."""
    code: Any = 1
    try:
        os.environ |= {"MIMBENCH_CACHE": str(folder / "cache"), "MIMBENCH_RESULTS": str(folder / "results")}
        with open(os.devnull) as nothing, log.open("w") as out:
            os.dup2(nothing.fileno(), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=2)
        words = shlex.split(line)
        if words[0] == "record":
            _write_records(int(words[1]), folder)
            code = 0
        else:
            from mimbench import cli

            sys.argv = ["mimbench", *words]
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(code))


def _write_records(count: int, folder: Path) -> None:
    """Writes records that are not there, and says of each when it is written."""
    from test_record import make_record

    from mimbench import record

    curve = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 301)]
    results = folder / "results"
    with (folder / "told").open("a", encoding="utf-8") as told:
        for seed in range(count):
            made = dataclasses.replace(make_record(seed=seed, score=50 + seed / 100), curve=curve)
            if not record.place(made, results).is_file():
                told.write(f"{record.write(made, results).name}\n")
                told.flush()


if __name__ == "__main__":
    serve()
