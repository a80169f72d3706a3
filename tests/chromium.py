"""The browser for tests and screenshots: Debian's Chromium, driven by Playwright, which downloads none of its own."""

from __future__ import annotations

import os
import shutil
from typing import Any

# As root and in a container; the rest keeps Chromium from asking its maker for anything.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def path() -> str | None:
    """The Chromium of this machine: ``MIMBENCH_CHROMIUM``, else what is installed, else None."""
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    return os.environ.get("MIMBENCH_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def launch(playwright: Any) -> Any:
    """A headless browser, to be closed by the caller."""
    return playwright.chromium.launch(executable_path=path(), args=FLAGS, headless=True)
