"""``sweep.toml``: which runs there should be and what a task may take. Read strictly: an unknown key is an error."""

from __future__ import annotations

import itertools
import json
import math
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mimbench import config, foreign, registry, runner
from mimbench.errors import ConfigError, UnknownName

ALL = "all"
SWEEP_MIB = 1  # the largest file that is read
MOST = 1000  # combinations of seeds and grid, as many as --seeds takes
DEVICES = ("cpu", "cuda")  # a table of defaults or runs may have one for each, with what is different there
KINDS = ("pretrain", "evaluate")  # of tasks; a protocol's name is an evaluation with resources of its own


@dataclass(frozen=True)
class Resources:
    """What one task is given."""

    cpus: int = 1  # cores, and threads of its process
    gpus: float = 1.0  # share of a GPU, where there are any
    memory_gib: float = 0.0  # kept free for it; 0: not counted

    def __post_init__(self) -> None:
        config.check(self, "resources", positive=("cpus",), not_negative=("gpus", "memory_gib"))
        if self.gpus > 1:
            raise ConfigError(
                f"resources.gpus = {self.gpus:g}, but a task uses one GPU",
                "Pretrain on several with torchrun first: the sweep finds what is pretrained",
            )


@dataclass(frozen=True)
class Runs:
    """One ``[[runs]]`` table: every method by every protocol under every seed and every point of the grid."""

    methods: str | tuple[str, ...] = ALL  # "all", or names as --method takes them
    protocols: str | tuple[str, ...] = ALL  # "all" that a method's card declares, or names with recipes
    recipes: dict = field(default_factory=dict)  # protocol = recipe, for "all"
    dataset: str = "digits"  # pretrained on
    eval_dataset: str | dict = ""  # evaluated on: for all protocols, or protocol = data
    preset: str | None = None
    seeds: int | tuple[int, ...] = 1  # how many from 0, or which
    budget: str | None = None  # 90s, 2m, 1.5h or 200000img instead of the preset's epochs
    set: dict = field(default_factory=dict)  # settings of the methods; of a protocol under its name
    grid: dict = field(default_factory=dict)  # setting = list of values: all combinations are run
    exclude: dict = field(default_factory=dict)  # method, protocol or "method/protocol" = reason
    per_method: dict = field(default_factory=dict)  # method = {dataset, eval_dataset, preset, budget, set}


EXCEPTIONS = ("dataset", "eval_dataset", "preset", "budget", "set")  # what per_method may change
TABLES = ("recipes", "set", "grid", "exclude", "per_method")  # merged with the defaults, not replaced


@dataclass(frozen=True)
class Sweep:
    """A file, with its defaults filled in."""

    name: str
    runs: tuple[Runs, ...]
    resources: Mapping[str, Resources]  # by kind of task, or by protocol
    retries: int = 2  # repetitions of a task that crashed; what a setting is at fault for is not repeated
    backoff: float = 5.0  # seconds before the first repetition, doubled before each further one
    device: str = "auto"  # auto: a GPU where there is one; cuda: nothing else will do

    def resources_of(self, kind: str, protocol: str = "") -> Resources:
        """What a task may take."""
        found = self.resources.get(protocol) or self.resources.get(kind, Resources())
        return replace(found, gpus=0.0) if self.device == "cpu" else found


@dataclass(frozen=True)
class Case:
    """One method under one protocol in one way, for all seeds: what becomes a request."""

    method: str
    protocol: str  # with its recipe, or "" where it is only pretrained
    dataset: str
    eval_dataset: str | None
    preset: str | None
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]  # key=value


@dataclass(frozen=True)
class LeftOut:
    """What the file leaves out on purpose, or what cannot be."""

    what: str  # method, protocol or method/protocol
    reason: str


