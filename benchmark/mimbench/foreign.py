"""What comes from elsewhere: texts, names, JSON and sizes are looked at before anything is made of them."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mimbench.errors import DataError

MIB = 2**20
JSON_MIB = 64  # the largest JSON file that is read
DEPTH = 40  # how deep tables and lists may be nested
LONGEST_PATH = 1000  # letters; each part of it has up to 255 bytes, as file systems take no more
WHOLE = 2**63  # whole numbers reach up to there, as 64 bits hold them
_NAME = re.compile(r"[a-z][a-z0-9_]{0,79}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def is_name(text: object) -> bool:
    """Whether a text can name a method or a protocol, and so a folder or a module: ``[a-z][a-z0-9_]*``."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def read_text(file: Path, most: int = JSON_MIB) -> str:
    """A text file of at most ``most`` MiB.

    Raises OSError where it cannot be read or is a pipe, a device or too large, and UnicodeDecodeError (which is a
    ValueError) where it is no text.
    """
    state = file.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(0, "it is no file", str(file))
    if state.st_size > most * MIB:
        raise OSError(
            0, f"it has {state.st_size / MIB:,.0f} MiB, of which {most} are read at most", str(file)
        )
    return file.read_text(encoding="utf-8")


def decode_json(text: str) -> Any:
    """The content of a JSON text, strictly: what comes back can be written again, hashed, counted and shown.

    Raises ValueError for what is no JSON, for NaN and infinities (``1e999`` is one), whole numbers beyond 64 bits,
    halves of characters, and nesting deeper than Python can follow. ``sound`` bounds it for parts of any shape.
    """

    def refuse(name: str) -> float:
        raise ValueError(f"it holds {name}")

    def whole(digits: str) -> int:
        value = int(digits) if len(digits) < 21 else WHOLE
        if not -WHOLE <= value < WHOLE:
            raise ValueError(f"it holds a number of {len(digits)} digits, which 64 bits do not hold")
        return value

    def decimal(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:20])

    try:
        content = json.loads(text, parse_constant=refuse, parse_int=whole, parse_float=decimal)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None
    return content


def sound(value: Any) -> bool:
    """Whether a part of a JSON document, of whatever shape, is nested no deeper than ``DEPTH``."""
    ahead = [(value, 0)]
    while ahead:
        held, depth = ahead.pop()
        if depth > DEPTH:
            return False
        if isinstance(held, dict):
            held = list(held.values())
        if isinstance(held, list):
            ahead += [(item, depth + 1) for item in held if isinstance(item, dict | list)]
    return True


def is_moment(text: str) -> bool:
    """Whether a text is an ISO time with its zone, and within the years that every zone has."""
    try:
        moment = datetime.fromisoformat(text)
        moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return False
    return moment.utcoffset() is not None


def below(names: Iterable[str], listing: Path) -> None:
    """Raises DataError where one of the ``names`` that ``listing`` holds does not stay within its folder."""
    for name in names:
        parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
        absolute = name.startswith(("/", "\\")) or bool(PureWindowsPath(name).drive)
        long = len(name) > LONGEST_PATH or any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
        if absolute or long or ".." in parts or "\0" in name:
            raise DataError(
                f"{listing} names '{name}', which does not lie in its folder", "Get the data again"
            )
