"""Settings: names and types are checked, overrides are nested tables, and hashes follow content alone."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimbench import config
from mimbench.errors import ConfigError, UnknownName


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    steps: int = 3


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    inner: Inner = Inner(steps=9)


# build


def test_defaults_stay_where_nothing_is_given() -> None:
    assert config.build(Outer, {}) == Outer()


def test_a_nested_table_keeps_the_defaults_of_the_outer_class() -> None:
    assert config.build(Outer, {"inner": {"rate": 1.0}}).inner == Inner(rate=1.0, steps=9)


def test_an_override_leaves_its_instance_alone() -> None:
    before = Outer(name="y")
    after = config.override(before, {"inner": {"steps": 1}, "flag": True})
    assert before == Outer(name="y")
    assert after == Outer(name="y", flag=True, inner=Inner(steps=1))


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("pair", [1, 2], (1.0, 2.0)),
        ("many", [1, 2, 3], (1, 2, 3)),
        ("many", [], ()),
        ("kinds", ["b", "a"], ("b", "a")),
        ("limit", 4, 4),
        ("limit", "none", None),
        ("limit", None, None),
        ("kind", "b", "b"),
        ("inner", Inner(1.0, 1), Inner(1.0, 1)),
    ],
)
def test_values_take_the_type_of_their_field(field: str, given: Any, kept: Any) -> None:
    found = getattr(config.build(Outer, {field: given}), field)
    assert found == kept
    assert type(found) is type(kept)


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    found = config.build(Outer, {"inner": {"rate": 2}, "pair": [0, 1]})
    assert isinstance(found.inner.rate, float)
    assert all(isinstance(value, float) for value in found.pair)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": 3}, "name = 3 should be of type str"),
        ({"flag": 1}, "flag = 1 should be of type bool"),
        ({"kind": "c"}, "kind = 'c' is not one of 'a', 'b'"),
        ({"kinds": ["a", "c"]}, "kinds = 'c' is not one of"),
        ({"limit": 1.5}, "limit = 1.5 does not fit"),
        ({"limit": True}, "limit = True does not fit"),
        ({"limit": "some"}, "limit = 'some' does not fit"),
        ({"pair": [1, 2, 3]}, "pair = [1, 2, 3] should have 2 entries"),
        ({"pair": 1}, "pair = 1 should be a list"),
        ({"pair": "12"}, "pair = '12' should be a list"),
        ({"many": [1, 2.5]}, "many = 2.5 should be of type int"),
        ({"inner": {"steps": True}}, "inner.steps = True should be of type int"),
        ({"inner": {"rate": True}}, "inner.rate = True should be of type float"),
        ({"inner": {"rate": float("nan")}}, "inner.rate is not a number"),
        ({"inner": 3}, "inner = 3 should be of type Inner"),
        ({"name": {"a": 1}}, "name = {'a': 1} should be of type str"),
    ],
)
def test_values_of_another_type_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.build(Outer, table)
    assert message in str(caught.value)


def test_unknown_names_are_suggested_in_full() -> None:
    with pytest.raises(UnknownName, match=r"unknown setting of inner 'rat'\. Did you mean rate\?$"):
        config.build(Outer, {"inner": {"rat": 1.0}})
    with pytest.raises(UnknownName, match=r"of knn 'limi'\. Did you mean limit\?"):
        config.build(Outer, {"limi": 1}, "knn")
    with pytest.raises(UnknownName, match=r"Known: flag, inner, kind, kinds, limit, many, name, pair\.$"):
        config.build(Outer, {"zzzzzz": 1})


# parse_overrides and merge


@pytest.mark.parametrize(
    ("items", "table"),
    [
        (["a=1"], {"a": 1}),
        (["a=1.5", "b=true"], {"a": 1.5, "b": True}),
        (["a.b.c=1", "a.b.d=2"], {"a": {"b": {"c": 1, "d": 2}}}),
        (["a=[1, 2]"], {"a": [1, 2]}),
        (["a=text"], {"a": "text"}),
        (['a="3"'], {"a": "3"}),
        (["a=x=y"], {"a": "x=y"}),
        ([" a = 1 "], {"a": 1}),
        (["a="], {"a": ""}),
        (["a=1", "a=2"], {"a": 2}),
        (["a=1e-3"], {"a": 1e-3}),
        ([], {}),
    ],
)
def test_overrides_are_nested_tables(items: list[str], table: dict[str, Any]) -> None:
    assert config.parse_overrides(items) == table


@pytest.mark.parametrize("items", [["a"], ["=1"], [" =1"], ["a=1", "a.b=2"], ["a.b=2", "a=1"]])
def test_overrides_that_say_nothing_or_contradict(items: list[str]) -> None:
    with pytest.raises(ConfigError):
        config.parse_overrides(items)


keys = st.text("abcdef", min_size=1, max_size=3)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tables = st.dictionaries(keys, plain, max_size=3)
for _ in range(2):
    tables = st.dictionaries(keys, plain | tables, max_size=3)
scalars = st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(keys, scalars | st.lists(scalars, max_size=3)))
def test_what_toml_can_say_comes_through_as_it_was(table: dict[str, Any]) -> None:
    items = [f"{key}={json.dumps(value)}" for key, value in table.items()]
    assert config.parse_overrides(items) == table


def flat(table: dict[str, Any], *above: str) -> dict[tuple[str, ...], Any]:
    """Leaves by path; an empty table is a leaf."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in table.items():
        found |= flat(value, *above, key) if isinstance(value, dict) and value else {(*above, key): value}
    return found


