"""Many processes that run and record at once, with reports and queries in between; says what was lost.

    python tests/crowd.py [--processes 8] [--rounds 25]

In each round one half of the processes does runs of its own, and the other half two protocols on weights that all of
it needs. Exits with 1 when a record is missing or unsound, something was done twice, the database does not say what
the records say, or a command failed or complained. Commands are forks of this process, which has imported what they
need.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FLOOR = "--preset smoke --set image_size=16 --set vit.width=16 --set vit.depth=1 --set vit.heads=1"
TINY = (
    "--preset smoke --set image_size=16 --set backbone.width=16 --set backbone.depth=1 --set backbone.heads=1"
    " --set decoder.width=16 --set decoder.depth=1 --set decoder.heads=1 --set recipe.epochs=1"
)
COMPLAINT = re.compile(r"^error|Traceback|database|\block", re.IGNORECASE | re.MULTILINE)
LINEAR = "--set linear.c_steps=3 --set linear.c_powers=[-4.0,2.0]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as top:
        os.environ |= {"MIMBENCH_CACHE": f"{top}/cache", "MIMBENCH_RESULTS": f"{top}/results"}
        found = crowd(Path(top), asked.processes, asked.rounds)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["faults"]))


def crowd(top: Path, processes: int, rounds: int) -> dict[str, object]:
    """Lets them all run; gives counts, and everything that is not as it should be."""
    import torch._dynamo  # noqa: F401  what an optimizer imports

    from mimbench import cli, database, paths, record, registry, report, runner  # noqa: F401

    for name in ("random_init", "mae"):
        registry.load_method(name)
    for name in ("knn", "linear"):
        registry.load_protocol(name)
    began = time.perf_counter()
    workers = [
        _fork(lambda number=number: _work(top, number, rounds), top / f"worker{number}")
        for number in range(processes)
    ]
    between, failed = 0, []
    while workers:
        for line in ("report --out site", "query --json 'select count(*) from runs'"):
            log = top / f"between{between}"
            code = _wait(_fork(lambda line=line: _mimbench(line.replace("site", str(top / "site"))), log))
            # Until the first record is written there is no database.
            if code and record.files(paths.results()):
                failed.append(f"{line}: {log.read_text()}")
            between += 1
        workers = [worker for worker in workers if _running(worker, failed)]
    seconds = time.perf_counter() - began

    records, faults = record.scan(paths.results())
    expected = len({line for number in range(processes) for line in _lines(number, rounds)})
    found = [*failed, *map(str, faults)]
    if len(records) != expected:
        found.append(f"{len(records)} records instead of {expected}")
    found += database.update(paths.results())
    _, rows = database.query("select id from runs order by id", paths.results())
    if [row[0] for row in rows] != sorted(made.id for made in records):
        found.append(f"the database has {len(rows)} runs, not those of the {len(records)} records")
    keys = {(made.method.slug, made.seed): made.pretrain for made in records if made.method.slug == "mae"}
    for made in records:
        if made.method.slug == "mae" and made.pretrain != keys["mae", made.seed]:
            found.append(f"seed {made.seed} was pretrained more than once")
    reads = {made.test_reads for made in records}
    if reads != {1}:
        found.append(f"a run was evaluated more than once: test labels were read {sorted(reads)} times")
    said = {log: log.read_text() for log in [*top.glob("worker*/*"), *top.glob("between*")]}
    found += [f"{log.name}: {text}" for log, text in said.items() if COMPLAINT.search(text)]
    rest = [str(file) for file in paths.results().rglob("*.tmp*")]
    found += [f"left behind: {file}" for file in rest]
    return {
        "processes": processes,
        "commands": processes * rounds,
        "reports and queries in between": between,
        "records": len(records),
        "expected": expected,
        "seconds": round(seconds, 1),
        "faults": found,
    }


def _work(top: Path, number: int, rounds: int) -> int:
    """The rounds of one process; each command is a process of its own, as a user's would be."""
    folder = top / f"worker{number}"
    commands = enumerate(_lines(number, rounds))
    codes = [_wait(_fork(lambda line=line: _mimbench(line), folder / str(turn))) for turn, line in commands]
    return sum(code != 0 for code in codes)


def _lines(number: int, rounds: int) -> list[str]:
    """What a process does: of four, two have runs of their own, and two have protocols that others have too."""
    own = f"run --method random_init --protocol knn {FLOOR}"
    shared = f"run --method mae --protocol {('knn', f'linear {LINEAR}')[number % 2]} {TINY}"
    return [
        f"{own} --seed {number * rounds + n}" if number % 4 < 2 else f"{shared} --seed {n}"
        for n in range(rounds)
    ]


def _mimbench(line: str) -> int:
    import shlex

    from mimbench import cli

    sys.argv = ["mimbench", *shlex.split(line)]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  results; what is wrong goes to standard error
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _fork(do: Callable[[], int], log: Path) -> int:
    """Does something in a process of its own, which logs to a file (or to one in a folder that is made)."""
    if log.name.startswith("worker"):
        log.mkdir()
        log = log / "itself"
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = do()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(min(code, 255))


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _running(process: int, failed: list[str]) -> bool:
    done, status = os.waitpid(process, os.WNOHANG)
    if done and (code := os.waitstatus_to_exitcode(status)):
        failed.append(f"{code} commands of a process failed")
    return not done


if __name__ == "__main__":
    main()
