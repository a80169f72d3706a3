"""Progress bars with rate and time left; plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from mimbench.visible import printable

T = TypeVar("T")


class Progress:
    """Draws on stderr, so that standard output stays clean for results."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.quiet = quiet

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, start: int = 0
    ) -> Generator[T, None, None]:
        """Yields ``items``, showing how many of ``total`` are done, the rate and the time left."""
        total = len(items) + start if total is None and isinstance(items, Sized) else total
        if self.quiet:
            yield from items
        elif self.console.is_terminal:
            yield from self._bar(items, label, total, start)
        else:
            yield from self._lines(items, label, total, start)

    def _bar(self, items: Iterable[T], label: str, total: int | None, start: int) -> Iterator[T]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            self._task = bars.add_task(label, total=total, completed=start, rate="", note="")
            self._bars: Bars | None = bars
            began = time.perf_counter()
            for done, item in enumerate(items, 1):
                yield item
                rate = done / max(time.perf_counter() - began, 1e-9)
                bars.update(self._task, advance=1, rate=f"{rate:.1f}/s")
            self._bars = None

    def _lines(self, items: Iterable[T], label: str, total: int | None, start: int) -> Iterator[T]:
        began = last = time.perf_counter()
        self._note = ""
        done = start
        for done, item in enumerate(items, start + 1):
            yield item
            now = time.perf_counter()
            if now - last > 10 and done != total:
                last = now
                rate = (done - start) / (now - began)
                left = f", {(total - done) / rate:.0f} s left" if total else ""
                self.say(f"{label}: {done}/{total or '?'} ({rate:.1f}/s{left}) {self._note}".rstrip())
        self.say(f"{label}: {done} done in {time.perf_counter() - began:.1f} s {self._note}".rstrip())

    def note(self, text: str) -> None:
        """Sets the text behind the current bar, such as the loss."""
        self._note = text
        if (bars := getattr(self, "_bars", None)) is not None:
            bars.update(self._task, note=text)

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def quiet() -> Progress:
    """A progress that shows nothing, for tests and for use as a library."""
    return Progress(quiet=True, console=Console(file=sys.stderr, quiet=True))
