"""Finding methods and protocols by reading their files: a folder or a file is its own registration.

Nothing is imported until ``load_method`` or ``load_protocol`` is called, so listing stays instant.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mimbench import foreign, paths
from mimbench.errors import ConfigError, UnknownName

FAMILIES = ("baseline", "published")  # besides those of the catalogue of papers, which are free text
CARD_MIB = 4  # of a method.toml
_KEYS: dict[str, type] = {  # of method.toml, besides its presets
    "title": str,
    "family": str,
    "protocols": list,
    "arxiv": str,
    "venue": str,
    "year": int,
    "code": str,
    "licence": str,
    "summary": str,
    "deviations": list,
    "one_process": str,
}


@dataclass(frozen=True)
class Card:
    """The identity of a method, read from its ``method.toml``."""

    slug: str
    folder: Path
    title: str
    family: str
    protocols: tuple[str, ...]
    arxiv: str = ""
    venue: str = ""
    year: int = 0
    code: str = ""
    licence: str = ""
    summary: str = ""
    deviations: tuple[str, ...] = ()
    one_process: str = ""  # why several processes cannot train it together, where they cannot
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def preset(self, name: str) -> dict[str, Any]:
        """The settings of a preset, as nested tables over the defaults of the method's ``Config``."""
        if name not in self.presets:
            raise UnknownName(f"preset of {self.slug}", name, self.presets)
        return self.presets[name]


@dataclass(frozen=True)
class ProtocolCard:
    """The identity of a protocol, read from its file without running it."""

    name: str
    file: Path
    version: int
    summary: str
    needs: tuple[str, ...]


def _read_card(file: Path) -> Card:
    try:
        table = tomllib.loads(foreign.read_text(file, CARD_MIB))
    except (OSError, ValueError, RecursionError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise ConfigError(f"{file} cannot be read: {reason}") from None
    slug = file.parent.name
    presets = table.pop("preset", {})
    if not isinstance(presets, dict) or not foreign.sound(presets):
        raise ConfigError(f"{file} has a preset that is no table of settings")
    for key, value in table.items():
        if key not in _KEYS:
            raise UnknownName(f"key in {file}", key, _KEYS)
        if type(value) is not _KEYS[key]:
            raise ConfigError(f"{file} has {key} = {value!r}, which should be of type {_KEYS[key].__name__}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{file} has {key} = {value!r}, which should be a list of texts")
    if not 0 <= table.get("year", 0) <= 9999:
        raise ConfigError(f"{file} has year = {table['year']}")
    for name, preset in presets.items():
        if not isinstance(preset, dict):
            raise ConfigError(f"{file} has preset.{name} = {preset!r}, which should be a table")
    for key in ("title", "family", "protocols"):
        if not table.get(key):
            raise ConfigError(f"{file} has no '{key}'")
    if not foreign.is_name(slug):
        raise ConfigError(f"{file.parent} is not a valid slug", "Use lower-case letters, digits and _")
    for key in ("protocols", "deviations"):
        table[key] = tuple(table.get(key, ()))
    return Card(slug=slug, folder=file.parent, presets=presets, **table)


@functools.cache
def methods() -> dict[str, Card]:
    """Every method found, by slug, in alphabetical order."""
    return {f.parent.name: _read_card(f) for f in sorted(paths.methods().glob("*/method.toml"))}


def method(slug: str) -> Card:
    """The card of one method; an unknown slug raises with the nearest known ones."""
    if slug not in methods():
        raise UnknownName("method", slug, methods())
    return methods()[slug]


def load_method(slug: str, part: str = "method") -> ModuleType:
    """The module ``method.py`` (or ``official.py``, ``model.py``) of a method's folder."""
    card = method(slug)
    if not (card.folder / f"{part}.py").is_file():
        raise ConfigError(f"{card.folder} has no {part}.py")
    return importlib.import_module(f"mimbench.methods.{slug}.{part}")


def _read_protocol(file: Path) -> ProtocolCard:
    constants: dict[str, Any] = {}
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in ("VERSION", "NEEDS"):
                    constants[name] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError) as fault:
        raise ConfigError(f"{file} cannot be read: {fault}") from None
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    if "VERSION" not in constants or "NEEDS" not in constants:
        raise ConfigError(f"{file} must state VERSION and NEEDS")
    return ProtocolCard(file.stem, file, constants["VERSION"], summary, tuple(constants["NEEDS"]))


@functools.cache
def protocols() -> dict[str, ProtocolCard]:
    """Every protocol found, by name, in alphabetical order."""
    return {f.stem: _read_protocol(f) for f in sorted(paths.protocols().glob("[a-z]*.py"))}


def protocol(name: str) -> ProtocolCard:
    """The card of one protocol; an unknown name raises with the nearest known ones."""
    if name not in protocols():
        raise UnknownName("protocol", name, protocols())
    return protocols()[name]


def load_protocol(name: str) -> ModuleType:
    """The module of a protocol."""
    protocol(name)
    return importlib.import_module(f"mimbench.protocols.{name}")


def method_code(slug: str) -> set[Path]:
    """``method.py`` and all that it imports from its own folder and from the harness's networks and augmentations.

    ``official.py`` is not among them, nor is what every method shares, such as the training loop.
    """
    shared = [paths.PACKAGE / name for name in ("models", "augment", "teacher.py")]
    found: set[Path] = set()
    ahead = [method(slug).folder / "method.py"]
    while ahead:
        source = ahead.pop()
        if source in found:
            continue
        found.add(source)
        ours: list[str] = []
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
                if node.level:
                    ahead += _files(source.parent, [node.module] if node.module else names)
                elif node.module:
                    ours += [node.module, *(f"{node.module}.{name}" for name in names)]
        inside = [name.removeprefix("mimbench.") for name in ours if name.startswith("mimbench.")]
        files = _files(paths.PACKAGE, inside)
        ahead += [file for file in files if any(file.is_relative_to(place) for place in shared)]
    return found


def _files(folder: Path, names: list[str]) -> list[Path]:
    """Where modules of these dotted names are, as seen from a folder; names of other things are left out."""
    stems = [folder.joinpath(*name.split(".")) for name in names]
    tries = [place for stem in stems for place in (stem.with_suffix(".py"), stem / "__init__.py")]
    return [place for place in tries if place.is_file()]


def code_hash(*places: Path) -> str:
    """A short hash of Python sources, blind to comments, docstrings and layout.

    A result made with another hash than today's is shown as stale.
    """
    files = [f for place in places for f in (place.rglob("*.py") if place.is_dir() else [place])]
    texts = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [s for s in body if not _is_text(s)] or [ast.Pass()]  # type: ignore[attr-defined]
        texts.append(file.name + ast.dump(tree))
    return hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()[:12]


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
