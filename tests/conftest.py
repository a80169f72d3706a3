"""Shared by all tests: torchvision importable, Ctrl-C as usual, nothing written outside the test's folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from mimbench.compat import torchvision

torchvision()

# The same inputs every time, however busy the machine.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

# A shell that starts the tests in the background has SIGINT ignored, and every process below inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MIMBENCH_RESULTS", str(tmp_path / "results"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real images, or a skip."""
    place = os.environ.get("MIMBENCH_DATA") or str(Path(__file__).parents[2] / "shared" / "data")
    if not (Path(place) / "cifar10").is_dir():
        pytest.skip("no real data: set MIMBENCH_DATA to a folder with cifar10/ and camvid/ as Parquet")
    return Path(place)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
