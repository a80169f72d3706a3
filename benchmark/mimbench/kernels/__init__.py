"""Small C kernels, compiled on the machine that runs them, where it has a compiler.

Each has a path in torch beside it that gives the same results, so nothing here ever fails: without a compiler,
or when anything goes wrong, ``load`` says None.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from mimbench import config, paths

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
PATIENCE = 120  # seconds


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library made of ``kernels/<name>.c``, or None. Compiled once per source, compiler and processor."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.c")
    try:
        about = subprocess.run([compiler, "--version"], capture_output=True, timeout=PATIENCE, check=True)
        made_from = [source.read_text(), about.stdout.decode(errors="replace"), FLAGS, _processor()]
        library = paths.cache() / "kernels" / f"{name}-{config.digest(made_from)}.so"
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                made = Path(scratch) / library.name  # renamed when whole: other processes may be at it too
                command = [compiler, *FLAGS, str(source), "-o", str(made), "-lm"]
                subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
                made.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> list[str]:
    """What the compiler's ``native`` depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    return [platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(wanted)})]
