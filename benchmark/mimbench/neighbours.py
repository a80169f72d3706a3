"""Exact nearest neighbours and their votes, in bounded memory.

A neighbour's distance is computed in float64 from the float32 features and rounded to float32; distances
equal in float32 are a tie, won by the lower position in the bank. A float32 matrix product only proposes
candidates. A query is accepted when the proposal provably holds its true neighbours, that is, when the last
of them beats everything left out by more than the product can be wrong; else it is searched again in
float64. So the result depends neither on the sizes of the tiles nor on the matrix library.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.errors import DataError

Metric = Literal["cosine", "euclidean"]
Weighting = Literal["exponential", "uniform", "inverse"]

QUERIES = 256  # rows of a tile of similarities
BANK = 65_536  # columns of a tile: 64 MB in float32, the only array whose size is their product
SPARE = 16  # candidates beyond k that make the proof succeed for nearly every query
VOTES = 4_096  # queries whose class scores are held at once
_UNIT = 2.0**-24  # rounding of one float32 operation


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    metric: Metric = "cosine",
    exclude: Tensor | None = None,
    tile: tuple[int, int] = (QUERIES, BANK),
) -> tuple[Tensor, Tensor]:
    """The k nearest of ``bank`` (N, D) for each of ``queries`` (Q, D), nearest first.

    Returns (Q, k) float32 cosine similarities or Euclidean distances, and (Q, k) int64 positions in the
    bank. ``exclude`` (Q,) names for each query a position that may not be its neighbour: itself, for
    leave-one-out. A vector of length 0 has cosine similarity 0 to everything.
    Raises DataError for empty, non-finite or mismatched input, and for a k that the bank cannot serve.
    """
    _check(queries, bank, k, exclude)
    with _full_float32():
        search = _Search(queries, bank, k + (exclude is not None), metric, tile)
        values = torch.empty(len(queries), k, device=bank.device)
        positions = torch.empty(len(queries), k, dtype=torch.long, device=bank.device)
        for rows in torch.arange(len(queries), device=bank.device).split(tile[0]):
            found, where = search(rows)
            if exclude is not None:
                found, where = _without(found, where, exclude[rows])
            values[rows], positions[rows] = found, where
    return values, positions


def vote(
    distances: Tensor,
    neighbours: Tensor,
    labels: Tensor,
    num_classes: int,
    ks: Sequence[int],
    weighting: Weighting = "exponential",
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Predicted classes (Q,) for each k in ``ks``, from the first k columns of what ``nearest`` returns.

    Weights: ``exponential`` exp(similarity / temperature) (Wu et al., 2018, as in DINO), ``uniform`` 1,
    ``inverse`` 1 / distance, where neighbours at distance 0 outvote all others (scikit-learn's "distance").
    Scores are summed in float64 from the nearest neighbour on; of classes with equal scores the lowest wins.
    """
    if not ks or min(ks) < 1 or max(ks) > distances.shape[1]:
        raise DataError(f"cannot vote with k in {list(ks)} among {distances.shape[1]} neighbours")
    predictions = {k: torch.empty(len(distances), dtype=torch.long, device=distances.device) for k in ks}
    for rows in torch.arange(len(distances), device=distances.device).split(VOTES):
        weights = weigh(distances[rows].double(), weighting, temperature)
        classes = labels[neighbours[rows]]
        scores = weights.new_zeros(len(rows), num_classes)
        for column in range(max(ks)):
            # One neighbour at a time: the order of a sum is then the same on every device.
            at = slice(column, column + 1)
            scores.scatter_add_(1, classes[:, at], weights[:, at])
            if column + 1 in predictions:
                predictions[column + 1][rows] = scores.argmax(1)
    return predictions


