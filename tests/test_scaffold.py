"""``mimbench new method``: what it writes is a method like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimbench import paths, registry, scaffold
from mimbench.errors import ConfigError, MimbenchError

TOP = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the clone, without what is ignored."""
    top = tmp_path / "clone"
    ignored = shutil.ignore_patterns("__pycache__", "_build", ".*_cache", ".hypothesis")
    for name in ("benchmark", "methods", "protocols", "site", "tests"):
        shutil.copytree(TOP / name, top / name, ignore=ignored)
    shutil.copy(TOP / "pyproject.toml", top)
    return top


def python(clone: Path, *words: str) -> str:
    """Runs Python in a clone of its own; gives what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(clone / "benchmark")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_method_passes_the_tests_of_every_method(clone: Path) -> None:
    title = r'Learning "it" \ twice'
    printed = python(
        clone, "-m", "mimbench", "new", "method", "demo_x", "--title", title, "--arxiv", "2101.00001"
    )
    files = [Path(line) for line in printed.splitlines()]
    assert clone / "methods" / "demo_x" / "method.py" in files
    assert clone / "tests" / "methods" / "test_demo_x.py" in files
    assert all(file.is_file() and "$" not in file.read_text() for file in files)
    assert (clone / "methods" / "demo_x" / "README.md").read_text().startswith(f"# {title}\n")
    listed = json.loads(python(clone, "-m", "mimbench", "list", "methods", "--json"))
    assert listed["demo_x"]["title"] == title

    passed = python(
        clone, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods", "-k", "demo_x",
    )  # fmt: skip
    floor = sum(
        line.startswith("def test_")
        for line in (TOP / "tests" / "methods" / "test_every_method.py").read_text().splitlines()
    )
    by_protocol = len(registry.method("mae").protocols) - 1  # one of the tests runs once for each
    assert f"{floor + by_protocol + 1} passed" in passed
    style = python(clone, "-m", "ruff", "check", "methods/demo_x", "tests/methods/test_demo_x.py")
    assert "All checks passed" in style


def test_numbers_that_were_held_of_the_paper_move_into_its_folder(clone: Path) -> None:
    held = clone / "results" / "reported" / "demo_y.csv"
    held.parent.mkdir(parents=True)
    held.write_text("method,protocol\n")
    python(clone, "-m", "mimbench", "new", "method", "demo_y", "--title", "T", "--arxiv", "2101.00001")
    assert (clone / "methods" / "demo_y" / "reported.csv").read_text() == "method,protocol\n"
    assert not held.exists()


def test_nothing_is_overwritten_and_odd_names_are_refused(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "clone", lambda: clone)
    before = (clone / "methods" / "mae" / "method.py").read_text()
    with pytest.raises(ConfigError, match=r"'mae' exists already"):
        scaffold.new_method("mae", "T", "2101.00001")
    assert (clone / "methods" / "mae" / "method.py").read_text() == before
    for slug in ("Demo", "demo-x", "1demo", "../demo", ""):
        with pytest.raises(ConfigError, match="not a valid slug"):
            scaffold.new_method(slug, "T", "2101.00001")
    for arxiv in ("2101", "arXiv:2101.00001", ""):
        with pytest.raises(ConfigError, match="not an arXiv id"):
            scaffold.new_method("demo_x", "T", arxiv)
    assert set(os.listdir(clone / "methods")) == {*registry.methods()}


def test_an_installed_wheel_has_no_place_for_new_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "clone", lambda: None)
    with pytest.raises(MimbenchError, match="needs a clone"):
        scaffold.new_method("demo_x", "T", "2101.00001")
