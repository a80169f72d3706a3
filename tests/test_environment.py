"""The environment: facts that agree with their sources, nothing private, never a failure."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mimbench import environment as module
from mimbench import paths
from mimbench.environment import environment, git


def test_facts_agree_with_their_sources() -> None:
    facts = environment("cpu")
    assert facts["python"] == platform.python_version()
    # A package index drops the build's tag: "2.13.0" is installed, and calls itself "2.13.0+cu130".
    assert facts["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert facts["numpy"] == np.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"] == "cpu"
    assert 1 <= int(facts["cores"] or 0) <= (os.cpu_count() or 1)
    assert facts["cpu"]
    assert json.loads(json.dumps(facts)) == facts


def test_nothing_private_is_recorded() -> None:
    text = json.dumps([environment("cpu"), git()])
    for private in (
        socket.gethostname(),
        str(Path.home()),
        str(paths.PACKAGE.parent),
        f"/{getpass.getuser()}",
    ):
        assert private not in text


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from mimbench.environment import environment; f = environment();"
        "assert f['torch'] and f['threads'] is None;"
        "print([m for m in ('torch', 'numpy', 'duckdb') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_gpu_is_named_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "_ask", lambda *command: "NVIDIA H200, 570.1" if command[0] == "nvidia-smi" else None
    )
    facts = environment("cpu")
    assert (facts["gpu"], facts["driver"]) == ("NVIDIA H200", "570.1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_that_ran_is_named() -> None:
    facts = environment("cuda:0")
    assert facts["device"] == "cuda"
    assert facts["gpu"] == torch.cuda.get_device_name(0)
    assert facts["driver"]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    top = tmp_path / "clone"
    (top / "methods" / "mae").mkdir(parents=True)
    (top / "methods" / "mae" / "method.py").write_text("x = 1\n")
    _git(top, "init", "-q")
    _git(top, "add", ".")
    _git(top, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    monkeypatch.setattr(paths, "clone", lambda: top)
    return top


def _git(top: Path, *words: str) -> str:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(top), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout.strip()


def test_code_makes_a_clone_dirty_and_records_do_not(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = _git(clone, "rev-parse", "HEAD")
    assert git() == {"commit": commit, "dirty": False}
    (clone / "results").mkdir()
    (clone / "results" / "run.json").write_text("{}")
    assert git()["dirty"] is False
    (clone / "methods" / "mae" / "model.py").write_text("y = 1\n")
    assert git()["dirty"] is True
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # as inside a hook
    assert git()["commit"] == commit


def test_another_repository_around_the_code_is_not_taken_for_it(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "clone", lambda: clone / "methods")
    assert git() == {}


def test_without_a_clone_or_without_git_there_is_nothing_to_tell(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert git() == {}
    monkeypatch.setattr(paths, "clone", lambda: None)
    assert git() == {}


def test_kept_pages_do_not_hide_what_a_call_takes() -> None:
    """A training that ran before in the same process must not make everything after it look free."""
    code = (
        "import torch; from mimbench import machine; cpu = torch.device('cpu'); machine.keep_pages();"
        "del_me = [torch.ones(2**24) for _ in range(3)]; del del_me;"
        "print(machine.memory_growth(lambda: torch.ones(2**24), cpu)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "None":
        pytest.skip("this system does not say what memory a process has")
    assert int(done.stdout) >= 0.9 * 4 * 2**24