def weigh(distances: Tensor, weighting: Weighting, temperature: float) -> Tensor:
    """The weight of each neighbour's vote, from distances (Q, k) float64, nearest first."""
    if weighting == "uniform":
        return torch.ones_like(distances)
    if weighting == "exponential":
        return (
            (distances - distances[:, :1]) / temperature
        ).exp()  # the factor common to a query is left out
    same = distances == 0
    return torch.where(same.any(1, keepdim=True), same.double(), 1 / distances.masked_fill(same, 1))


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products keep all 24 bits, whatever the user allows elsewhere: the proof counts on it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(queries: Tensor, bank: Tensor, k: int, exclude: Tensor | None) -> None:
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise DataError(
            f"features {tuple(queries.shape)} and {tuple(bank.shape)} do not fit",
            "Expected (Q, D) and (N, D)",
        )
    if not queries.numel() or not bank.numel():
        raise DataError("there are no features to search among")
    for name, features in (("query", queries), ("bank", bank)):
        if not features.isfinite().all():
            raise DataError(f"some {name} features are not finite")
    available = len(bank) - (exclude is not None)
    if not 1 <= k <= available:
        raise DataError(f"k = {k} needs a bank of more than {available} vectors")


def _without(values: Tensor, positions: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of k + 1 neighbours without the excluded one, or without the last where it is not among them."""
    drop = positions == excluded[:, None]
    drop[:, -1] |= ~drop.any(1)
    shape = (len(values), values.shape[1] - 1)
    return values[~drop].view(shape), positions[~drop].view(shape)


class _Search:
    """The nearest of a bank for chunks of queries. Inside, a larger score is a nearer vector."""

    def __init__(self, queries: Tensor, bank: Tensor, k: int, metric: Metric, tile: tuple[int, int]) -> None:
        prepare = _unit if metric == "cosine" else Tensor.float
        self.queries, self.bank, self.k, self.metric = prepare(queries), prepare(bank), k, metric
        self.candidates = min(k + SPARE + k // 8, len(bank))
        self.columns = min(tile[1], len(bank))
        # Score of (query q, vector b) = left(q) . right(b), with the mean of the bank taken from both: where
        # features have nearly collapsed, their small differences are then what the product is made of.
        # Similarity = score + q . centre; squared distance = |q - centre|^2 - score.
        self.centre = self.bank.mean(0)
        left, right = self.queries - self.centre, self.bank - self.centre
        if metric == "cosine":
            bias = torch.mv(right.double(), self.centre.double()).float()
            self.offset = torch.mv(self.queries.double(), self.centre.double())
        else:
            bias = -right.double().square().sum(1).float()
            self.offset = left.double().square().sum(1)
        reach = left.norm(dim=1).double() + right.norm(dim=1).max()
        # Rounding of inputs, of a product over D + 1 terms in any order, and of the bias.
        self.error = (len(self.centre) + 9) * _UNIT * (reach.square() + bias.abs().max())
        # The bias is one more channel; more of zeros keep rows aligned, which the product is faster with.
        zeros = -(left.shape[1] + 1) % 16
        self.left = F.pad(F.pad(left, (0, 1), value=1.0), (0, zeros))
        right = right.mul_(1 if metric == "cosine" else 2)
        self.right = F.pad(torch.cat([right, bias[:, None]], 1), (0, zeros))
        self.block = max(1, min(64, math.isqrt(self.columns // self.candidates)))
        self.blocks = -(-self.columns // (16 * self.block)) * 16
        self.tile = self.left.new_empty(min(tile[0], len(queries)), self.blocks * self.block)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (R, k) float32 and positions (R, k) of the nearest of some queries (R,), nearest first."""
        proposed, last = self._propose(rows)
        values, positions = self._refine(rows, proposed)
        if self.candidates < len(self.bank):
            # The best score that a vector left out can have, against that of the last vector kept.
            rival = last.double() + self.error[rows]
            kept = values[:, -1].double()
            slack = 4 * _UNIT * kept.abs()
            if self.metric == "cosine":
                proven = kept - slack > rival + self.offset[rows]
            else:
                proven = (kept + slack).square() < self.offset[rows] - rival
            doubtful = ~proven  # what overflowed to NaN proves nothing
            for again in doubtful.nonzero()[:, 0].split(max(1, len(rows) // 8)) if doubtful.any() else ():
                values[again], positions[again] = self._refine(rows[again], self._exhaust(rows[again]))
        return values, positions

    def _propose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (R, candidates) of the best float32 scores, and the least of these scores (R,)."""
        best: Tensor | None = None
        where = rows
        for start in range(0, len(self.bank), self.columns):
            right = self.right[start : start + self.columns]
            scores = self.tile[: len(rows)]
            scores[:, len(right) :] = -math.inf
            torch.mm(self.left[rows], right.T, out=scores[:, : len(right)])
            value, position = self._best(scores)
            position += start
            if best is not None:
                value, position = torch.cat([best, value], 1), torch.cat([where, position], 1)
                value, order = value.topk(min(self.candidates, value.shape[1]), dim=1, sorted=False)
                position = position.gather(1, order)
            best, where = value, position
        assert best is not None
        return where, best.amin(1)

    def _best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best entries of each row: they lie in as many blocks, those with the largest maxima."""
        wanted = min(self.candidates, self.columns)
        if self.blocks <= wanted:
            return scores.topk(wanted, dim=1, sorted=False)
        blocks = scores.view(len(scores), self.block, self.blocks)  # a block is every self.blocks-th column
        chosen = blocks.amax(1).topk(wanted, dim=1, sorted=False).indices
        inside = blocks.gather(2, chosen[:, None].expand(-1, self.block, -1)).flatten(1)
        value, order = inside.topk(wanted, dim=1, sorted=False)
        position = order // wanted * self.blocks + chosen.gather(1, order % wanted)
        return value, position

    def _refine(self, rows: Tensor, proposed: Tensor) -> tuple[Tensor, Tensor]:
        """The k best of the proposed positions (R, M) by distances computed pair by pair in float64."""
        step = max(1, (1 << 23) // (proposed.shape[1] * self.bank.shape[1]))
        parts = []
        for some, candidates in zip(rows.split(step), proposed.split(step), strict=True):
            vectors, query = self.bank[candidates].double(), self.queries[some].double()
            if self.metric == "cosine":
                parts.append(torch.bmm(vectors, query[:, :, None])[:, :, 0].float())
            else:
                parts.append((vectors - query[:, None]).square().sum(2).sqrt().float())
        values = torch.cat(parts)
        nearness = values if self.metric == "cosine" else -values
        order = _keys(nearness, proposed).topk(self.k, dim=1).indices
        return values.gather(1, order), proposed.gather(1, order)

    def _exhaust(self, rows: Tensor) -> Tensor:
        """Like ``_propose``, in float64 and with ties in order: positions (R, candidates)."""
        best = rows.new_empty(len(rows), 0)
        query = self.queries[rows].double() - self.centre
        step = max(self.candidates, self.columns // 8)
        for start in range(0, len(self.bank), step):
            vectors = self.bank[start : start + step].double()
            if self.metric == "cosine":
                nearness = self.queries[rows].double() @ vectors.T
            else:
                vectors -= self.centre
                lengths = query.square().sum(1)[:, None] + vectors.square().sum(1)
                squares = lengths - 2 * query @ vectors.T
                nearness = -squares.masked_fill(squares < 1e-14 * lengths, 0).sqrt()
            positions = torch.arange(start, start + len(vectors), device=rows.device)
            best = torch.cat([best, _keys(nearness.float(), positions.expand(len(rows), -1))], 1)
            best = best.topk(min(self.candidates, best.shape[1]), dim=1, sorted=False).values
        return 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _unit(features: Tensor) -> Tensor:
    """Vectors of length 1 in float32, through float64; vectors of length 0 stay."""
    parts = [F.normalize(part.double(), dim=1, eps=1e-300).float() for part in features.split(65_536)]
    return torch.cat(parts)


def _keys(nearness: Tensor, positions: Tensor) -> Tensor:
    """int64 that sort like (float32 nearness, then lowest position): the float's bits, then the position's."""
    bits = (nearness + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (0xFFFFFFFF - positions)
