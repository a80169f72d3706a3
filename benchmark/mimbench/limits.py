"""Limits on what a piece of work may take of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

MIB = 2**20


@contextlib.contextmanager
def memory(most: int) -> Iterator[None]:
    """Inside, this process gets no more than ``most`` MiB of memory beyond what it has; asking for more fails.

    Where the system has no such limit (macOS, Windows), nothing is limited.
    """
    try:
        import resource

        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        bounds = [held + most * MIB, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
