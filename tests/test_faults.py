"""Faults from outside: killed processes, full and read-only disks, data that vanish, clocks that jump, no memory.

After each of them what had been computed is there, and the same command goes on. ``make soak`` kills more often.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import TINY, Kills, Processes, contents, files, outcome, processes
from PIL import Image
from test_fit import RECIPE, Toy, assert_same, toy_split, train
from torch import Tensor

from mimbench import record
from mimbench.data import Batch
from mimbench.errors import DataError, OutOfMemory
from mimbench.fit import Recipe

RUN = f"run -q --method mae --protocol knn,linear {TINY} --set recipe.epochs=1 --set recipe.checkpoint_minutes=0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with processes(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module")
def done(server: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cache and results of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("done")
    server.run(RUN, folder)
    return folder


@dataclass
class Failed:
    """Commands that must end with one line that begins with ``error:``, and exit code 2."""

    server: Processes

    def __call__(self, line: str, folder: Path, *expected: str) -> str:
        code = self.server.wait(self.server.start(line, folder))
        said = self.server.said()
        assert code == 2, said
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        for text in expected:
            assert text in said
        return said


@pytest.fixture
def fails(server: Processes) -> Failed:
    return Failed(server)


def assert_done(folder: Path, expected: Path) -> None:
    """The records in ``folder`` say what those in ``expected`` say, bit for bit."""
    found = {file.name: outcome(file) for file in files(folder)}
    assert found == {file.name: outcome(file) for file in files(expected)}
    assert not record.scan(folder / "results")[1]


# Kills


def test_twenty_kills_lose_nothing(server: Processes, tmp_path: Path) -> None:
    tallies = list(Kills(tmp_path, random.Random(5), server).all(20))
    assert [tally for tally in tallies if not tally.passed] == []
    assert sum(tally.kills for tally in tallies) >= 20
    assert all(tally.hits for tally in tallies)


# Disks


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this needs a file system of its own: {done.stderr.strip()}")


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """A file system of so many KiB at ``place``."""
    if os.geteuid() or not sys.platform.startswith("linux"):
        pytest.skip("only root may mount a small file system")
    place.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Nobody, not even root, writes to ``place``."""
    if os.geteuid():
        places = [place, *(path for path in place.rglob("*") if path.is_dir())]
        for path in places:
            path.chmod(0o500)
        try:
            yield
        finally:
            for path in places:
                path.chmod(0o700)
        return
    mount("--bind", str(place), str(place))
    try:
        mount("-o", "remount,ro,bind", str(place))
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def enlarge(place: Path) -> None:
    mount("-o", "remount,size=100m", str(place))


def fill(place: Path, but: int = 0) -> None:
    """Leaves room for ``but`` KiB."""
    filler = place / "filler"
    free = shutil.disk_usage(place).free - 1024 * but
    filler.write_bytes(bytes(free))


@pytest.mark.parametrize("kilobytes", [8, 150, 260])
def test_a_cache_that_is_full_while_checkpoints_are_written(
    kilobytes: int, fails: Failed, done: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "cache", kilobytes):
        fails(RUN, tmp_path, "could not be written", "No space left on device", "Free disk space")
        kept = sorted(path.name for path in tmp_path.glob("cache/pretrain/mae/*/*"))
        assert not [name for name in kept if name.endswith(".part")]
        assert any(name.startswith("step-") for name in kept) == (kilobytes > 100)
        enlarge(tmp_path / "cache")
        fails.server.run(RUN, tmp_path)
        assert_done(tmp_path, done)


def test_a_cache_that_is_full_when_all_is_trained_costs_no_score(
    server: Processes, done: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "cache", 2000):
        keep = shutil.ignore_patterns("features", "evaluate")
        shutil.copytree(done / "cache", tmp_path / "cache", ignore=keep, dirs_exist_ok=True)
        (tmp_path / "cache" / "evaluate" / "mae").mkdir(parents=True)
        fill(tmp_path / "cache", but=16)
        server.run(RUN, tmp_path)
        assert_done(tmp_path, done)


@pytest.mark.parametrize(("kilobytes", "which"), [(4, "record"), (40, "database")])
def test_results_that_are_full(kilobytes: int, which: str, fails: Failed, done: Path, tmp_path: Path) -> None:
    keep = shutil.ignore_patterns("evaluate")
    shutil.copytree(done / "cache", tmp_path / "cache", ignore=keep)
    with small_disk(tmp_path / "results", kilobytes):
        if which == "record":
            said = fails(RUN, tmp_path, "No space left on device", "The record is kept in")
            kept = Path(said.partition("The record is kept in ")[2].partition(".json")[0] + ".json")
            assert outcome(kept) == outcome(next(done.glob(f"results/runs/*/*/{kept.name}")))
        else:
            fails.server.run(RUN, tmp_path)  # the records are written: the run succeeded
            assert_done(tmp_path, done)
            fails("query 'select 1'", tmp_path, "mimbench.duckdb", "The records are complete without it")
        left = list((tmp_path / "results").rglob("*.tmp*"))
        assert left == []
        enlarge(tmp_path / "results")
        fails.server.run(RUN, tmp_path)
        assert_done(tmp_path, done)
        assert '"n": 2' in fails.server.run("query --json 'select count(*) as n from runs'", tmp_path)


