"""Takes the pictures of docs/ from the clone's records: the front page, a method's page, and the front page on a phone.

``make screenshots`` runs this. It renders into a temporary folder; only the pictures are kept.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import chromium
from PIL import Image

from mimbench import paths, report
from mimbench.errors import MimbenchError
from mimbench.record import scan

WIDE, PHONE = (1280, 1280), (390, 1300)  # in CSS pixels


def main() -> None:
    top = paths.clone()
    if top is None or chromium.path() is None:
        sys.exit("error: this needs a clone, and Chromium: apt install chromium, or set MIMBENCH_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        index = report.report(paths.results(), Path(folder))
        shots = {
            "leaderboard.png": (index, WIDE),
            "method.png": (index.parent / "methods" / f"{most_run()}.html", WIDE),
            "phone.png": (index, PHONE),
        }
        with sync_playwright() as driver:
            browser = chromium.launch(driver)
            for name, (page, size) in shots.items():
                file = top / "docs" / name
                file.write_bytes(small(shot(browser, page, size)))
                print(f"{file.relative_to(top)}: {file.stat().st_size / 1024:.0f} KiB")
            browser.close()


def most_run() -> str:
    """The method whose page has most to show."""
    slugs = [run.method.slug for run in scan(paths.results())[0]]
    return max(sorted(set(slugs)), key=slugs.count, default="mae")


def shot(browser: Any, page: Path, size: tuple[int, int]) -> bytes:
    """What a window of ``size`` shows of a page, as PNG."""
    window = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme="light")
    window.goto(page.as_uri())
    picture: bytes = window.screenshot()
    window.close()
    return picture


def small(png: bytes) -> bytes:
    """The same picture in 256 colours, which a page of text does not exceed by much."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    try:
        main()
    except MimbenchError as fault:
        sys.exit(f"error: {fault}")
