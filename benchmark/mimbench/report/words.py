"""Numbers, times and texts for reading."""

from __future__ import annotations

import json
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from mimbench import config
from mimbench.record import Record
from mimbench.visible import INVISIBLE as INVISIBLE  # pages show the codes of such characters

EPOCHS = "epochs"  # the rule of training of a recipe that says how many


def number(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A number for reading: percent with ``digits`` decimals, all else with four significant digits."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if unit == "%":
        return f"{value:.{digits}f}".replace("-", "−")
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")


def signed(value: float, unit: str = "", digits: int = 1) -> str:
    """A difference with its sign always shown."""
    return ("+" if value >= 0 else "") + number(value, unit, digits)


def ratio(value: float) -> str:
    """How many times something is another thing."""
    return f"{value:.1g}" if value < 0.1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def count(value: float) -> str:
    """60000 as 60,000."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,g}"


def short(value: float) -> str:
    """5,410,000 as 5.41 M."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{number(float(f'{value / size:.3g}'))} {sign}"
    return number(value)


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    for limit, size, unit, form in (
        (1, 1, "s", ".2f"),
        (10, 1, "s", ".1f"),
        (120, 1, "s", ".0f"),
        (600, 60, "min", ".1f"),
        (7200, 60, "min", ".0f"),
    ):
        if seconds < limit:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds / 3600:.1f} h"


def when(run: Record) -> datetime:
    """The moment at which a run was recorded, in UTC."""
    return datetime.fromisoformat(run.created).astimezone(UTC)


def day(moment: datetime) -> str:
    """21 November 2026."""
    return f"{moment.day} {moment:%B %Y}"


def effort(runs: Sequence[Record], seconds: bool = False) -> str:
    """What pretraining took, as a mean of ``runs``: the budget, epochs, images seen and, if asked for, wall time."""
    taken = [run.pretrain for run in runs]
    epochs, images, time = (
        statistics.mean(getattr(each, name) for each in taken) for name in ("epochs", "images", "seconds")
    )
    budget = runs[0].budget
    parts = [f"{epochs:.1f} epochs" if budget else f"{epochs:g} epochs"] if epochs else []
    parts += [f"{count(round(images))} images"] if images else []
    parts += [duration(time)] if seconds and time else []
    return (f"{view_name(budget)}: " if budget and parts else "") + ", ".join(parts)


def how(runs: Sequence[Record]) -> str:
    """The precision that runs were trained in and whether compiled; each where they differ."""
    modes = (f"{r.pretrain.precision}{', compiled' if r.pretrain.compiled else ''}" for r in runs)
    return " or ".join(dict.fromkeys(modes))


def view_name(view: str) -> str:
    """A view for reading."""
    images = re.fullmatch(r"(\d+)img", view)
    return (
        "by epochs" if view == EPOCHS else f"budget {count(int(images[1])) + ' images' if images else view}"
    )


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested tables as dotted names and printable values, in the order given."""
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, inner in value.items()
            for pair in flatten(inner, f"{name}.{key}" if name else str(key))
        ]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))]


def prose(docstring: str) -> list[list[str]]:
    """A docstring's paragraphs and list items, each as pieces of which every second was in ``code`` marks."""
    found = []
    for block in docstring.split("\n\n"):
        lines = textwrap.dedent(block).strip().splitlines()
        hanging = any(
            line.startswith(" ") for line in lines
        )  # then each line that is not indented opens an item
        items: list[str] = []
        for line in lines:
            if items and not (hanging and not line.startswith(" ")):
                items[-1] += f" {line.strip()}"
            else:
                items.append(" ".join(line.split()))
        found += [item.split("``") for item in items]
    return found


def page_name(text: str) -> str:
    """A file name without an ending, for any slug or id: short, safe on every system, and its own."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", text):
        return text
    return (
        f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:40] or 'x'}-{config.digest(text, length=8)}"
    )
