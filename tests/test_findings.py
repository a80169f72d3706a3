"""What the findings page claims, on records whose answer is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import card, made, rendered, reported, seen, suite, tables

from mimbench.report.board import boards
from mimbench.report.findings import Finding, findings
from mimbench.report.source import Source

__all__ = ["suite"]  # a fixture of the report's tests


def right(share: float, shift: int = 0) -> np.ndarray:
    """2,000 test images of which a share is right, the first ones; ``shift`` moves them on."""
    return np.roll(np.arange(2000) < round(2000 * share), shift)


def found(records: list[Any], papers: list[Any] | None = None) -> Finding:
    numbers: dict[str, list[Any]] = {}
    for row in papers or []:
        numbers.setdefault(row["slug"], []).append(row)
    (board,) = boards(tables(*records), [], {})
    (finding,) = findings(board, numbers)
    return finding


@pytest.fixture
def five(suite: Any, tmp_path: Path) -> list[str]:
    for slug in ("c", "d", "e"):
        suite[slug] = card(tmp_path / "methods", slug)
    return ["alpha", "beta", "c", "d", "e"]


def at_scale(slug: str, value: float) -> dict[str, Any]:
    return reported(
        slug=slug, method=slug, value=value, backbone="vit-b/16", dataset="imagenet-1k", pretrain_data="imagenet-1k",
        image_size="224",
    )  # fmt: skip


def test_pairs_first_places_and_the_floor_are_those_that_a_test_supports(five: list[str]) -> None:
    shares = dict(zip(five, (0.9, 0.895, 0.7, 0.6, 0.5), strict=True))
    records = [seen(slug, right(share)) for slug, share in shares.items()]
    records[1] = seen("beta", right(0.895, 20))  # differs from alpha on other images, by chance alone
    finding = found([*records, seen("noise", right(0.5, 20))])
    assert (finding.methods, finding.seeds, finding.most, finding.pairs, finding.apart) == (5, 1, 1, 10, 9)
    assert finding.first == ["alpha", "beta"]
    assert (finding.above, finding.with_floor) == (["alpha", "beta", "c", "d"], 5)
    assert finding.reported is None


def test_what_an_encoder_costs_is_no_finding(five: list[str]) -> None:
    (board,) = boards(tables(*(seen(slug, right(0.5)) for slug in five)), [], {})
    assert findings(board, {})
    board.columns = [dataclasses.replace(column, protocol="throughput") for column in board.columns]
    assert not findings(board, {})


def test_an_order_like_the_papers_is_said_and_another_is_not(five: list[str]) -> None:
    records = [seen(slug, right(0.9 - place / 10)) for place, slug in enumerate(five)]
    agree = [at_scale(slug, 80.0 - place) for place, slug in enumerate(five)]
    tau = found(records, agree).reported
    assert tau is not None
    assert (tau.tau, tau.n) == (1.0, 5)
    assert tau.settled  # 1 of 120 orders
    fewer = found(records[:4], agree).reported
    assert fewer is not None
    assert not fewer.settled
    oppose = found(records, [at_scale(slug, 70.0 + place) for place, slug in enumerate(five)]).reported
    assert oppose is not None
    assert oppose.tau == -1.0
    assert found(records, agree[:2]).reported is None
    other = [row | {"backbone": f"vit-{n}"} for n, row in enumerate(agree)]
    assert found(records, other).reported is None, "no two of them report with the same backbone"


def test_stale_runs_and_fewer_than_three_methods_tell_nothing(suite: Any, tmp_path: Path) -> None:
    (board,) = boards(tables(made("alpha"), made("beta")), [], {})
    assert board.findings == []
    page = rendered(Source([made("alpha"), made("beta")]))["findings.html"].decode()
    assert "Nothing yet" in page


def test_the_page_shows_what_was_found(five: list[str]) -> None:
    records = [seen(slug, right(0.9 - place / 10)) for place, slug in enumerate(five)]
    page = rendered(Source(records))["findings.html"].decode()
    assert "10 of 10" in page
    assert "no floor of theirs was run" in page
    assert "single seed" in page
