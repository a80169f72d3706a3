"""Exact search against float64 brute force, by every product and path that may propose the neighbours."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimbench import kernels, neighbours
from mimbench.errors import DataError
from mimbench.kernels import nearest as kernel
from mimbench.neighbours import nearest

PATHS = ["torch", "tf32", "float32", "bfloat16", "split"]
METRICS = ["cosine", "euclidean"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def to_tf32(x: Tensor) -> Tensor:
    """What a GPU's matrix units make of float32, at worst: 10 bits behind the point, the rest cut off."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        choose(request.param, patch)
        yield request.param


def choose(path: str, patch: pytest.MonkeyPatch) -> None:
    """All searches go this way, whatever their size."""
    if path == "torch":
        patch.setattr(kernel, "load", lambda: None)
        return
    if path == "tf32":
        exactly = torch.mm

        def roughly(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
            rough = torch.get_float32_matmul_precision() == "high"
            return exactly(to_tf32(a), to_tf32(b.T).T, out=out) if rough else exactly(a, b, out=out)

        patch.setattr(kernel, "load", lambda: None)
        patch.setattr(neighbours, "ROUGH", ("cpu",))
        patch.setattr(torch, "mm", roughly)
        return
    library = kernel.load()
    if library is None:
        pytest.skip("no C compiler")
    if path != "float32" and not library.has_bfloat16():
        pytest.skip("no matrix units for bfloat16")
    products = {"float32": (kernel.FLOAT32,), "bfloat16": kernel.attempts(library), "split": (kernel.SPLIT,)}
    patch.setattr(neighbours, "COMPILED", 0)
    patch.setattr(kernel, "attempts", lambda _: products[path])


def brute_force(queries: Tensor, bank: Tensor, metric: str) -> np.ndarray:
    """All distances (Q, N), float64 rounded to float32; larger is nearer."""
    q, b = queries.numpy().astype(np.float32), bank.numpy().astype(np.float32)
    if metric == "cosine":
        q, b = (
            (x / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-300)).astype("f4")
            for x in (q, b)
        )
        return np.stack([(b.astype("f8") * row).sum(1) for row in q.astype("f8")]).astype("f4")
    return -np.stack([np.sqrt(((b.astype("f8") - row) ** 2).sum(1)) for row in q.astype("f8")]).astype("f4")


def check(
    queries: Tensor, bank: Tensor, k: int, metric: str, tile: tuple[int, int] | None = None
) -> dict[str, int]:
    nearness = brute_force(queries, bank, metric)
    order = np.argsort(-nearness, axis=1, kind="stable")[:, :k]
    proofs: dict[str, int] = {}
    values, positions = nearest(queries, bank, k, metric, tile=tile, proofs=proofs)
    assert np.array_equal(positions.numpy(), order)
    expected = np.take_along_axis(nearness, order, 1)
    np.testing.assert_allclose(
        values.numpy(), expected if metric == "cosine" else -expected, rtol=1e-6, atol=1e-7
    )
    assert sum(proofs.values()) == len(queries)
    return proofs


@pytest.mark.parametrize("which", PATHS)
def test_neighbours_are_those_of_brute_force_whatever_the_tiles(which: str) -> None:
    @given(st.data())
    @settings(max_examples=40)
    def holds(data: st.DataObject) -> None:
        n, q = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 70))
        d, k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, n))
        tile = data.draw(st.none() | st.tuples(st.integers(1, 100), st.integers(1, 400)))
        metric = data.draw(st.sampled_from(METRICS))
        bank, queries = normal(n, d, seed=n), normal(q, d, seed=q + 1)
        if data.draw(st.booleans()):  # small integers: many exact ties, duplicates and zeros
            bank, queries = (bank * 2).round(), (queries * 2).round()
        check(queries, bank, k, metric, tile)

    with pytest.MonkeyPatch.context() as patch:
        choose(which, patch)
        holds()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_nearly_collapsed_features_are_told_apart(
    path: str, metric: str, offset: float, scale: float
) -> None:
    check(normal(9, 16, seed=1) * scale + offset, normal(1900, 16) * scale + offset, 5, metric, (40, 256))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30, 1e37])
def test_huge_and_tiny_features(path: str, scale: float) -> None:
    for metric in METRICS:
        check(normal(40, 20, seed=1) * scale, normal(900, 20) * scale, 7, metric)
    bank = normal(900, 20)
    bank[3] *= scale  # one that spoils every bound common to the bank
    check(normal(40, 20, seed=1), bank, 7, "euclidean")


@pytest.mark.parametrize("metric", METRICS)
def test_equal_distances_are_won_by_the_lower_position(path: str, metric: str) -> None:
    bank = torch.ones(2500, 8)
    bank[7] = -1
    for tile in ((2, 64), None):
        _, positions = nearest(torch.ones(3, 8), bank, 9, metric, tile=tile)
        assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 8, 9]] * 3
    zeros = torch.zeros(400, 8)
    assert nearest(zeros[:2], zeros, 4, metric)[1].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("metric", METRICS)
