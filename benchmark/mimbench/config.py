"""Frozen dataclasses from presets and ``--set key=value``, checked by name and type, and hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from mimbench.errors import ConfigError, UnknownName

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass ``cls`` with ``values`` over its defaults.

    Nested tables fill nested dataclasses, keeping the defaults that the outer class gives them.
    Raises UnknownName for a field that does not exist and ConfigError for a value of another type.
    """
    return override(cls(), values, where)


def override(instance: T, values: Mapping[str, Any], where: str = "") -> T:
    """A copy of a dataclass instance with some fields replaced; ``where`` prefixes names in errors."""
    hints = typing.get_type_hints(type(instance))
    changes = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if name not in hints:
            raise UnknownName(f"setting of {where}" if where else "setting", name, hints)
        current = getattr(instance, name)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            changes[name] = override(current, value, path)
        else:
            changes[name] = _coerce(value, hints[name], path)
    return dataclasses.replace(instance, **changes)  # type: ignore[type-var]


def _coerce(value: Any, kind: Any, path: str) -> Any:
    """``value`` as ``kind``: int to float, list to tuple, members of unions and literals; else ConfigError."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        options = typing.get_args(kind)
        if value in options:
            return value
        raise ConfigError(f"{path} = {value!r} is not one of {', '.join(map(repr, options))}")
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(kind)
        if type(None) in members and (value is None or value == "none"):
            return None
        for member in members:
            if member is type(None):
                continue
            try:
                return _coerce(value, member, path)
            except ConfigError:
                continue
        raise ConfigError(f"{path} = {value!r} does not fit {kind}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} = {value!r} should be a list")
        members = typing.get_args(kind)
        if len(members) == 2 and members[1] is Ellipsis:
            members = (members[0],) * len(value)
        if len(members) != len(value):
            raise ConfigError(f"{path} = {value!r} should have {len(members)} entries")
        return tuple(_coerce(v, m, path) for v, m in zip(value, members, strict=True))
    if type(value) is int and abs(value) >= 2**63:
        raise ConfigError(f"{path} is a number of {value.bit_length()} bits, more than the 64 that there are")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {'not a number' if math.isnan(value) else 'infinite'}")
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path} = {value!r} should be of type {getattr(kind, '__name__', kind)}")


def check(
    instance: Any,
    where: str,
    *,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    share: Iterable[str] = (),
    filled: Iterable[str] = (),
) -> None:
    """Raises ConfigError for the first field out of its range; None passes, and a list is checked entry by entry.

    ``share`` is from 0 to 1, ``filled`` a list that may not be empty. For ``__post_init__``, so that a wrong
    setting is refused before any work.
    """
    rules: tuple[tuple[Iterable[str], Callable[[float], bool], str], ...] = (
        (positive, lambda value: 0 < value < math.inf, "above 0"),
        (not_negative, lambda value: 0 <= value < math.inf, "0 or more"),
        (share, lambda value: 0 <= value <= 1, "from 0 to 1"),
    )
    for names, fits, range_ in rules:
        for name in names:
            value = getattr(instance, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(fits(v) for v in values):
                shown = list(value) if isinstance(value, tuple) else value
                raise ConfigError(f"{where}.{name} = {shown} should be {range_}")
    for name in filled:
        if not getattr(instance, name):
            raise ConfigError(f"{where}.{name} is an empty list", "Give at least one value")


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["recipe.epochs=10", "pool=mean"]`` as nested tables. Values are TOML; what is not is a string."""
    nested: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"'{item}' is not of the form key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (
            ValueError,
            RecursionError,
        ):  # it is no TOML, or a number of too many digits, or nested too deep
            value = text.strip()
        table = nested
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"'{key}' is set both as a value and as a table")
        if isinstance(table.get(leaf), dict):
            raise ConfigError(f"'{key}' is set both as a value and as a table")
        table[leaf] = value
    return nested


def first_key(item: str) -> str:
    """The outermost name that ``"recipe.epochs=10"`` changes."""
    return item.partition("=")[0].partition(".")[0].strip()


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables merged key by key; ``over`` wins."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def to_dict(instance: Any) -> dict[str, Any]:
    """A dataclass as plain tables and lists, as it is written into a record."""
    return json.loads(json.dumps(dataclasses.asdict(instance)))


def digest(*parts: Any, length: int = 12) -> str:
    """A short hash of anything that JSON can hold; equal content gives equal hashes on any machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"cannot hash a {type(value).__name__}")
