"""Where things are: in a clone, or in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def clone() -> Path | None:
    """The top of the clone that this package runs from, or None when installed as a wheel."""
    top = PACKAGE.parent.parent
    return top if (top / "methods").is_dir() and (top / "pyproject.toml").is_file() else None


def methods() -> Path:
    """The folder that holds one folder per method."""
    top = clone()
    return top / "methods" if top else PACKAGE / "methods"


def protocols() -> Path:
    """The folder that holds one file per protocol."""
    top = clone()
    return top / "protocols" if top else PACKAGE / "protocols"


def templates() -> Path:
    """The report's Jinja templates."""
    top = clone()
    return top / "site" / "templates" if top else PACKAGE / "templates"


def static() -> Path:
    """The report's style sheet and scripts."""
    top = clone()
    return top / "site" / "static" if top else PACKAGE / "static"


def papers() -> Path:
    """The folder that holds the catalogue of papers and the reported numbers of those without a method here."""
    return (clone() or PACKAGE) / "results"


def results() -> Path:
    """Records and database: ``MIMBENCH_RESULTS``, else the clone's ``results/``, else ``./results``."""
    if chosen := os.environ.get("MIMBENCH_RESULTS"):
        return Path(chosen).expanduser()
    return (clone() or Path.cwd()) / "results"


def site() -> Path:
    """Where ``mimbench report`` renders to."""
    return (clone() or Path.cwd()) / "site" / "_build"


def cache() -> Path:
    """Decoded data, checkpoints and features: ``MIMBENCH_CACHE``, else the user's cache folder."""
    if chosen := os.environ.get("MIMBENCH_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mimbench"


def data() -> Path | None:
    """The user's data folder (``MIMBENCH_DATA``), looked at before the cache and any download."""
    chosen = os.environ.get("MIMBENCH_DATA")
    return Path(chosen).expanduser() if chosen else None
