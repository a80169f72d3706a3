"""Reported numbers: what is read, and faults named by file and line."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from mimbench import paths, registry, reported
from mimbench.errors import DataError

HEADER = ",".join(reported.COLUMNS)
LINE = (
    'mae,vit-b/16,imagenet-1k,1600,224,linear,imagenet-1k,top1,68.0,percent,arXiv,"Table 12, row 1",verified'
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mae"
    folder.mkdir()
    monkeypatch.setattr(paths, "papers", lambda: tmp_path / "results")
    monkeypatch.setattr(registry, "methods", lambda: {"mae": registry.Card("mae", folder, "MAE", "", ())})
    return folder / "reported.csv"


def test_rows_come_typed_with_none_for_what_the_source_does_not_say(file: Path) -> None:
    file.write_text(f"{HEADER}\n{LINE}\n\nbert,,,,32xW,linear,,top1_error,3e-2,,arXiv,,secondary\n")
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
        (
            f"{HEADER}\n{LINE.replace('linear', 'liner')}",
            "line 2: protocol 'liner' is unknown. Did you mean linear?",
        ),
        (
            f"{HEADER}\n{LINE.replace('linear,imagenet-1k', 'linear,imagenet1k')}",
            "line 2: dataset 'imagenet1k' is",
        ),
        (
            f"{HEADER}\n{LINE.replace('top1', 'top-1')}",
            "line 2: metric 'top-1' is unknown. Did you mean top1?",
        ),
        (f"{HEADER}\n{LINE.replace('percent', 'per cent')}", "line 2: unit 'per cent' is unknown"),
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


def test_numbers_come_from_the_methods_folder_or_until_then_from_the_other_papers(file: Path) -> None:
    others = paths.papers() / "reported"
    others.mkdir(parents=True)
    for slug in ("mae", "cutout"):
        (others / f"{slug}.csv").write_text(f"{HEADER}\n{LINE.replace('68.0', '1.0')}\n")
    file.write_text(f"{HEADER}\n{LINE}\n")
    assert reported.slugs() == ["cutout", "mae"]
    assert [(row["slug"], row["value"]) for row in reported.read_all()] == [("cutout", 1.0), ("mae", 68.0)]
    assert reported.read("without_numbers") == []


COLUMNS = "slug,title,arxiv,venue,year,family,code,licence"
PAPER = 'mae,"Masked, scalable",2111.06377,CVPR 2022,2022,image-ssl,facebookresearch/mae,CC-BY-NC 4.0'


def test_the_catalogue_keeps_its_order_and_what_is_not_known_is_empty(file: Path) -> None:
    assert reported.catalogue() == []
    paths.papers().mkdir()
    later = "cutout,Cutout,1708.04552,,2017,image-supervised,,"
    (paths.papers() / "papers.csv").write_text(f"{COLUMNS}\n{PAPER}\n{later}\n")
    mae, cutout = reported.catalogue()
    assert (mae.title, mae.year, mae.code) == ("Masked, scalable", 2022, "facebookresearch/mae")
    assert (cutout.slug, cutout.venue, cutout.code, cutout.licence) == ("cutout", "", "", "")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (COLUMNS.replace("year,", ""), "line 1: the columns should be slug,title"),
        (f"{COLUMNS}\n{PAPER}\n{PAPER}", "line 3: mae is listed twice"),
        (f"{COLUMNS}\n{PAPER.replace('2111.06377', '211106377')}", "line 2: arxiv is '211106377'"),
        (f"{COLUMNS}\n{PAPER.replace(',2022,', ',soon,')}", "line 2: year is 'soon'"),
        (f"{COLUMNS}\n{PAPER.replace('image-ssl', '')}", "line 2: family is empty"),
        (f"{COLUMNS}\n{PAPER},more", "line 2: 9 cells where 8 belong"),
    ],
)
def test_a_fault_of_the_catalogue_names_the_file_and_the_line(text: str, named: str, file: Path) -> None:
    paths.papers().mkdir()
    (paths.papers() / "papers.csv").write_text(text)
    with pytest.raises(DataError) as raised:
        reported.catalogue()
    assert named in str(raised.value)
    assert "papers.csv" in str(raised.value)


# What is here


@pytest.mark.parametrize("slug", reported.slugs())
def test_the_numbers_of_every_paper_here_are_sound(slug: str) -> None:
    rows = reported.read(slug)  # a fault names the file and the line
    card = registry.methods().get(slug)
    file = card.folder / "reported.csv" if card else paths.papers() / "reported" / f"{slug}.csv"
    if file.is_file():
        with open(file, encoding="utf-8", newline="") as stream:
            assert [float(line["value"]) for line in csv.DictReader(stream)] == [r["value"] for r in rows]
    else:
        assert card is not None
        assert card.family in registry.FAMILIES


def test_each_papers_numbers_are_in_one_place_and_each_paper_is_in_the_catalogue() -> None:
    others = {file.stem for file in (paths.papers() / "reported").glob("*.csv")}
    twice = sorted(others & set(registry.methods()))
    assert not twice, f"methods/ has these now: delete them from results/reported: {twice}"
    assert others <= {paper.slug for paper in reported.catalogue()}


def test_the_catalogue_and_the_methods_agree() -> None:
    papers = {paper.slug: paper for paper in reported.catalogue()}
    assert len(papers) == 119
    for slug, card in registry.methods().items():
        if card.family not in registry.FAMILIES:
            paper = papers[slug]
            assert (paper.title, paper.arxiv, paper.family) == (card.title, card.arxiv, card.family), slug


def test_one_thing_has_one_name() -> None:
    for name, words in reported.vocabulary().items():
        assert name in reported.COLUMNS
        plain = {re.sub(r"[^a-z0-9%]", "", word.lower()) for word in words}
        assert len(plain) == len(words), f"two {name} words differ in their punctuation alone"
