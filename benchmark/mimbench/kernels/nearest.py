"""Calls ``nearest.c``: exact nearest neighbours on a CPU, without a matrix of scores.

A score is larger where a vector is nearer, and leaves out what is the same for the whole bank. With c near the
mean of the bank, q - c for a query and b - c for a vector (nearly collapsed features differ in these only):

    cosine       q.b = (q - c).(b - c) + c.(b - c) + c.q
    euclidean    |q - b|^2 = |q - c|^2 - (2 (q - c).(b - c) - |b - c|^2)

Rounding (q - c) and (b - c) to what is multiplied loses r and s: by Cauchy and Schwarz the product is wrong by at
most |r| |b - c| + |q - c| |s|, and by the rounding of its sums. The kernel needs this for each block of the bank.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from mimbench import kernels

SIDE = 32  # queries and vectors in a block
ROWS = 1_024  # queries whose candidates are held by a thread
CACHED = 1 << 18  # bytes of the bank that stay in a core's own cache
HELD = 1 << 24  # bytes of candidates that a thread may hold, if k allows it
PACKED = 4_096  # vectors packed by one call
CENTRED = 4_096  # vectors of the bank that the centre is the mean of
_UNIT = 2.0**-24
FLOAT32, BFLOAT16, SPLIT = 0, 1, 2  # parts of a number that are multiplied; see nearest.c
NAMES = {FLOAT32: "float32", BFLOAT16: "bfloat16", SPLIT: "split bfloat16"}

_POINTER, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double
_SIGNATURES: dict[str, tuple[type, str]] = {  # what is returned, and p(ointer), l(ong), d(ouble) arguments
    "has_bfloat16": (ctypes.c_int, ""),
    "scratch_bytes": (_LONG, "ll"),
    "pack": (ctypes.c_int, "pppdlllllpppp"),
    "search": (ctypes.c_int, "pppppplllllllllldppppppp"),
}

Run = Callable[[Callable[[int], None], Iterable[int]], None]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The kernel, where it can be had."""
    library = kernels.load("nearest")
    if library is not None:
        letters = {"p": _POINTER, "l": _LONG, "d": _DOUBLE}
        for name, (returns, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returns, [letters[letter] for letter in arguments]
    return library


def attempts(library: ctypes.CDLL) -> tuple[int, ...]:
    """Products to try in turn: on matrix units for bfloat16, rough and then split, else float32."""
    return (BFLOAT16, SPLIT) if library.has_bfloat16() else (FLOAT32,)


class _Packed(NamedTuple):
    unit: Tensor  # (N, D) float32: what values are computed from
    words: Tensor  # (blocks, words) int32, as nearest.c lays them out
    about: Tensor  # (5, whole blocks) float64, see nearest.c
    steps: int


class Side(NamedTuple):
    """Queries or bank: (N, D) float32 and, for the cosine, the lengths (N,) float64 to divide by."""

    features: Tensor
    norms: Tensor | None


def search(
    library: ctypes.CDLL,
    queries: Side,
    bank: Side,
    scale: float,
    k: int,
    exclude: Tensor | None,
    tile: tuple[int, int] | None,
    proofs: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Values (Q, k) and positions (Q, k) as ``mimbench.neighbours.nearest`` defines them.

    ``scale``, a power of two, brings lengths to about 1. Runs on as many threads as torch does.
    """
    values = torch.empty(len(queries.features), k)
    positions = torch.empty(len(queries.features), k, dtype=torch.long)
    centre = _centre(bank)
    products = attempts(library)
    todo: Tensor | slice = slice(None)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:

        def run(task: Callable[[int], None], starts: Iterable[int]) -> None:
            for _ in pool.map(task, starts):
                pass  # raises what the task raised

        for parts in products:
            features, norms = queries
            some = Side(features[todo], None if norms is None else norms[todo])
            out = None if exclude is None else exclude[todo]
            last = parts == products[-1]
            found = _attempt(library, run, some, bank, centre, scale, k, out, tile, parts, last)
            values[todo], positions[todo], states = found
            proofs[NAMES[parts]] = int((states == 0).sum())
            if last:
                proofs["float64"] = int((states == 1).sum())
            given_up = (states == 2).nonzero()[:, 0]
            if not len(given_up):
                break
            todo = given_up if isinstance(todo, slice) else todo[given_up]
    return values, positions


def _attempt(
    library: ctypes.CDLL,
    run: Run,
    queries: Side,
    bank: Side,
    centre: Tensor,
    scale: float,
    k: int,
    exclude: Tensor | None,
    tile: tuple[int, int] | None,
    parts: int,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, positions and state (0, 1 or 2, see nearest.c) of each query, by one kind of product."""
    euclidean = bank.norms is None
    (n, dim), count = bank.features.shape, len(queries.features)
    left = _pack(library, run, queries, centre, scale * (1 + euclidean), parts, False)
    right = _pack(library, run, bank, centre, scale, parts, True)
    terms = (2 * parts - 1 if parts else 1) * dim + 32  # 32: for what rounds these bounds themselves
    rounding = 1.1 * terms * _UNIT  # of a sum in any order

    length, lost, second = left.about[:3]
    reach = length + lost + second
    bounds = torch.stack([lost + rounding * reach, reach, second]).float()
    base = length.square() / 4 if euclidean else left.about[3] * scale**2

    length, lost, second = right.about[:3]
    bias = -length.square() if euclidean else right.about[4] * scale**2
    blocks = torch.stack([length + lost + second, lost, second, rounding * bias.abs() + 1e-34])
    largest = (blocks.view(4, -1, SIDE).amax(2).T * (1 + 1e-5)).float().contiguous()
    bias = bias.float()
    bias[n:] = torch.finfo(torch.float32).min

    room = min(max(512, 4 * k), -(-n // SIDE) * SIDE)
    most = tile[0] if tile else max(SIDE, min(ROWS, HELD // (12 * room)))
    turns = -(-count // most)
    if not tile:  # the same number of turns for each thread
        turns = -(-turns // torch.get_num_threads()) * torch.get_num_threads()
    rows = -(-count // (turns * SIDE)) * SIDE
    columns = max(1, (tile[1] if tile else CACHED // right.words[0].nbytes * SIDE) // SIDE) * SIDE

    values, positions = torch.empty(count, k), torch.empty(count, k, dtype=torch.long)
    states = torch.empty(count, dtype=torch.int32)
    spare: list[Tensor] = []  # taken and given back by threads

    def block(start: int) -> None:
        own = slice(start, min(start + rows, count))
        padded = slice(start, -(-own.stop // SIDE) * SIDE)
        try:
            scratch = spare.pop()
        except IndexError:
            scratch = torch.empty(library.scratch_bytes(rows, room), dtype=torch.uint8)
        errors = bounds[:, padded].contiguous()
        packed = [left.words[start // SIDE :], right.words, bias, errors, largest, base[own]]
        sizes = [right.steps, parts, own.stop - start, n, columns, room, last, k, dim, euclidean]
        exact = [left.unit[own], right.unit, None if exclude is None else exclude[own], scratch]
        results = [values[own], positions[own], states[own]]
        library.search(*map(_at, packed), *sizes, scale**2, *map(_at, exact), *map(_at, results))
        spare.append(scratch)

    run(block, range(0, count, rows))
    return values, positions, states


def _pack(
    library: ctypes.CDLL, run: Run, side: Side, centre: Tensor, scale: float, parts: int, bank: bool
) -> _Packed:
    count, dim = side.features.shape
    blocks, step = -(-count // SIDE), 32 if parts else 16
    steps = -(-dim // step)
    words = torch.empty(blocks, SIDE * 16 * steps * max(1, parts), dtype=torch.int32)
    about = torch.empty(blocks, 5, SIDE, dtype=torch.float64)
    unit = torch.empty(count, dim)
    middle = torch.zeros(steps * step)
    middle[:dim] = centre

    def some(start: int) -> None:
        own = slice(start, min(start + PACKED, count))
        at = start // SIDE
        norms = None if side.norms is None else side.norms[own]
        row = torch.empty(4 * len(middle))
        library.pack(
            *map(_at, (side.features[own], norms, middle)),
            scale, own.stop - start, dim, len(middle), parts, bank,
            *map(_at, (unit[own], words[at:], about[at:], row)),
        )  # fmt: skip

    run(some, range(0, count, PACKED))
    return _Packed(unit, words, about.transpose(0, 1).reshape(5, -1), steps)


def _centre(bank: Side) -> Tensor:
    """About the mean of the bank, as exactly as float32 says it; which point it is moves no result."""
    some = slice(None, None, -(-len(bank.features) // CENTRED))
    rows = bank.features[some].double()
    if bank.norms is not None:
        rows /= bank.norms[some].clamp_min(1e-300)[:, None]
    return rows.mean(0).float()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
