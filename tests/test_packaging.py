"""The wheel and the sdist hold what they should, and the command works from a wheel as it does in a clone."""

from __future__ import annotations

import ast
import configparser
import email
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mimbench
from mimbench import registry, reported

TOP = Path(__file__).parents[1]
PLACES = {  # folders of the clone and where the wheel has them
    "benchmark/mimbench": "mimbench",
    "methods": "mimbench/methods",
    "protocols": "mimbench/protocols",
    "site/templates": "mimbench/templates",
    "site/static": "mimbench/static",
    "results/reported": "mimbench/results/reported",
}
DISTRIBUTIONS = {"PIL": "pillow"}  # import names that are not the distribution's
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(source: Path, target: str, out: Path) -> Path:
    """Builds a wheel or an sdist as pip would, but in this environment: nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(TOP, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, as in site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


def python(*arguments: str, path: Path, cwd: Path) -> str:
    """What a fresh interpreter prints that finds mimbench in ``path`` and starts in ``cwd``."""
    environment = {k: v for k, v in os.environ.items() if k != "MIMBENCH_RESULTS"}
    environment |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names(wheel: Path) -> set[str]:
    """The files of a wheel but for its metadata."""
    with zipfile.ZipFile(wheel) as packed:
        return {name for name in packed.namelist() if ".dist-info/" not in name}


def in_clone() -> set[str]:
    """What the wheel should hold, read from the clone's folders."""
    found = set()
    for folder, place in PLACES.items():
        for file in (TOP / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("test_"):
                found.add(f"{place}/{file.relative_to(TOP / folder).as_posix()}")
    return found | {"mimbench/scaffold/test_method.py.txt", "mimbench/results/papers.csv"}


def test_the_wheel_holds_every_file_and_one_top_level_name(wheel: Path) -> None:
    assert names(wheel) == in_clone()
    with zipfile.ZipFile(wheel) as packed:
        tops = {name.partition("/")[0] for name in packed.namelist()}
    assert tops == {"mimbench", f"mimbench-{mimbench.__version__}.dist-info"}


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "data/digits.npz",
        "methods/__init__.py",
        "methods/mae/method.toml",
        "methods/mae/reported.csv",
        "methods/mae/README.md",
        "methods/mae/views.png",
        "protocols/knn.py",
        "scaffold/method.py.txt",
        "templates/index.html",
        "static/style.css",
        "reported.toml",
        "results/papers.csv",
    ],
)
def test_the_wheel_holds_what_is_not_code(wheel: Path, name: str) -> None:
    assert f"mimbench/{name}" in names(wheel)


def test_a_wheel_made_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    sdist = build(TOP, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    folders = {"benchmark", "methods", "protocols", "results", "site"}
    assert {p.name for p in source.iterdir() if p.is_dir()} == folders
    assert names(build(source, "wheel", tmp_path / "again")) == names(wheel)


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        info = f"mimbench-{mimbench.__version__}.dist-info"
        metadata = email.message_from_bytes(packed.read(f"{info}/METADATA"))
        scripts = configparser.ConfigParser()
        scripts.read_string(packed.read(f"{info}/entry_points.txt").decode())
    assert metadata["Version"] == mimbench.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert dict(scripts["console_scripts"]) == {"mimbench": "mimbench.cli:main"}


def test_the_wheel_lists_what_the_clone_lists(installed: Path, tmp_path: Path) -> None:
    for kind, here in (("methods", registry.methods()), ("protocols", registry.protocols())):
        listed = python("-m", "mimbench", "list", kind, "--json", path=installed, cwd=tmp_path)
        assert set(json.loads(listed)) == set(here)


def test_the_wheel_knows_the_papers_and_their_numbers(installed: Path, tmp_path: Path) -> None:
    code = "from mimbench import reported as r; print(len(r.catalogue()), len(r.read_all()))"
    here = f"{len(reported.catalogue())} {len(reported.read_all())}"
    assert python("-c", code, path=installed, cwd=tmp_path).strip() == here


def test_the_wheel_runs_records_here_and_reports(installed: Path, tmp_path: Path) -> None:
    run = ("run", "--method", "mae", "--protocol", "knn", "--set", "recipe.epochs=1", "--quiet", "--json")
    (made,) = json.loads(python("-m", "mimbench", *run, path=installed, cwd=tmp_path))
    assert (tmp_path / "results" / "runs" / "mae" / "knn" / f"{made['id']}.json").is_file()
    python("-m", "mimbench", "report", "--out", "site", path=installed, cwd=tmp_path)
    assert "mae" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "static" / "style.css").is_file()


def test_methods_and_protocols_are_found_where_they_lie(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json; from importlib.util import find_spec; from mimbench import methods, protocols;"
        "specs = find_spec('mimbench.methods.mae.method'), find_spec('mimbench.protocols.knn');"
        "print(json.dumps([methods.__path__[0], protocols.__path__[0], *(s.origin for s in specs)]))"
    )
    for path, folder in ((installed, installed / "mimbench"), (TOP / "benchmark", TOP)):
        found = json.loads(python("-c", code, path=path, cwd=tmp_path))
        there = ["methods", "protocols", "methods/mae/method.py", "protocols/knn.py"]
        assert [Path(f).resolve() for f in found] == [(folder / t).resolve() for t in there]


def test_what_is_imported_is_required() -> None:
    at_once, later = set(), set()
    for folder in ("benchmark/mimbench", "methods", "protocols"):
        for file in (TOP / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                imported = later if getattr(node, "col_offset", 0) else at_once
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported.add(str(node.module).partition(".")[0])

    def foreign(imported: set[str]) -> set[str]:
        names = imported - sys.stdlib_module_names - {"mimbench"}
        return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names}

    required = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    extra = {canonicalize_name(Requirement(text).name) for text in PROJECT["optional-dependencies"]["ray"]}
    assert foreign(at_once) <= required
    assert foreign(later) <= required | extra


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    lines = (TOP / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", pin), "a name and a version, no host"
    versions = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}
    assert len(versions) == len(pins)
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        assert versions[canonicalize_name(wanted.name)] in wanted.specifier, text
