"""The static site: records and reported numbers in, pages that open from the file system out.

Everything shown is computed here as plain data; the templates only place it. Nothing depends on the clock,
so the same records give the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mimbench import database, export
from mimbench.errors import ResultsError
from mimbench.report.ledger import verdicts
from mimbench.report.pages import pages
from mimbench.report.source import load

__all__ = ["load", "pages", "report", "single_file", "verdicts"]

LISTING = ".mimbench-pages"  # what a former call wrote


def report(folder: Path, out: Path) -> Path:
    """Renders the records below ``folder`` into ``out`` and returns the path of its index.html.

    Files whose content would not change are left alone, and pages that a former call wrote for what is no
    longer recorded are removed. Raises ResultsError where ``out`` cannot be written.
    """
    source = load(folder)
    listing = out / LISTING
    written = {export.DATABASE}
    with _writing(out):
        former = listing.read_text(encoding="utf-8").split("\n") if listing.is_file() else []
        for path, content in pages(source):
            _write(out / path, content)
            written.add(path)
        database.publish(
            out / export.DATABASE, source.records, source.comparisons, source.catalogue, source.papers
        )
        for path in set(former) - written - {""}:
            (out / path).unlink(missing_ok=True)
        _write(listing, "".join(f"{path}\n" for path in sorted(written)).encode())
    return out / "index.html"


def single_file(folder: Path, file: Path) -> Path:
    """Renders the front page into one ``file``, which asks for nothing else, and returns its path.

    Raises ResultsError where it cannot be written.
    """
    content = dict(pages(load(folder), alone=True))["index.html"]
    with _writing(file):
        _write(file, content)
    return file


def _write(file: Path, content: bytes) -> None:
    if not file.is_file() or file.read_bytes() != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise ResultsError(
            f"the report cannot be written to {out}: {fault.strerror}", "Choose another place"
        ) from None
