"""Kills mimbench at hundreds of random moments and prints what was lost: ``make soak``.

    python tests/soak.py [--kills 200] [--seed 0]

Exits with 1 when a record was lost, a file was half written, the database did not open or did not say what the
records say, or what was done again differs from what an undisturbed process gives.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from killing import Kills, Tally, processes

HEADER = (
    "phase          ",
    "kills",
    "in the phase",
    "records lost",
    "half written",
    "database opened",
    "same afterwards",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    began = time.perf_counter()
    done: list[Tally] = []
    print("  ".join(HEADER), flush=True)
    with tempfile.TemporaryDirectory() as top, processes(Path(top)) as server:
        for tally in Kills(Path(top), random.Random(asked.seed), server).all(asked.kills):
            done.append(tally)
            show(tally.phase, [tally])
    show("all", done)
    print(f"{time.perf_counter() - began:.0f} s, seed {asked.seed}")
    for fault in (fault for tally in done for fault in tally.faults):
        print(f"fault: {fault}")
    sys.exit(not all(tally.passed for tally in done))


def show(name: str, tallies: list[Tally]) -> None:
    kills, hits, lost, torn, opened, equal, again = (
        sum(getattr(tally, key) for tally in tallies)
        for key in ("kills", "hits", "lost", "torn", "opened", "equal", "again")
    )
    cells = (name, kills, hits, lost, torn, f"{opened} of {kills}", f"{equal} of {again}")
    print("  ".join(f"{cell!s:<{len(head)}}" for cell, head in zip(cells, HEADER, strict=True)), flush=True)


if __name__ == "__main__":
    main()
