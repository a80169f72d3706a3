"""Texts as a terminal or a page may show them: what is invisible, or steers either, is shown by its code."""

from __future__ import annotations

# Control characters but for tab and newline, and those that turn the text around them.
_UNSEEN = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
INVISIBLE = {code: f"\\u{code:04x}" for code in _UNSEEN}
_BREAKS = {9: "\\t", 10: "\\n", 13: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def one_line(text: str, most: int = 2000) -> str:
    """A text on one line of at most ``most`` letters, whatever it holds; what is left out stood in its middle."""
    shown = text.translate(INVISIBLE | _BREAKS).encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= most else f"{shown[: most // 2]} ... {shown[-most // 2 :]}"


def printable(text: str) -> str:
    """A text that may have several lines, for a terminal."""
    return text.translate(INVISIBLE).encode("utf-8", "backslashreplace").decode()
