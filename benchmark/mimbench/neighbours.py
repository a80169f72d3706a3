"""Exact nearest neighbours and their votes, in bounded memory.

A neighbour's distance is computed in float64 from the float32 features and rounded to float32; distances
equal in float32 are a tie, won by the lower position in the bank. A faster product only proposes candidates,
and a query is settled when bounds on the product's error prove that its true neighbours are among them; else
a finer product proposes, and float64 at last. So the result depends neither on the sizes of the tiles nor on
the product. On a CPU with a C compiler ``mimbench.kernels.nearest`` searches, elsewhere torch.
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
from mimbench.kernels import nearest as kernel

Metric = Literal["cosine", "euclidean"]
Weighting = Literal["exponential", "uniform", "inverse", "shifted"]

COMPILED = (
    5 * 10**8
)  # multiply-adds from which on a compiled kernel is worth having, and if need be compiling
QUERIES = {"cpu": 256, "cuda": 2_048}  # rows of a tile of similarities in torch
BANK = 65_536  # columns of a tile: with 256 rows 64 MB, the only array whose size is their product
SPARE = 16  # candidates beyond k that make the proof succeed for nearly every query
SHIFT = 0.07  # of distances in the shifted weighting
VOTES = 4_096  # queries whose class scores are held at once
MOST_SCORES = 2**24  # of all classes for all queries of one chunk
_UNIT = 2.0**-24  # rounding of one float32 operation
ROUGH = ("cuda",)  # devices on which products are tried in TF32 first
_TF32 = 2.0**-8.9  # of a product of two lengths, when their vectors are cut to the 11 bits of TF32


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    metric: Metric = "cosine",
    exclude: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    proofs: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest of ``bank`` (N, D) for each of ``queries`` (Q, D), nearest first.

    Returns (Q, k) float32 cosine similarities or Euclidean distances, and (Q, k) int64 positions in the
    bank. ``exclude`` (Q,) names for each query a position that may not be its neighbour: itself, for
    leave-one-out. A vector of length 0 has cosine similarity 0 to everything. ``proofs`` gets the number of
    queries that each kind of product settled. ``tile`` (queries, vectors) are the sizes of what is worked on at
    once; neither they nor the threads change the result.

    Memory: the compiled kernel copies queries and bank once in float32 and once packed (half of that on matrix
    units, as much again for queries that need a second attempt), and holds at most 16 MB of candidates for
    each of torch's threads (more for k above 10,000). In torch it is two copies and a tile of 64 MB (512 MB on
    a GPU). A temperature or a smaller k needs no new search: ``vote`` again.
    Raises DataError for empty, non-finite or mismatched input, and for a k that the bank cannot serve.
    """
    _check(queries, bank, k, exclude)
    queries, bank = (x.detach().float().contiguous() for x in (queries, bank))
    lengths = _lengths("query", queries), _lengths("bank", bank)
    counts: dict[str, int] = {} if proofs is None else proofs
    work = len(queries) * bank.numel()
    if bank.device.type == "cpu" and work >= COMPILED and (library := kernel.load()) is not None:
        if metric == "cosine":
            sides = kernel.Side(queries, lengths[0]), kernel.Side(bank, lengths[1])
            scale = 1.0
        else:
            sides = kernel.Side(queries, None), kernel.Side(bank, None)
            longest = max(float(length.max()) for length in lengths)
            scale = 2.0 ** -math.frexp(longest)[1]
        out = None if exclude is None else exclude.long().contiguous()
        return kernel.search(library, *sides, scale, k, out, tile, counts)
    if metric == "cosine":
        queries, bank = _unit(queries, lengths[0]), _unit(bank, lengths[1])
    tile = tile or (QUERIES.get(bank.device.type, QUERIES["cpu"]), BANK)
    values, positions = _Search(queries, bank, k + (exclude is not None), metric, tile).all(counts)
    return (values, positions) if exclude is None else _without(values, positions, exclude)


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
    ``inverse`` 1 / distance, where neighbours at distance 0 outvote all others (scikit-learn's "distance"),
    ``shifted`` 1 / (distance + 0.07) (stable-pretraining's OnlineKNN).
    Scores are summed in float64 from the nearest neighbour on; of classes with equal scores the lowest wins.
    """
    if not ks or min(ks) < 1 or max(ks) > distances.shape[1]:
        raise DataError(f"cannot vote with k in {list(ks)} among {distances.shape[1]} neighbours")
    predictions = {k: torch.empty(len(distances), dtype=torch.long, device=distances.device) for k in ks}
    at_once = max(1, min(VOTES, MOST_SCORES // max(1, num_classes)))
    for rows in torch.arange(len(distances), device=distances.device).split(at_once):
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
    if weighting == "shifted":
        return 1 / (distances + SHIFT)
    same = distances == 0
    return torch.where(same.any(1, keepdim=True), same.double(), 1 / distances.masked_fill(same, 1))


@contextlib.contextmanager
def _precision(wanted: str) -> Iterator[None]:
    """Matrix products keep all 24 bits ("highest") or 11 ("high", on a GPU), whatever is allowed elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
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
    available = len(bank) - (exclude is not None)
    if not 1 <= k <= available:
        raise DataError(f"k = {k} needs a bank of more than {available} vectors")


def _lengths(name: str, features: Tensor) -> Tensor:
    """The length of each row (N,) in float64, in pieces that stay in the cache. Finite features have finite ones."""
    step = 1 << 9 if features.device.type == "cpu" else 1 << 16
    lengths = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in features.split(step)])
    if not lengths.isfinite().all():
        raise DataError(f"some {name} features are not finite")
    return lengths


