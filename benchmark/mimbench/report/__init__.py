"""The static site: records and reported numbers in, pages that open from the file system out.

Everything shown is computed here as plain data; the templates only place it. Nothing depends on the clock,
so the same records give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mimbench import database, export, foreign
from mimbench.errors import DataError, ResultsError
from mimbench.report.ledger import verdicts
from mimbench.report.pages import pages
from mimbench.report.source import load

__all__ = ["load", "pages", "report", "single_file", "verdicts"]

LISTING = ".mimbench-pages"  # what a former call wrote
LOCK = ".mimbench-lock"  # held by the process that writes
PART = ".mimbench-part"  # a file before it takes its place


def report(folder: Path, out: Path) -> Path:
    """Renders the records below ``folder`` into ``out`` and returns the path of its index.html.

    Files whose content would not change are left alone, and pages that a former call wrote for what is no
    longer recorded are removed. A page is there as it was or in full, whatever interrupts; a second process that
    renders to the same place waits. Raises ResultsError where ``out`` cannot be written.
    """
    import filelock

    source = load(folder)
    listing = out / LISTING
    written = {export.DATABASE}
    with _writing(out), contextlib.ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        for own in (LISTING, LOCK, PART):  # a site from elsewhere may have links in their places
            if (out / own).is_symlink():
                (out / own).unlink()
        within = {out}  # folders that no link leads out of
        stack.enter_context(filelock.FileLock(out / LOCK))
        former = _former(out)
        with listing.open("a", encoding="utf-8") as known:
            for path, content in pages(source):
                if path not in former:  # noted first, so that a call that is killed leaves no page unknown
                    known.write(f"{path}\n")
                    known.flush()
                place = (out / path).parent
                if place not in within and not _inside(place, out):
                    raise ResultsError(f"{place} leads elsewhere, so no page is written to it", "Remove it")
                within.add(place)
                _write(out / path, content, out / PART)
                written.add(path)
        database.publish(
            out / export.DATABASE, source.records, source.comparisons, source.catalogue, source.papers
        )
        for path in former - written:
            (out / path).unlink(missing_ok=True)
        _write(listing, "".join(f"{path}\n" for path in sorted(written)).encode(), out / PART)
    return out / "index.html"


def _former(out: Path) -> set[str]:
    """What a former call wrote and is still there; no more than lies below ``out``, whatever the listing says."""
    try:
        names = foreign.read_text(out / LISTING).split("\n")
    except (OSError, ValueError):
        return set()
    return {name for name in names if _is_page(out, name)}


def _inside(folder: Path, out: Path) -> bool:
    """Whether a folder is ``out`` or below it, wherever links lead."""
    return folder.resolve().is_relative_to(out.resolve())


def _is_page(out: Path, name: str) -> bool:
    try:
        foreign.below([name], out / LISTING)
        file = out / name
        return (file.is_file() or file.is_symlink()) and _inside(file.parent, out)
    except (OSError, ValueError, DataError):
        return False


def single_file(folder: Path, file: Path) -> Path:
    """Renders the front page into one ``file``, which asks for nothing else, and returns its path.

    Raises ResultsError where it cannot be written.
    """
    content = dict(pages(load(folder), alone=True))["index.html"]
    with _writing(file):
        _write(file, content, file.with_name(f".{file.name}.part"))
    return file


def _write(file: Path, content: bytes, part: Path) -> None:
    """Writes to ``part``, which the next call overwrites if this one is killed, and moves it to ``file``."""
    if not file.is_file() or file.read_bytes() != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise ResultsError(
            f"the report cannot be written to {out}: {fault.strerror}", "Choose another place"
        ) from None