def read(file: Path, device: str | None = None) -> Sweep:
    """The sweep in a file. Raises UnknownName and ConfigError that name the table.

    ``device`` replaces that of the file. What stands in a ``cuda`` or a ``cpu`` table of ``defaults``, ``[[runs]]`` or
    a method counts, on that device, before what stands beside it: one file serves a GPU and, smaller, a laptop.
    """
    try:
        table = tomllib.loads(foreign.read_text(file, SWEEP_MIB))
    except OSError as fault:
        raise ConfigError(f"{file} cannot be read: {fault.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{file} is nested too deep") from None
    except ValueError as fault:
        raise ConfigError(f"{file} is no TOML: {fault}") from None
    if not foreign.sound(table):
        raise ConfigError(f"{file} is nested too deep")
    allowed = {each.name for each in fields(Sweep)} | {"defaults"}
    for key in table:
        if key not in allowed:
            raise UnknownName(f"key in {file.name}", key, allowed)
    table |= {} if device is None else {"device": device}
    device = table.get("device", Sweep.device)
    if device not in ("auto", *DEVICES):
        raise ConfigError(f"device = {device!r} is not one of auto, cpu and cuda")
    kind = runner.choose_device("auto").type if device == "auto" else device
    defaults = _for_device(_table(table.pop("defaults", {}), "defaults"), kind, "defaults")
    blocks = table.pop("runs", [])
    if not isinstance(blocks, list) or not blocks:
        raise ConfigError(f"{file.name} has no [[runs]]", "Write at least one")
    runs = tuple(
        _runs(_for_device(_table(block, f"runs {n}"), kind, f"runs {n}"), defaults, f"runs {n}")
        for n, block in enumerate(blocks, 1)
    )
    resources = _resources(_table(table.pop("resources", {}), "resources"))
    plain = Sweep(table.pop("name", file.stem), runs, resources)
    sweep = config.override(plain, table)
    config.check(sweep, "sweep", not_negative=("retries", "backoff"))
    if not isinstance(sweep.name, str) or not re.fullmatch(r"[\w-]{1,80}", sweep.name):
        raise ConfigError(
            f"name = {sweep.name!r:.100} should be of at most 80 letters, digits, - and _",
            "It names a folder",
        )
    return sweep


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} = {value!r:.60} should be a table")
    return value


def _for_device(table: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """A table without its tables for devices, of which it takes over one."""
    own = {device: _table(table.get(device, {}), f"{where}.{device}") for device in DEVICES}
    rest = {key: value for key, value in table.items() if key not in DEVICES}
    if "per_method" in rest:
        exceptions = _table(rest["per_method"], f"{where}.per_method")
        rest["per_method"] = {
            name: _for_device(_table(values, place := f"{where}.per_method.{name}"), kind, place)
            for name, values in exceptions.items()
        }
    known = typing.get_type_hints(Runs)
    for device, values in own.items():
        for key in values:
            if key not in known:
                raise UnknownName(f"key of {where}.{device}", key, known)
    return _over(rest, own[kind], where, f"{where}.{kind}")


def _over(below: dict[str, Any], above: dict[str, Any], *where: str) -> dict[str, Any]:
    """Two tables as one, in which the second's values count; tables of settings are merged."""
    together = below | above
    for key in TABLES:
        if key in below and key in above:
            both = _table(below[key], f"{where[0]}.{key}"), _table(above[key], f"{where[1]}.{key}")
            together[key] = config.merge(*both)
    return together


def _resources(table: dict[str, Any]) -> dict[str, Resources]:
    known = {*KINDS, *registry.protocols()}
    found = {}
    for name, values in table.items():
        if name not in known:
            raise UnknownName("kind of task in resources", name, known)
        found[name] = config.build(Resources, _table(values, f"resources.{name}"), f"resources.{name}")
    return found


def _runs(table: dict[str, Any], defaults: dict[str, Any], where: str) -> Runs:
    hints = typing.get_type_hints(Runs)
    for source, place in ((defaults, "defaults"), (table, where)):
        for key in source:
            if key not in hints:
                raise UnknownName(f"key of {place}", key, hints)
    together = _over(defaults, table, "defaults", where)
    runs = config.build(Runs, together, where)
    for name, values in runs.per_method.items():
        registry.method(name.partition(":")[0])
        for key in _table(values, f"{where}.per_method.{name}"):
            if key not in EXCEPTIONS:
                raise UnknownName(f"key of {where}.per_method.{name}", key, EXCEPTIONS)
        config.build(Runs, values, f"{where}.per_method.{name}")
    seeds = runs.seeds if isinstance(runs.seeds, tuple) else (runs.seeds - 1,)
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"{where}.seeds = {runs.seeds} should be how many, or a list of seeds from 0")
    for name, values in runs.grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.grid.{name} = {values!r:.60} should be a list of values")
    count = len(seeds) if isinstance(runs.seeds, tuple) else runs.seeds
    count *= math.prod(len(values) for values in runs.grid.values())
    if count > MOST:
        raise ConfigError(
            f"{where} asks for {count:,} combinations of seeds and grid by each method, more than {MOST:,}",
            "Take fewer",
        )
    for name, reason in runs.exclude.items():
        _check_exclusion(name, reason, where)
    for name, recipe in runs.recipes.items():
        registry.protocol(name)
        if not isinstance(recipe, str):
            raise ConfigError(f"{where}.recipes.{name} = {recipe!r} should be the name of a recipe")
    if isinstance(runs.eval_dataset, dict):
        for name, place in runs.eval_dataset.items():
            registry.protocol(name)
            if not isinstance(place, str):
                raise ConfigError(f"{where}.eval_dataset.{name} = {place!r} should be the name of a data set")
    return runs