def test_crowds_that_no_product_tells_apart(path: str, metric: str) -> None:
    """Tight clusters far from each other: differences within one are below the rounding of most products."""
    bank = normal(6, 24)[torch.arange(5000) % 6] + 1e-6 * normal(5000, 24, seed=1)
    bank[4000:] = bank[:1000]  # and nearer ones that come late in the bank
    bank[3000:3100] += 1e-3
    queries = bank[[0, 5, 999, 3050, 4999]] + 1e-7 * normal(5, 24, seed=2)
    for k in (1, 30, 300):
        proofs = check(queries, bank, k, metric)
        assert proofs.get("float64", 0) > 0


def test_k_up_to_the_whole_bank(path: str) -> None:
    bank = normal(777, 12)
    for metric in METRICS:
        for k in (1, 100, 776, 777):
            check(normal(33, 12, seed=1), bank, k, metric)


def test_duplicates_of_a_query_lie_at_distance_zero(path: str) -> None:
    bank = normal(600, 32) + 100
    bank[500] = bank[3]
    values, positions = nearest(bank[3:4], bank, 2, "euclidean")
    assert values.tolist() == [[0.0, 0.0]]
    assert positions.tolist() == [[3, 500]]


@pytest.mark.parametrize("metric", METRICS)
def test_leaving_one_out_is_a_search_without_it(path: str, metric: str) -> None:
    bank = torch.cat([normal(60, 6), torch.ones(40, 6)])  # with duplicates that hide the query itself
    rows = torch.tensor([0, 5, 61, 99])
    values, positions = nearest(bank[rows], bank, 12, metric, exclude=rows)
    for row, value, position in zip(rows.tolist(), values, positions, strict=True):
        others = torch.cat([torch.arange(row), torch.arange(row + 1, len(bank))])
        alone = nearest(bank[row : row + 1], bank[others], 12, metric)
        assert torch.equal(others[alone[1][0]], position)
        assert torch.equal(alone[0][0], value)


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_alone_settle_most_queries(path: str, metric: str) -> None:
    proofs = check(normal(300, 64, seed=3) + 2, normal(5_000, 64) + 2, 20, metric)
    assert proofs.get("float64", 0) <= 3
    first = {"torch": "float32", "split": "split bfloat16"}.get(path, path)
    assert proofs[first] > 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_strides_are_searched_as_float32(path: str, dtype: torch.dtype) -> None:
    bank, queries = normal(30, 500).to(dtype).T, normal(90, 60, seed=1).to(dtype)[::2, ::2]
    expected = nearest(queries.float().contiguous(), bank.float().contiguous(), 4)
    assert all(map(torch.equal, nearest(queries, bank, 4), expected))


def test_every_path_and_any_threads_give_the_same_bits() -> None:
    bank, queries = normal(4_000, 100), normal(500, 100, seed=1)
    rows = torch.arange(500)
    found = []
    before = torch.get_num_threads()
    try:
        for which in PATHS:
            for threads in (1, 2):
                with pytest.MonkeyPatch.context() as patch:
                    try:
                        choose(which, patch)
                    except pytest.skip.Exception:
                        continue
                    torch.set_num_threads(threads)
                    found.append(nearest(queries, bank, 20, "euclidean", exclude=rows))
    finally:
        torch.set_num_threads(before)
    for values, positions in found:
        assert torch.equal(values, found[0][0])
        assert torch.equal(positions, found[0][1])


def test_what_cannot_be_searched_says_why() -> None:
    bank = normal(5, 3)
    for queries, k, message in [
        (normal(2, 4), 1, "do not fit"),
        (normal(0, 3), 1, "no features"),
        (normal(2, 3) / 0, 1, "not finite"),
        (normal(2, 3) * torch.nan, 1, "not finite"),
        (normal(2, 3), 6, "k = 6"),
        (normal(2, 3), 0, "k = 0"),
    ]:
        with pytest.raises(DataError, match=message):
            nearest(queries, bank, k)


@pytest.fixture
def load() -> Callable[[str], object]:
    """Compiles anew, as another process would."""
    return kernels.load.__wrapped__


def test_a_kernel_is_compiled_once(load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    if load("nearest") is None:
        pytest.skip("no C compiler")
    run, commands = subprocess.run, []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **how: commands.append(command) or run(command, **how)
    )
    assert load("nearest") is not None
    assert [command[1:] for command in commands] == [["--version"]]


def test_without_a_working_compiler_there_is_no_kernel(
    load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert load("nearest") is None
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load("nearest") is None
    monkeypatch.undo()
    monkeypatch.setenv("MIMBENCH_CACHE", str(broken / "a file is no folder"))
    assert load("nearest") is None
