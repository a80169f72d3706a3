"""Readers of what comes from elsewhere, on inputs that hypothesis draws: what is sound comes back, all else is refused.

``tests/fuzz`` damages whole files; here it is the small readers below them.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_record import make_record

from mimbench import config, foreign, record
from mimbench.data import labels, sources
from mimbench.errors import DataError, MimbenchError, ResultsError
from mimbench.sweep import file as sweep_file

# The same inputs in each run; slow machines are no fault.
drawn = settings(max_examples=150)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TABLES = st.dictionaries(st.text(max_size=8), JSON, max_size=3)
# Texts that may lead somewhere as a path, and those that name something.
NAMES = st.lists(
    st.sampled_from(["..", ".", "/", "\\", "a", "b_1", "C:", "~", "\0", " ", "é", "\n", "a" * 90]), max_size=6
).map("".join) | st.text(max_size=12)


def sound(text: str) -> str:
    """The one line of an error."""
    assert "\n" not in text
    assert text.endswith(("?", "."))
    return text


# Records


@drawn
@given(details=TABLES, overrides=TABLES, found=st.dictionaries(st.text(max_size=8), LEAVES, max_size=3))
def test_a_record_comes_back_whatever_its_free_parts_hold(
    details: dict[str, Any], overrides: dict[str, Any], found: dict[str, Any]
) -> None:
    made = make_record(details=details, overrides=overrides, environment=found)
    text = record.dumps(made)
    again = record.loads(text, "it")
    assert again == made
    assert record.dumps(again) == text


@drawn
@given(place=st.lists(st.integers(0, 40), min_size=1, max_size=4), value=JSON)
def test_a_record_with_one_part_changed_is_read_or_refused_in_a_line(place: list[int], value: Any) -> None:
    document = json.loads(record.dumps(make_record()))
    held = document
    *outer, last = place
    for step in outer:
        inner = [item for item in held.values() if isinstance(item, dict) and item]
        if not inner:
            break
        held = inner[step % len(inner)]
    held[list(held)[last % len(held)]] = value
    try:
        made = record.loads(json.dumps(document), "it")
    except ResultsError as fault:
        sound(str(fault))
        return
    assert record.loads(record.dumps(made), "again") == made


@drawn
@given(st.text(max_size=40) | JSON.map(json.dumps))
@example("9" * 5000)
@example("[" * 20_000)
@example('{"a": 1e999}')
@example('"\\ud800"')
def test_json_is_refused_or_can_be_written_again(text: str) -> None:
    try:
        found = foreign.decode_json(text)
    except ValueError:
        return
    assert foreign.decode_json(json.dumps(found)) == found
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


# Labels


@drawn
@given(
    parts=st.lists(
        st.lists(st.integers(-2, 12) | st.sampled_from([2**31, 2**62, 2**64, -(2**70)]), max_size=6),
        min_size=1,
        max_size=3,
    ),
    named=st.integers(0, 10),
)
def test_numbers_of_classes_lie_within_them_or_are_refused(parts: list[list[int]], named: int) -> None:
    names = tuple(f"class {n}" for n in range(named))
    flat = [value for part in parts for value in part]
    within = all(value >= 0 and (not names or value < named) for value in flat)
    if not within:
        with pytest.raises(DataError, match="out of range") as raised:
            labels.encode(parts, names, "here")
        sound(str(raised.value))
        return
    tensors, classes = labels.encode(parts, names, "here")
    back = [[int(n) if names else int(classes[n]) for n in tensor] for tensor in tensors]
    assert back == parts
    assert classes == (names or tuple(map(str, sorted(set(flat)))))


@drawn
@given(st.lists(st.lists(st.text(max_size=4), max_size=6), min_size=1, max_size=3))
def test_labels_that_are_texts_come_back(parts: list[list[str]]) -> None:
    tensors, classes = labels.encode(parts, (), "here")
    assert [[classes[n] for n in tensor] for tensor in tensors] == parts
    assert list(classes) == sorted(set(classes))


# Settings


KEYS = st.lists(st.from_regex(r"[a-z_][a-z0-9_-]{0,8}", fullmatch=True), min_size=1, max_size=3).map(".".join)
SETTINGS = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(["true", "1e5", "'x'", "[1", "1979-05-27", "a = b", "\x7f", "\U0001f600", " x ", "#"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


def kinds(value: Any) -> Any:
    """A value with its types, as 1 equals True and 1.0."""
    return [kinds(item) for item in value] if isinstance(value, list) else (type(value), value)


@drawn
@given(key=KEYS, value=SETTINGS)
@example(key="a", value=["\U00010000"])
@example(key="a", value=["\x7f"])
@example(key="a.b", value="\U0001f600 = 1\n")
def test_a_setting_as_a_word_of_the_command_line_is_the_same_setting(key: str, value: Any) -> None:
    item = sweep_file.as_item(key, value)
    assert "\n" not in item or isinstance(value, str)
    found = sweep_file.flat(config.parse_overrides([item]))
    assert list(found) == [key]
    assert kinds(found[key]) == kinds(value)


@drawn
@given(st.lists(st.text(max_size=20) | st.builds("{}={}".format, NAMES, st.text(max_size=20)), max_size=4))
def test_any_words_as_settings_are_tables_or_refused_in_a_line(items: list[str]) -> None:
    try:
        table = config.parse_overrides(items)
    except MimbenchError as fault:
        sound(str(fault))
        return
    keys = {".".join(part for part in item.partition("=")[0].strip().split(".")) for item in items}
    assert set(sweep_file.flat(table)) <= keys


# Names that become paths


@drawn
@given(NAMES)
def test_a_name_is_one_plain_part_of_a_path(text: str) -> None:
    if foreign.is_name(text):
        assert Path(text).parts == (text,)
        assert text.isascii()
        assert text.replace("_", "a").isalnum()


@drawn
@given(method=NAMES, protocol=NAMES)
def test_a_record_lies_in_its_folder_whatever_it_calls_itself(method: str, protocol: str) -> None:
    made = make_record(method=method, protocol=protocol)
    top = Path("/results")
    file = record.place(made, top)
    assert len(file.relative_to(top / "runs").parts) == 3
    assert not {"..", "", "."} & set(file.parts)
    if not (foreign.is_name(method) and foreign.is_name(protocol)):
        with pytest.raises(ResultsError) as raised:
            record.loads(record.dumps(made), "it")
        sound(str(raised.value))


@drawn
@given(NAMES)
@example("a" * 300)
@example("a/" * 3000)
@example("a/../../b")
@example("..\\b")
@example("C:b")
def test_what_a_listing_names_lies_below_it_or_is_refused(name: str) -> None:
    try:
        foreign.below([name], Path("listing.txt"))
    except DataError as fault:
        sound(str(fault))
        return
    top = Path("/nowhere/at/all")
    assert (top / name).resolve().is_relative_to(top)
    assert not (top / name).exists()  # a path that every system takes


# Archives


MEMBERS = st.tuples(
    NAMES.filter(lambda name: "\0" not in name),
    st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]),
    st.sampled_from(["..", "../../x", "/etc", "a", "b_1"]),
)


@drawn
@given(st.lists(MEMBERS, min_size=1, max_size=4))
@example([("a", tarfile.SYMTYPE, ".."), ("a/b", tarfile.REGTYPE, "")])
@example([("../b", tarfile.REGTYPE, "")])
def test_what_is_unpacked_stays_in_its_folder(members: list[tuple[str, bytes, str]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        top, archive = Path(place) / "in" / "it", Path(place) / "archive.tar"
        top.mkdir(parents=True)
        with tarfile.open(archive, "w") as made:
            for name, kind, target in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                info.size = 4 if kind == tarfile.REGTYPE else 0
                made.addfile(info, io.BytesIO(b"harm"))
        try:
            with sources._plain_files_alone(), tarfile.open(archive) as packed:
                packed.extractall(top)
        except sources.DOWNLOAD_FAULTS:
            pass
        else:
            assert all(kind in (tarfile.REGTYPE, tarfile.DIRTYPE) for _, kind, _ in members)
        assert [f.name for f in Path(place).iterdir() if f != archive] == ["in"]
        assert list((Path(place) / "in").iterdir()) == [top]
        assert all(f.is_dir() or (f.is_file() and not f.is_symlink()) for f in top.rglob("*"))
