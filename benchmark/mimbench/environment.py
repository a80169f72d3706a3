"""The machine and the code that a result came from. Records are published, so nothing here names a host,
a user or a folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from mimbench import paths

PACKAGES = ("mimbench", "torch", "torchvision", "timm", "numpy", "duckdb")
Facts = dict[str, str | int | float | bool | None]


def environment(device: str = "cpu") -> Facts:
    """Versions and hardware, flat; ``device`` ("cpu", "cuda", "cuda:1") is where the run's tensors were.

    What cannot be told is None. ``cuda`` and ``threads`` are asked of torch, and None until it is imported.
    """
    facts: Facts = {"python": platform.python_version()}
    facts |= {name: _version(name) for name in PACKAGES}
    facts |= {
        "os": f"{platform.system()} {_leading_digits(platform.release())}".strip(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": None,
        "memory_gib": _memory_gib(),
        "device": device.partition(":")[0],
        "gpu": None,
        "driver": None,
        "cuda": None,
    }
    if gpus := _nvidia_smi("name,driver_version"):
        facts["gpu"], _, facts["driver"] = (part.strip() for part in gpus[0].partition(","))
    if (torch := sys.modules.get("torch")) is not None:
        facts["threads"] = torch.get_num_threads()
        facts["cuda"] = torch.version.cuda
        if facts["device"] == "cuda":
            facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def git() -> Facts:
    """The clone's ``commit`` and whether its code is ``dirty``; empty in a wheel or where git cannot tell.

    Only folders that hold code count as dirty: each new record changes the clone too.
    """
    top = paths.clone()
    if top is None:
        return {}
    root = _ask("git", "-C", str(top), "rev-parse", "--show-toplevel")
    commit = _ask("git", "-C", str(top), "rev-parse", "HEAD")
    changes = _ask(
        *("git", "-C", str(top), "status", "--porcelain", "--"),
        *("benchmark", "methods", "protocols", "pyproject.toml"),
    )
    # A clone without its .git inside another repository must not take that one's commit for its own.
    if not root or not commit or changes is None or Path(root).resolve() != top.resolve():
        return {}
    return {"commit": commit, "dirty": bool(changes)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    """The processor's model name."""
    if sys.platform == "darwin":
        return _ask("sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or None


def _memory_gib() -> float | None:
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(getattr(os, "sysconf_names", ())):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _nvidia_smi(fields: str) -> list[str]:
    """One line of comma-separated fields per GPU."""
    answer = _ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return answer.splitlines() if answer else []


def _ask(*command: str) -> str | None:
    """What a command prints, or None when it is not there, fails or hangs: a record is worth more than this."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, env=clean, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return answer.stdout.strip()


def _leading_digits(release: str) -> str:
    """A kernel's version without the builder's suffix."""
    found = re.match(r"[\d.]*\d", release)
    return found[0] if found else ""
