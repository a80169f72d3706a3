"""Exact nearest neighbours: 20 of 50,000 vectors of 192 channels for each of 10,000 queries, cosine similarity.

All contenders get unit vectors in float32 and return neighbours; whatever an index is built of is built before.
Ours scales to unit length within its time, and lightly's function also votes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench import machine
from mimbench.compat import torchvision
from mimbench.errors import MimbenchError
from mimbench.neighbours import nearest, vote
from mimbench.speed import Bar, Comparison, Limit, Scale, Timing, main, measure, version

K, CLASSES, TEMPERATURE = 20, 10, 0.07
Found = tuple[Tensor, Tensor]  # similarities and positions (Q, K)


def features(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit vectors (count, dim) around one centre per class, and their classes."""
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return F.normalize(0.35 * centres[labels] + torch.randn(count, dim, generator=draw)), labels


def plain(queries: Tensor, bank: Tensor) -> Found:
    """What one writes in torch: product and top-k in chunks."""
    parts = [torch.mm(some, bank.T).topk(K) for some in queries.split(1_000)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def peers(
    queries: Tensor, bank: Tensor, labels: Tensor, threads: int, skipped: dict[str, str]
) -> Iterable[tuple[str, str, str, Callable[[], object], Callable[[], Tensor]]]:
    """Name, version, note and call of each contender that is installed, and its predicted classes."""

    def classes(found: Found) -> Tensor:
        return vote(*found, labels, CLASSES, [K], temperature=TEMPERATURE)[K]

    yield (
        "torch mm + topk",
        torch.__version__,
        "chunks of 1,000",
        lambda: plain(queries, bank),
        lambda: classes(plain(queries, bank)),
    )
    if bank.is_cuda:
        return
    try:
        import faiss
    except ImportError:
        skipped["faiss IndexFlatIP"] = "faiss-cpu is not installed"
    else:
        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(bank.numpy())

        def by_faiss() -> Found:
            similarities, positions = index.search(queries.numpy(), K)
            return torch.from_numpy(similarities), torch.from_numpy(positions)

        yield "faiss IndexFlatIP", version("faiss-cpu"), "", by_faiss, lambda: classes(by_faiss())
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError:
        skipped["scikit-learn"] = "it is not installed"
    else:
        search = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="euclidean").fit(bank.numpy())

        def by_sklearn() -> Found:
            distances, positions = map(torch.from_numpy, search.kneighbors(queries.numpy()))
            return 1 - distances.square() / 2, positions

        note = "brute force, Euclidean: its fastest"
        yield "scikit-learn", version("scikit-learn"), note, by_sklearn, lambda: classes(by_sklearn())
    try:
        torchvision()
        from lightly.utils.benchmarking.knn import knn_predict
    except ImportError:
        skipped["lightly knn_predict"] = "lightly is not installed"
    else:
        across = bank.T.contiguous()

        def by_lightly() -> Tensor:
            parts = (
                knn_predict(some, across, labels, CLASSES, K, TEMPERATURE) for some in queries.split(256)
            )
            return torch.cat([part[:, 0] for part in parts])

        yield (
            "lightly knn_predict",
            version("lightly"),
            "search and vote, batches of 256",
            by_lightly,
            by_lightly,
        )


def certify(found: Found, queries: Tensor, bank: Tensor) -> None:
    """Raises unless the neighbours are exactly those of float64 brute force, rounded to float32, ties in order."""
    values, positions = found
    ordered = (values[:, :-1] > values[:, 1:]) | (values[:, :-1] == values[:, 1:]) & (
        positions[:, :-1] < positions[:, 1:]
    )
    wrong = int((~ordered).sum())
    places = torch.arange(len(bank), device=bank.device)
    vectors = bank.double()
    for rows in torch.arange(len(queries), device=bank.device).split(500):
        every = (queries[rows].double() @ vectors.T).float()
        value, place = values[rows], positions[rows]
        wrong += int((every.gather(1, place) != value).sum())
        nearer = (every > value[:, -1:]) | (every == value[:, -1:]) & (places < place[:, -1:])
        wrong += int((nearer.sum(1) != K - 1).sum())
    if wrong:
        raise MimbenchError(f"{wrong} neighbours differ from those of brute force in float64")


def knn(options: argparse.Namespace) -> Iterable[Comparison]:
    dim = 192
    sizes = (5_000, 1_000) if options.quick else (50_000, 10_000)
    device = torch.device(options.device)
    (bank, labels), (queries, truth) = features(sizes[0], dim, 1), features(sizes[1], dim, 2)
    bank, labels, queries, truth = (x.to(device) for x in (bank, labels, queries, truth))

    proofs: dict[str, int] = {}
    found = nearest(queries, bank, K, proofs=proofs)
    # Scaled again they may differ from what was given in the last bit, and these are what we search.
    unit = [
        (x.double() / torch.linalg.vector_norm(x.double(), dim=1)[:, None]).float() for x in (queries, bank)
    ]
    certify(found, *unit)
    ours = vote(*found, labels, CLASSES, [K], temperature=TEMPERATURE)[K]
    settled = ", ".join(f"{count:,} by {name}" for name, count in proofs.items() if count)
    agreement = [
        f"all {len(queries):,} x {K} neighbours equal float64 brute force rounded to float32, ties in order",
        f"queries settled: {settled}",
    ]

    skipped: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {"mimbench": lambda: nearest(queries, bank, K)}
    about: dict[str, tuple[str, str]] = {}
    for name, its_version, note, call, predict in peers(queries, bank, labels, options.threads, skipped):
        same = float((predict() == ours).double().mean())
        if same < 0.999:
            raise MimbenchError(f"{name} predicts other classes than we do for {1 - same:.2%} of the queries")
        agreement.append(f"predicted classes equal those of {name} for {same:.2%} of the queries")
        calls[name], about[name] = call, (its_version, note)
    agreement.append(f"accuracy {float((ours == truth).double().mean()):.2%}")

    work = 2 * math.prod((*sizes, dim))
    peaks = {precision: machine.matmul_peak(device, precision).flops for precision in ("fp32", "bf16")}
    about["mimbench"] = version("mimbench"), f"the product alone in bf16: {work / peaks['bf16']:.3g} s"
    timings = [
        Timing(name, seconds, *about[name])
        for name, seconds in measure(calls, options.rounds, options.device).items()
    ]
    bars = (
        {"faiss IndexFlatIP": 1.2, "scikit-learn": 2.5} if device.type == "cpu" else {"torch mm + topk": 3.0}
    )
    growth = []
    for times in (1, 2, 4):
        more = features(times * sizes[0], dim, 3)[0].to(device)
        seconds = machine.seconds(lambda more=more: nearest(queries, more, K), device)
        _, memory = machine.memory_growth(lambda more=more: nearest(queries, more, K), device)
        growth.append(Scale(f"{times}x: {len(more):,} x {dim}", seconds, memory))
    yield Comparison(
        name="knn",
        title="Exact k nearest neighbours",
        work=f"k = {K}, bank {sizes[0]:,} x {dim}, {sizes[1]:,} queries, cosine similarity, float32",
        ours="mimbench",
        timings=timings,
        agreement=agreement,
        limit=Limit(f"the float32 matrix product at {peaks['fp32'] / 1e9:.0f} GFLOP/s", work / peaks["fp32"]),
        bars=[Bar(name, ratio) for name, ratio in bars.items()],
        skipped=skipped,
        growth=growth,
    )


if __name__ == "__main__":
    main(knn, __doc__)