def _unit(features: Tensor, lengths: Tensor) -> Tensor:
    """Vectors of length 1 in float32, through float64; vectors of length 0 stay."""
    parts = zip(features.split(65_536), lengths.clamp_min(1e-300).split(65_536), strict=True)
    return torch.cat([(part.double() / length[:, None]).float() for part, length in parts])


def _without(values: Tensor, positions: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of k + 1 neighbours without the excluded one, or without the last where it is not among them."""
    drop = positions == excluded[:, None]
    drop[:, -1] |= ~drop.any(1)
    stay = drop.byte().argsort(dim=1, stable=True)[:, :-1]
    return values.gather(1, stay), positions.gather(1, stay)


class _Search:
    """The nearest of a bank for chunks of queries. Inside, a larger score is a nearer vector."""

    def __init__(self, queries: Tensor, bank: Tensor, k: int, metric: Metric, tile: tuple[int, int]) -> None:
        self.queries, self.bank, self.k, self.metric = queries, bank, k, metric
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
            right *= 2
        # What a product over D + 1 terms loses in any order, and its inputs and the bias before it.
        self.reach = left.norm(dim=1).double() * right.norm(dim=1).double().max() + bias.abs().max()
        self.rounding = (len(self.centre) + 9) * _UNIT
        # The bias is one more channel; more of zeros keep rows aligned, which the product is faster with.
        zeros = -(left.shape[1] + 1) % 16
        self.left = F.pad(F.pad(left, (0, 1), value=1.0), (0, zeros))
        self.right = F.pad(torch.cat([right, bias[:, None]], 1), (0, zeros))
        self.block = max(1, min(64, math.isqrt(self.columns // self.candidates)))
        self.blocks = -(-self.columns // (16 * self.block)) * 16
        self.rows = min(tile[0], len(queries))
        self.tile = self.left.new_empty(self.rows, self.blocks * self.block)

    def all(self, proofs: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Distances (Q, k) float32 and positions (Q, k) of the nearest of all queries, nearest first."""
        values = torch.empty(len(self.queries), self.k, device=self.bank.device)
        positions = torch.empty(len(self.queries), self.k, dtype=torch.long, device=self.bank.device)
        proven = torch.zeros(len(self.queries), dtype=torch.bool, device=self.bank.device)
        todo = torch.arange(len(self.queries), device=self.bank.device)
        products = {"tf32": ("high", self.rounding + _TF32)} if self.bank.device.type in ROUGH else {}
        for name, (precision, error) in (products | {"float32": ("highest", self.rounding)}).items():
            with _precision(precision):
                for rows in todo.split(self.rows):
                    proposed, last = self._propose(rows)
                    values[rows], positions[rows] = found = self._refine(rows, proposed)
                    proven[rows] = self._proven(rows, found[0], last, error)
            doubtful = todo[~proven[todo]]  # here the host waits, once for each kind of product
            proofs[name] = len(todo) - len(doubtful)
            if not len(todo := doubtful):
                return values, positions
        for rows in todo.split(max(1, self.rows // 8)):
            values[rows], positions[rows] = self._refine(rows, self._exhaust(rows))
        proofs["float64"] = len(todo)
        return values, positions

    def _proven(self, rows: Tensor, values: Tensor, last: Tensor, error: float) -> Tensor:
        """Whether the last neighbour (R, k) beats the best score that a vector left out can have (R,) bool."""
        if self.candidates == len(self.bank):
            return torch.ones_like(last, dtype=torch.bool)
        rival = last.double() + error * self.reach[rows]
        kept = values[:, -1].double()
        slack = 4 * _UNIT * kept.abs()
        if self.metric == "cosine":
            return kept - slack > rival + self.offset[rows]
        return (kept + slack).square() < self.offset[rows] - rival  # what overflowed to NaN proves nothing

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
        query = self.queries[rows].double()
        step = max(self.candidates, self.columns // 8)
        for start in range(0, len(self.bank), step):
            vectors = self.bank[start : start + step].double()
            if self.metric == "cosine":
                nearness = query @ vectors.T
            else:
                nearness = -torch.cdist(query, vectors, compute_mode="donot_use_mm_for_euclid_dist")
            positions = torch.arange(start, start + len(vectors), device=rows.device)
            best = torch.cat([best, _keys(nearness.float(), positions.expand(len(rows), -1))], 1)
            best = best.topk(min(self.candidates, best.shape[1]), dim=1, sorted=False).values
        return 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _keys(nearness: Tensor, positions: Tensor) -> Tensor:
    """int64 that sort like (float32 nearness, then lowest position): the float's bits, then the position's."""
    bits = (nearness + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (0xFFFFFFFF - positions)