def test_a_report_that_does_not_fit(fails: Failed, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    site, whole = tmp_path / "site", tmp_path / "whole"
    fails.server.run(f"report --out {whole}", tmp_path)
    pages = contents(whole)
    for kilobytes in (40, 500):
        with small_disk(site, kilobytes):
            fails(f"report --out {site}", tmp_path, "the report cannot be written", "No space left on device")
            for path, content in contents(site).items():
                assert content == pages[path]
            enlarge(site)
            fails.server.run(f"report --out {site}", tmp_path)
            assert contents(site) == pages


def test_read_only_folders(fails: Failed, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    (tmp_path / "site").mkdir()
    ids = "query --json 'select id from runs'"
    with read_only(tmp_path / "results"):
        fails(f"{RUN} --force", tmp_path, "cannot be written", "The record is kept in")
        fails.server.run(RUN, tmp_path)  # all is recorded
        assert "the answer may be out of date" in fails.server.run(ids, tmp_path)
        assert all(file.stem in fails.server.said() for file in files(done))
        fails.server.run("list runs", tmp_path)
    with read_only(tmp_path / "cache"):
        fails.server.run(RUN, tmp_path)
        fails(f"{RUN} --force", tmp_path, "the cache", "cannot be written", "Set MIMBENCH_CACHE")
        fails(f"{RUN} --seed 1", tmp_path, "the cache", "cannot be written", "Set MIMBENCH_CACHE")
    with read_only(tmp_path / "site"):
        fails(f"report --out {tmp_path / 'site'}", tmp_path, "the report cannot be written")
    assert_done(tmp_path, done)


# Data


def write_images(folder: Path) -> str:
    """Two classes of images, as --dataset takes them."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return f"--dataset imagefolder:{folder} --set recipe.batch_size=8"


def test_data_that_vanish_between_pretraining_and_evaluation(fails: Failed, tmp_path: Path) -> None:
    images, away = tmp_path / "images", tmp_path / "away"
    line = f"{RUN} {write_images(images)}"
    fails.server.run(line.replace("run", "pretrain", 1).replace("--protocol knn,linear", ""), tmp_path)
    (weights,) = tmp_path.glob("cache/pretrain/mae/*/model.safetensors")
    before = weights.stat().st_mtime_ns
    images.rename(away)
    fails(line, tmp_path, f"'{images}' does not exist")
    away.rename(images)
    fails.server.run(line, tmp_path)
    assert weights.stat().st_mtime_ns == before  # not trained again
    assert len(files(tmp_path)) == 2


class Vanishing:
    """A store that cannot be read any more after so many batches."""

    def __init__(self, store: object, batches: int) -> None:
        self.store, self.left = store, batches

    def __len__(self) -> int:
        return len(self.store)  # type: ignore[arg-type]

    def read(self, index: Tensor) -> object:
        self.left -= 1
        if self.left < 0:
            raise DataError("the images have gone")
        return self.store.read(index)  # type: ignore[attr-defined]


def test_data_that_vanish_within_an_epoch_cost_no_step(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, checkpoint_minutes=60)
    split = toy_split()
    gone = dataclasses.replace(split, store=Vanishing(split.store, 6))
    with pytest.raises(DataError, match="the images have gone"):
        train(Toy(), recipe, tmp_path, split=gone)
    assert [place.name for place in tmp_path.glob("step-*")] == ["step-000000006"]
    resumed, uninterrupted = Toy(), Toy()
    history = train(resumed, recipe, tmp_path)
    assert history.curve == train(uninterrupted, recipe).curve
    assert_same(resumed, uninterrupted)


# Clocks


def test_a_clock_that_is_set_back_confuses_nothing(
    server: Processes, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and records from the future are followed like others, and time is measured by another clock."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    ahead = time.time() + 10 * 365 * 86400
    for path in [*(tmp_path / "results").rglob("*"), *(tmp_path / "cache").rglob("*")]:
        os.utime(path, (ahead, ahead))
    for file in files(tmp_path):
        content = json.loads(file.read_text())
        file.write_text(file.read_text().replace(content["created"], "2036-01-01T00:00:00+00:00"))
        os.utime(file, (ahead, ahead))
    server.run(f"{RUN} --force --seed 0", tmp_path)
    rows = json.loads(server.run("query --json 'select id, created from latest'", tmp_path))
    assert {row["id"] for row in rows} == {file.stem for file in files(done)}
    assert not any(row["created"].startswith("2036") for row in rows)  # the newest is what was done last
    assert_done(tmp_path, done)

    monkeypatch.setattr(time, "time", lambda: -1e9)  # which nothing may use to measure
    history = train(Toy(), Recipe(budget="3s", epochs=2, batch_size=4, compile=False))
    assert 0 < history.seconds < 30
    assert history.steps == history.planned


# Memory


class Greedy(Toy):
    """Runs out of memory, once it has changed its own buffers, with more images at once than fit."""

    def __init__(self, fits: int, fault: Callable[[], BaseException], since: int = 0) -> None:
        super().__init__()
        self.fits, self.fault, self.since = fits, fault, since

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(x, y)
        if len(x) > self.fits and len(self.calls) >= self.since:
            raise self.fault()
        return outputs


def used_up() -> RuntimeError:
    """What torch raises where the machine's memory is used up."""
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 363741184 bytes. Error code 12 (Cannot allocate memory)"
    )


ON_GPU = functools.partial(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB.")
AUTO = dataclasses.replace(RECIPE, accumulate="auto")


@pytest.mark.parametrize("fault", [used_up, ON_GPU, MemoryError])
def test_a_batch_that_does_not_fit_is_split_when_asked(fault: Callable[[], BaseException]) -> None:
    model, in_parts = Greedy(2, fault), Toy()
    history = train(model, AUTO)
    expected = train(in_parts, dataclasses.replace(RECIPE, accumulate=4))
    assert_same(model, in_parts)  # nothing is left of the attempts
    assert history.curve == expected.curve
    assert history.parts == 4
    assert history.warnings == ["of 8 images of a batch no more than 2 images fitted into memory at once"]


def test_what_fits_is_left_whole() -> None:
    ours, theirs = Toy(), Toy()
    history = train(ours, AUTO)
    assert history.curve == train(theirs).curve
    assert_same(ours, theirs)
    assert (history.parts, history.warnings) == (0, [])


def test_parts_are_kept_when_training_goes_on(tmp_path: Path) -> None:
    """Memory that ran out at step 6 stays as it was found when a later step is resumed from."""
    recipe = dataclasses.replace(AUTO, checkpoint_minutes=60)
    uninterrupted, stopped, resumed = Greedy(4, used_up, 6), Greedy(4, used_up, 6), Toy()
    expected = train(uninterrupted, recipe)
    split = toy_split()
    with pytest.raises(DataError):
        train(stopped, recipe, tmp_path, split=dataclasses.replace(split, store=Vanishing(split.store, 10)))
    history = train(resumed, recipe, tmp_path)
    assert_same(resumed, uninterrupted)
    assert history.curve == expected.curve
    assert history.parts == expected.parts == 2
    assert history.warnings == expected.warnings


def test_otherwise_the_message_says_what_fits(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, checkpoint_minutes=60)
    with pytest.raises(
        OutOfMemory, match=r"in step 6 of .* with 8 images at once\. 2 images fit: .*accumulate=4"
    ):
        train(Greedy(2, used_up, 5), recipe, tmp_path)
    assert [place.name for place in tmp_path.glob("step-*")] == ["step-000000005"]
    resumed, uninterrupted = Toy(), Toy()  # with memory again
    train(resumed, recipe, tmp_path)
    train(uninterrupted, recipe)
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("recipe", [RECIPE, AUTO])
def test_where_nothing_fits_that_is_said(recipe: Recipe) -> None:
    with pytest.raises(OutOfMemory, match="Not even 2 images fit: take a smaller model"):
        train(Greedy(0, used_up), recipe)


def test_views_that_cannot_be_cut_are_not() -> None:
    class Whole(Greedy):
        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            return super().views(batch, generator) | {"kernel": torch.zeros(3)}

        def forward(self, x: Tensor, y: Tensor, kernel: Tensor) -> dict[str, Tensor]:
            return super().forward(x, y)

    with pytest.raises(OutOfMemory, match=r"smaller recipe\.batch_size: these views cannot be cut"):
        train(Whole(2, used_up), AUTO)


def test_another_fault_is_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        train(Greedy(2, lambda: RuntimeError("shapes do not match")), AUTO)


LIMITED = """
import resource, sys
import torch
import test_fit

class Large(test_fit.Toy):
    "Takes 64 MiB an image, of the 450 MiB that there are."

    limited = False

    def forward(self, x, y):
        if not self.limited:
            pages = int(open("/proc/self/statm").read().split()[0])
            limit = pages * resource.getpagesize() + 450 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            self.limited = True
        held = torch.empty(len(x), 2**26, dtype=torch.uint8)
        return super().forward(x, y)

history = test_fit.train(Large(), test_fit.dataclasses.replace(test_fit.RECIPE, accumulate=eval(sys.argv[1])))
print(history.parts, history.steps)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_machine_whose_memory_is_really_used_up() -> None:
    def limited(accumulate: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, accumulate]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)

    split = limited("'auto'")
    assert split.stdout == "2 20\n", split.stderr
    whole = limited("1")
    assert (
        "OutOfMemory: memory ran out in step 1 of pretraining, with 8 images at once. 4 images fit"
        in whole.stderr
    )