def _check_exclusion(name: str, reason: Any, where: str) -> None:
    known = {*registry.methods(), *registry.protocols()}
    for part in name.split("/"):
        if part.partition(":")[0] not in known:
            raise UnknownName(f"method or protocol in {where}.exclude", part, known)
    if not isinstance(reason, str) or not reason.strip():
        raise ConfigError(
            f"{where}.exclude leaves out {name} without a reason", f'Write {name} = "because ..."'
        )


def cases(runs: Runs) -> tuple[list[Case], list[LeftOut]]:
    """All that a ``[[runs]]`` table asks for, and what it leaves out with the reasons.

    "all" means all that fit: with "all" protocols those of each card, with "all" methods those whose card has the
    protocol. Where both are named, a card that lacks the protocol is an error later on.
    """
    everything = runs.methods == ALL or runs.protocols == ALL
    found: list[Case] = []
    left_out = [LeftOut(name, reason) for name, reason in runs.exclude.items()]
    for method in _names(runs.methods, registry.methods()):
        slug = method.partition(":")[0]
        card = registry.method(slug)
        if slug in runs.exclude or method in runs.exclude:
            continue
        for protocol in _protocols(runs, card):
            name = protocol.partition(":")[0]
            if name in runs.exclude or f"{slug}/{name}" in runs.exclude:
                continue
            if protocol and everything and name not in card.protocols:
                left_out.append(LeftOut(f"{slug}/{name}", "not among the protocols of the method's card"))
                continue
            found += _cases(runs, method, protocol)
    return found, left_out


def _names(value: str | tuple[str, ...], everything: Mapping[str, Any]) -> tuple[str, ...]:
    if value == ALL:
        return tuple(everything)
    return (value,) if isinstance(value, str) else value


def _protocols(runs: Runs, card: registry.Card) -> tuple[str, ...]:
    """Protocols with recipes; one empty name where methods are only pretrained."""
    if runs.protocols != ALL:
        return _names(runs.protocols, {}) or ("",)
    return tuple(f"{p}:{runs.recipes[p]}" if p in runs.recipes else p for p in card.protocols)


def _cases(runs: Runs, method: str, protocol: str) -> Iterator[Case]:
    exceptions = runs.per_method.get(method) or runs.per_method.get(method.partition(":")[0], {})
    changed: Runs = config.override(runs, {k: v for k, v in exceptions.items() if k != "set"})
    place = changed.eval_dataset
    if isinstance(place, dict):
        place = place.get(protocol.partition(":")[0], "")
    seeds = tuple(range(changed.seeds)) if isinstance(changed.seeds, int) else changed.seeds
    settings = config.merge(runs.set, exceptions.get("set", {}))
    axes = [[(name, value) for value in values] for name, values in runs.grid.items()]
    others = {name for name in registry.protocols() if name != protocol.partition(":")[0]}
    for point in itertools.product(*axes):
        overrides = flat(settings) | dict(point)
        if changed.budget:
            overrides["recipe.budget"] = changed.budget
        items = tuple(as_item(k, v) for k, v in overrides.items() if k.partition(".")[0] not in others)
        yield Case(
            *(method, protocol, changed.dataset, str(place) or None, changed.preset, seeds),
            overrides=items,
        )


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def as_item(key: str, value: Any) -> str:
    """A setting as ``--set`` takes it: the shortest text that is read back as the same value."""
    if isinstance(value, str):
        bare = f"{key}={value}"
        if flat(config.parse_overrides([bare])) == {key: value}:
            return bare
    return f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(
        value, str
    ):  # as JSON, but that knows no \u escape for a character beyond 16 bits, and no DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    raise ConfigError(f"{value!r} is no setting", "Write a number, a text, true, false or a list")
