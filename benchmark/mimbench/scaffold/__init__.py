"""``mimbench new method SLUG``: a folder that runs and passes the floor tests, ready to become the paper."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from mimbench import paths, registry
from mimbench.errors import ConfigError, MimbenchError
from mimbench.reported import COLUMNS

TEMPLATES = Path(__file__).parent


def new_method(slug: str, title: str, arxiv: str) -> list[Path]:
    """Writes ``methods/<slug>/`` and its test; returns the files. Numbers held in ``results/reported`` move there.

    Raises ConfigError for a slug or an arXiv id that is not one, and where the method exists already.
    """
    top = paths.clone()
    if top is None:
        raise MimbenchError("a new method needs a clone of the repository, not an installed wheel")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise ConfigError(f"'{slug}' is not a valid slug", "Use lower-case letters, digits and _")
    if not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise ConfigError(f"'{arxiv}' is not an arXiv id", "It looks like 2111.06377")
    folder = top / "methods" / slug
    if slug in registry.methods() or folder.exists():
        raise ConfigError(f"the method '{slug}' exists already", f"Edit {folder.relative_to(top)}")
    targets = {
        "method.py": folder / "method.py",
        "method.toml": folder / "method.toml",
        "official.py": folder / "official.py",
        "README.md": folder / "README.md",
        "test_method.py": top / "tests" / "methods" / f"test_{slug}.py",
    }
    quoted = title.replace("\\", "\\\\").replace('"', '\\"')
    for name, file in targets.items():
        text = Template((TEMPLATES / f"{name}.txt").read_text(encoding="utf-8"))
        shown = title if file.suffix == ".md" else quoted
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.substitute(slug=slug, title=shown, arxiv=arxiv), encoding="utf-8")
    numbers = folder / "reported.csv"
    held = top / "results" / "reported" / f"{slug}.csv"
    if held.is_file():  # what the paper reports was here before its method
        held.rename(numbers)
    else:
        numbers.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    registry.methods.cache_clear()
    return [*targets.values(), numbers]
