"""Hostile texts, numbers, bytes and documents, drawn by a seeded generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

TEXTS = (
    *("", " ", "a", "0", "-1", "1e999", "NaN", "null", "none", "true", "[]", "{}", ".", "..", "/", "\\", "~"),
    *("../../x", "../" * 40 + "etc/passwd", "/etc/passwd", "/dev/zero", "a/b", "a\\b", "C:\\x", "CON", "nul"),
    *(
        "\x00",
        "a\x00b",
        "\x1b[31mred\x1b]0;title\x07",
        "\r\n",
        "a\nb",
        "\t",
        "\u202eevil",
        "\u2028",
        "\ufeff",
    ),
    *("<script>alert(1)</script>", "'", '"', "`", "\"'><img src=x onerror=alert(1)>", "javascript:alert(1)"),
    *("</title><script>", "{{ 7 * 7 }}", "{% raw %}", "%s%n", "{0.__class__}", "=1+1", "@SUM(1)", "-2+3"),
    *(
        "$(id)",
        "`id`",
        "; id",
        "| id",
        "&& id",
        "--help",
        "-h",
        "--",
        "@file",
        "*",
        "?",
        "key=",
        "=value",
        "a.b.c=1",
    ),
    *("é", "e\u0301", "𝔘", "שלום", "\U0001f600" * 50, "x" * 300, "x" * 5000, "١٢٣", "1_000", "0x10", "１２"),
)
NUMBERS: tuple[int | float, ...] = (
    *(0, 1, -1, 2, 7, 255, 256, 65536, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1),
    *(10**30, 10**400, -0.0, 0.1, -0.5, 1e-320, 5e-324, 1e15, 1e16, 1e308, -1e308, 99.999, 100.0, 1e-9),
)


def text(rng: Random) -> str:
    """A text that something may trip over."""
    if rng.random() < 0.75:
        return rng.choice(TEXTS)
    return "".join(rng.choice(TEXTS) for _ in range(rng.randint(2, 4)))[: rng.choice((20, 200, 2000))]


def number(rng: Random) -> int | float:
    """A number at the edge of what some type holds."""
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randint(-10, 1000) / rng.choice((1, 3, 10))


def value(rng: Random, depth: int = 2) -> Any:
    """Anything that JSON can hold; lone surrogates and infinities too, which it only just can."""
    kind = rng.randrange(10 if depth else 7)
    if kind < 2:
        return text(rng)
    if kind < 4:
        return number(rng)
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return rng.choice(("\ud800", "\udfff x", float("inf"), float("-inf"), float("nan")))
    if kind == 6:
        return rng.choice(([], {}, [[]], {"": {}}))
    if kind == 7:
        return [value(rng, depth - 1) for _ in range(rng.choice((1, 2, 3, 50)))]
    if kind == 8:
        return {text(rng): value(rng, depth - 1) for _ in range(rng.choice((1, 2, 5)))}
    nested: Any = 1
    for _ in range(rng.choice((5, 40, 90, 600))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def damage(rng: Random, content: bytes) -> bytes:
    """Bytes with a few of the damages that disks, transfers and attackers do."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not data:
            break
        start = rng.randrange(len(data))
        length = min(len(data) - start, rng.choice((1, 2, 4, 8, 64, 1000)))
        kind = rng.randrange(9)
        if kind == 0:  # cut off
            del data[start:]
        elif kind == 1:  # a bit
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 2:  # a hole
            del data[start : start + length]
        elif kind == 3:  # twice
            data[start:start] = data[start : start + length]
        elif kind == 4:  # noise
            data[start : start + length] = rng.randbytes(length)
        elif kind == 5:  # zeros
            data[start : start + length] = bytes(length)
        elif kind == 6:  # a length or a count at its edge
            size = rng.choice((1, 2, 4, 8))
            edge = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
            data[start : start + size] = edge.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 7:  # something appended
            data += rng.randbytes(length)
        else:  # two parts change places
            other = rng.randrange(len(data))
            data[start], data[other] = data[other], data[start]
    return bytes(data)


def change(rng: Random, document: Any, spared: Sequence[str] = ()) -> Any:
    """A JSON document with one thing changed somewhere; keys in ``spared`` stay as they are."""
    if isinstance(document, dict) and document and rng.random() < 0.85:
        keys = [key for key in document if key not in spared]
        if not keys:
            return document
        key = rng.choice(keys)
        kind = rng.random()
        if kind < 0.06:
            return {k: v for k, v in document.items() if k != key}
        if kind < 0.12:
            return {**document, text(rng): value(rng)}
        if kind < 0.16:
            return {text(rng) if k == key else k: v for k, v in document.items()}
        return {**document, key: change(rng, document[key], spared)}
    if isinstance(document, list) and document and rng.random() < 0.7:
        place = rng.randrange(len(document))
        if rng.random() < 0.1:
            return document[:place]
        if rng.random() < 0.1:
            return document * rng.choice((2, 100))
        return [*document[:place], change(rng, document[place], spared), *document[place + 1 :]]
    if type(document) in (int, float) and rng.random() < 0.7:
        return number(rng)
    if isinstance(document, str) and rng.random() < 0.7:
        return text(rng)
    return value(rng)


def nudge(rng: Random, document: Any, free: bool = False) -> Any:
    """A JSON document with one leaf changed to another of its kind; in ``free`` tables, which may hold anything,
    also with another key or a value of any kind that can be shown."""
    if isinstance(document, dict) and document:
        key = rng.choice(list(document))
        if free and rng.random() < 0.3:
            made = rng.choice(
                (text(rng), plain_number(rng), None, True, [], {}, [[text(rng)]], {text(rng): 1.5})
            )
            return {**document, rng.choice((text(rng), key)): made}
        if isinstance(document[key], float | int) and free and rng.random() < 0.2:
            return {text(rng) if k == key else k: v for k, v in document.items()}
        return {**document, key: nudge(rng, document[key], free or key in FREE)}
    if isinstance(document, list) and document:
        place = rng.randrange(len(document))
        kind = rng.random()
        if kind < 0.1:
            return document[:place]
        if kind < 0.2:
            return document * rng.choice((2, 30))
        return [*document[:place], nudge(rng, document[place], free), *document[place + 1 :]]
    if isinstance(document, bool):
        return not document
    if isinstance(document, int):
        return int(rng.choice((0, 1, -1, 7, 2**31, 2**53 + 1, 2**63 - 1, -(2**63))))
    if isinstance(document, float):
        return float(plain_number(rng))
    if isinstance(document, str):
        return text(rng)
    if document is None:
        return rng.choice((None, 1, 0.5, text(rng))) if free else None
    return document


FREE = (
    "config",
    "overrides",
    "settings",
    "details",
    "environment",
    "git",
    "seconds",
    "metrics",
    "skipped",
    "chosen",
)


def plain_number(rng: Random) -> int | float:
    """A number that 64 bits hold."""
    found = number(rng)
    return found if abs(found) < 2**63 else 1e300


def as_json(rng: Random, document: Any) -> str:
    """A document as JSON, which may hold what JSON does not have: NaN, 1e999, keys twice."""
    written = json.dumps(document, ensure_ascii=rng.random() < 0.7, skipkeys=True)
    if rng.random() < 0.05:
        written = written.replace("1", "1" * rng.choice((20, 400, 5000)), 1)
    if rng.random() < 0.05:
        written = written.replace("0.", rng.choice(("1e999", "1e-999", "-Infinity,", "0x1.")), 1)
    return written