@given(tables, tables)
def test_merging_keeps_what_is_not_overruled(base: dict[str, Any], over: dict[str, Any]) -> None:
    copies = json.dumps([base, over])
    merged = config.merge(base, over)
    assert json.dumps([base, over]) == copies
    leaves = flat(merged)
    above = flat(over)
    for path, value in above.items():
        assert leaves.get(path) == value or value == {}
    for path, value in flat(base).items():
        if not any(path[: len(p)] == p or p[: len(path)] == path for p in above):
            assert leaves[path] == value
    assert config.merge(base, {}) == base
    assert config.merge({}, over) == over
    assert config.merge(merged, over) == merged


# to_dict and digest

WHOLE = st.integers(1 - 2**63, 2**63 - 1)


@given(
    st.text(),
    st.booleans(),
    st.none() | WHOLE,
    st.lists(WHOLE),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_config_survives_its_table(
    name: str, flag: bool, limit: int | None, many: list[int], rate: float
) -> None:
    given_ = Outer(name, flag, "b", limit, (0.5, rate), tuple(many), ("b",), Inner(rate, 2))
    table = config.to_dict(given_)
    assert config.build(Outer, json.loads(json.dumps(table))) == given_
    assert config.digest(given_) == config.digest(table) == config.digest(dataclasses.asdict(given_))


@given(tables)
def test_digests_follow_content_and_not_order(table: dict[str, Any]) -> None:
    def reversed_(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reversed_(value[key]) for key in reversed(value)}
        return value

    assert config.digest(table) == config.digest(reversed_(table))
    assert config.digest(table) != config.digest(table | {"more": 1})
    assert config.digest(table) != config.digest(table, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 2), (2, 1)), (("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((None,), ("",)), ((1,), (1.0,)), ((True,), (1,))],
)  # fmt: skip
def test_digests_tell_apart(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert config.digest(*one) != config.digest(*other)


def test_digests_are_those_of_any_other_process_and_day() -> None:
    # Written down: another value would orphan every record and every checkpoint there is.
    assert config.digest("run", {"b": [1.5, None], "a": "ü"}) == "24d864621a06"
    code = "from mimbench import config; print(config.digest('run', {'a': 'ü', 'b': [1.5, None]}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == config.digest("run", {"b": [1.5, None], "a": "ü"})
    assert len(config.digest(1, length=24)) == 24


def test_what_json_cannot_hold_has_no_digest() -> None:
    with pytest.raises(TypeError, match="cannot hash a set"):
        config.digest({1, 2})
