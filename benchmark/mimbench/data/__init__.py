"""Data sets by name or place.

Only the names are known at import; everything that needs torch is imported when it is first asked for, so
that ``mimbench --help`` and ``mimbench list datasets`` stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mimbench.data.names import catalogue

if TYPE_CHECKING:
    from mimbench.data.pipeline import prefetch
    from mimbench.data.sources import get, load, verify
    from mimbench.data.split import Batch, Dataset, InMemory, Split, Store

__all__ = [
    "Batch",
    "Dataset",
    "InMemory",
    "Split",
    "Store",
    "catalogue",
    "get",
    "load",
    "prefetch",
    "verify",
]

_HOME = {"prefetch": "pipeline", "get": "sources", "load": "sources", "verify": "sources"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mimbench.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mimbench.data.{_HOME.get(name, 'split')}"), name)
