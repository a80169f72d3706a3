"""Features of a ViT-Tiny (patch 4, width 192, depth 12) at 32 pixels: ``mimbench.features.extract`` without its cache.

The limit is the bare forward over batches that lie ready in memory, normalised. The plain peer is what one writes
in torch: a DataLoader, the forward, ``torch.cat``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mimbench import features, machine
from mimbench.data import InMemory, Split
from mimbench.encoder import InputSpec
from mimbench.errors import MimbenchError
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.progress import quiet
from mimbench.speed import Bar, Comparison, Limit, Scale, Timing, main, measure, version
from mimbench.task import Context

OURS, BARE, PLAIN = "mimbench extract", "bare forward", "DataLoader + forward + cat"


def split_of(count: int, side: int) -> Split:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)
    return Split("noise", "train", InMemory(images), ("a",), "noise", torch.arange(count))


def compare(
    encoder: ViTEncoder, count: int, side: int, grow: bool, options: argparse.Namespace
) -> Comparison:
    device = torch.device(options.device)
    context = Context(device, 0, quiet(), Path(), None)
    split = split_of(count, side)

    def prepare(images: Tensor) -> Tensor:
        return features.prepare(images.to(device), None, encoder.input)

    ready = [prepare(batch.images) for batch in split.batches(features.BATCH)]
    loader = DataLoader(TensorDataset(split.store.read(split.index)[0]), batch_size=features.BATCH)

    def bare() -> Tensor:
        with features.frozen(encoder):
            return torch.cat([encoder(images).pooled.cpu() for images in ready])

    def plain() -> Tensor:
        with features.frozen(encoder):
            return torch.cat([encoder(prepare(images)).pooled.cpu() for (images,) in loader])

    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: features.extract(encoder, split, context),
        BARE: bare,
        PLAIN: plain,
    }
    found = {name: call() for name, call in calls.items()}
    for name, values in found.items():
        if not torch.equal(values, found[OURS]):
            raise MimbenchError(f"{name} gives other features than ours")
    taken = measure(calls, options.rounds, options.device)
    about = {OURS: version("mimbench"), BARE: torch.__version__, PLAIN: torch.__version__}
    growth = []
    for times in (1, 2, 4) if grow else ():
        more = split_of(times * count // 2, side)
        began = time.perf_counter()
        _, memory = machine.memory_growth(lambda more=more: features.extract(encoder, more, context), device)
        seconds = time.perf_counter() - began
        growth.append(Scale(f"{times}x: {len(more):,} images", seconds, memory))
    timings = [Timing(name, seconds, about[name]) for name, seconds in taken.items()]
    return Comparison(
        name=f"features-{side}",
        title=f"Frozen features of images of {side} pixels",
        work=f"{count:,} images of {side} x {side}, {encoder.name} at {encoder.input.size} pixels, float32",
        ours=OURS,
        timings=timings,
        agreement=["the features of all three are equal bit for bit"],
        limit=Limit(
            "the bare forward, its images ready in memory", sorted(taken[BARE])[len(taken[BARE]) // 2]
        ),
        bars=[Bar(BARE, 0.95), Bar(PLAIN, 1.0)],
        growth=growth,
    )


def run(options: argparse.Namespace) -> Iterable[Comparison]:
    torch.manual_seed(0)
    depth, count = (2, 256) if options.quick else (12, 320)  # more than one batch of 256
    encoder = ViTEncoder(ViT(32, ViTShape(4, 192, depth, 3)), InputSpec(32), "mean").to(options.device)
    for side in (32, 224):
        yield compare(encoder, count, side, side == 32, options)


if __name__ == "__main__":
    main(run, __doc__)
