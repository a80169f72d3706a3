"""Reported numbers: what is read, and faults named by file and line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mimbench import registry, reported
from mimbench.errors import DataError

HEADER = ",".join(reported.COLUMNS)
LINE = (
    'mae,vit-b/16,imagenet-1k,1600,224,linear,imagenet-1k,top1,68.0,percent,arXiv,"Table 12, row 1",verified'
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mae"
    folder.mkdir()
    monkeypatch.setattr(registry, "methods", lambda: {"mae": registry.Card("mae", folder, "MAE", "", ())})
    return folder / "reported.csv"


def test_rows_come_typed_with_none_for_what_the_source_does_not_say(file: Path) -> None:
    file.write_text(f"{HEADER}\n{LINE}\n\nbert,,,,32xW,linear,,error,3e-2,,arXiv,,secondary\n")
    first, second = reported.read_all()
    assert first["slug"] == second["slug"] == "mae"
    assert (first["value"], first["pretrain_epochs"], first["unit"]) == (68.0, 1600.0, "%")
    assert first["locator"] == "Table 12, row 1"
    assert (second["method"], second["value"], second["image_size"]) == ("bert", 0.03, "32xW")
    assert second["backbone"] is second["pretrain_epochs"] is second["dataset"] is None


def test_a_method_without_the_file_reports_nothing(file: Path) -> None:
    assert reported.read("mae") == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "line 1: the columns should be method,"),
        (HEADER.replace("unit,", ""), "line 1: the columns should be method,"),
        (f"{HEADER}\n{LINE}\nmae,vit", "line 3: 2 cells where 13 belong"),
        (f"{HEADER}\n{LINE.replace('68.0', '68,0')}", "line 2: 14 cells"),
        (f"{HEADER}\n{LINE.replace('68.0', '~68')}", "line 2: value is '~68', not a number"),
        (f"{HEADER}\n{LINE.replace('68.0', 'nan')}", "line 2: value is nan, not a number"),
        (f"{HEADER}\n{LINE.replace('1600', 'many')}", "line 2: pretrain_epochs is 'many'"),
        (f"{HEADER}\n{LINE.replace('verified', 'sure')}", "line 2: confidence is 'sure'"),
        (f"{HEADER}\n{LINE.replace('arXiv', ' ')}", "line 2: source is empty"),
        (f'{HEADER}\n{LINE}\n"open', "line 3: unexpected end of data"),
    ],
)
def test_a_fault_names_the_file_and_the_line(text: str, named: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(DataError) as raised:
        reported.read("mae")
    assert named in str(raised.value)
    assert str(file) in str(raised.value)


def test_bytes_that_are_no_text_are_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        reported.read("mae")


@pytest.mark.parametrize("slug", sorted(registry.methods()))
def test_the_numbers_of_every_method_here_are_sound(slug: str) -> None:
    rows = reported.read(slug)
    card = registry.method(slug)
    if (card.folder / "reported.csv").is_file():
        with open(card.folder / "reported.csv", encoding="utf-8", newline="") as stream:
            assert [float(line["value"]) for line in csv.DictReader(stream)] == [r["value"] for r in rows]
    else:
        assert card.family in registry.FAMILIES
