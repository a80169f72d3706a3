"""Importing torchvision beside any build of torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import types
from pathlib import Path
from typing import Any

_declared: list[Any] = []  # a library's definitions live as long as the object


@functools.cache
def torchvision() -> types.ModuleType:
    """torchvision, imported so that its compiled half may be missing.

    The index's torchvision is compiled against a CUDA build of torch. Beside a CPU-only torch its library
    does not load, and the import then fails on the operators (non-maximum suppression) that the package
    registers shape rules for. Nothing here uses them; declaring them first lets the rest work.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed")
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C*.so"))))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "FRAGMENT")
        rules = Path(spec.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
        for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', rules):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _declared.append(library)
    return importlib.import_module("torchvision")
