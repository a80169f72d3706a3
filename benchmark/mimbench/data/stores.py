"""Stores: a decoded copy on disk, mapped into memory, or decoding on demand where that would be too large."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from mimbench import config, paths
from mimbench import progress as progress_
from mimbench.data.decode import (
    LONGEST_SIDE,
    VERSION,
    Undecodable,
    decode,
    decode_all,
    reduced,
    refuse,
    size_of,
)
from mimbench.data.encoded import GIB, Encoded, Files, writing
from mimbench.data.split import InMemory, Store
from mimbench.errors import ConfigError

DECODED_GIB = 16.0  # a decoded copy larger than this is not made; MIMBENCH_DECODED_GIB overrides
SAMPLE = 64  # images whose headers are read to guess the decoded size of all


def open_store(
    source: Encoded,
    fingerprint: str,
    label: str,
    channels: int = 3,
    progress: progress_.Progress | None = None,
) -> Store:
    """The images of ``source``, decoded once into the cache, or streamed where that would take too much.

    ``fingerprint`` names the content: equal fingerprints share one decoded copy. ``label`` is what the
    progress bar says. Raises DataError where an image cannot be decoded (streaming raises on reading it).
    """
    progress = progress or progress_.quiet()
    key = config.digest(fingerprint, channels, VERSION, LONGEST_SIDE, length=24)
    if _decoded_size(source, channels) > decoded_limit():
        if not isinstance(source, Files):
            folder = _once("packed", key, lambda place: _write_packed(source, place, label, progress))
            return Streaming(Packed(folder, source), channels)
        return Streaming(source, channels)
    folder = _once("decoded", key, lambda place: _write_decoded(source, place, channels, label, progress))
    return open_decoded(folder, channels)


def note(source: Encoded) -> str:
    """What a reader must know of how ``source`` is decoded."""
    larger = any(max(size) > LONGEST_SIDE for size in _sizes(source))
    return f"images reduced to {LONGEST_SIDE} px" if larger else ""


def decoded_limit() -> float:
    """The largest decoded copy that is made, in bytes."""
    text = os.environ.get("MIMBENCH_DECODED_GIB", str(DECODED_GIB))
    try:
        return float(text) * GIB
    except ValueError:
        raise ConfigError(f"MIMBENCH_DECODED_GIB={text} is not a number") from None


def _sizes(source: Encoded) -> list[tuple[int, int]]:
    """(width, height) of a sample of the images, as their headers state."""
    return [size for data in source.sample(SAMPLE) if (size := size_of(data))]


def _decoded_size(source: Encoded, channels: int) -> float:
    sizes = [reduced(size) for size in _sizes(source)]
    return len(source) * channels * sum(w * h for w, h in sizes) / max(1, len(sizes))


def workers() -> ThreadPoolExecutor:
    """Threads for decoding; Pillow decodes outside the interpreter's lock."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="mimbench-decode")


def _once(kind: str, key: str, write: Callable[[Path], None]) -> Path:
    """The cache folder ``kind/key``, written by the first process to ask; others wait for it.

    It appears complete or not at all: what a killed process leaves is thrown away by the next one.
    """
    folder = paths.cache() / kind / key
    if folder.is_dir():
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                part = folder.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                try:
                    write(part)
                    os.replace(part, folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    return folder


def _write_decoded(
    source: Encoded, folder: Path, channels: int, label: str, progress: progress_.Progress
) -> None:
    shapes = np.zeros((len(source), 2), np.int64)
    failed: dict[str, str] = {}
    with (folder / "pixels").open("wb") as out, workers() as pool:
        images = decode_all(source, pool, channels)
        for row, pixels in enumerate(progress.track(images, f"decoding {label}", total=len(source))):
            if isinstance(pixels, Undecodable):
                failed[source.name(row)] = str(pixels)
            elif not failed:
                shapes[row] = pixels.shape[1:]
                out.write(pixels.data)
    refuse(failed, len(source), source.where)
    np.save(folder / "shapes.npy", shapes)


def open_arrays(chunks: Iterable[np.ndarray], fingerprint: str) -> Store:
    """Pixels that come as arrays (n, 3, H, W) of uint8, copied once into the cache and mapped from there."""

    def write(folder: Path) -> None:
        shapes = []
        with (folder / "pixels").open("wb") as out:
            for chunk in chunks:
                out.write(np.ascontiguousarray(chunk).data)
                shapes += [chunk.shape[2:]] * len(chunk)
        np.save(folder / "shapes.npy", np.array(shapes, np.int64))

    return open_decoded(_once("decoded", config.digest(fingerprint, length=24), write), 3)


def open_decoded(folder: Path, channels: int) -> InMemory | Ragged:
    """A decoded copy, mapped into memory: pages are read when touched and shared between processes."""
    shapes = torch.from_numpy(np.load(folder / "shapes.npy"))
    ends = (shapes.prod(1) * channels).cumsum(0)
    file = str(folder / "pixels")
    pixels = torch.from_file(file, shared=False, size=int(ends[-1]), dtype=torch.uint8)
    if (shapes == shapes[0]).all():
        return InMemory(pixels.view(len(shapes), channels, *shapes[0].tolist()))
    return Ragged(pixels, shapes, channels)


class Ragged:
    """A store of images of different sizes, one after the other in one tensor."""

    def __init__(self, pixels: Tensor, shapes: Tensor, channels: int = 3) -> None:
        self.pixels, self.shapes, self.channels = pixels, shapes, channels
        self.ends = (shapes.prod(1) * channels).cumsum(0)

    def __len__(self) -> int:
        return len(self.shapes)

    def image(self, row: int) -> Tensor:
        """(C, H, W) uint8."""
        height, width = self.shapes[row].tolist()
        end = int(self.ends[row])
        return self.pixels[end - self.channels * height * width : end].view(self.channels, height, width)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return pad([self.image(row) for row in index.tolist()])


class Packed:
    """Encoded images copied into one flat file, for reading in any order."""

    def __init__(self, folder: Path, source: Encoded) -> None:
        self.ends = np.load(folder / "ends.npy")
        self.data = np.memmap(folder / "data", np.uint8, "r")
        self.source, self.where = source, source.where

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, row: int) -> str:
        return self.source.name(row)

    def read(self, row: int) -> bytes | None:
        return self.data[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes() or None


def _write_packed(source: Encoded, folder: Path, label: str, progress: progress_.Progress) -> None:
    ends = np.zeros(len(source), np.int64)
    end = 0
    with (folder / "data").open("wb") as out:
        for row, data in enumerate(progress.track(source, f"copying {label}", total=len(source))):
            end += out.write(data or b"")
            ends[row] = end
    np.save(folder / "ends.npy", ends)


class Streaming:
    """A store that decodes on demand, in threads."""

    def __init__(self, source: Files | Packed, channels: int = 3, longest: int = LONGEST_SIDE) -> None:
        self.source, self.channels, self.longest, self.pool = source, channels, longest, workers()

    def __len__(self) -> int:
        return len(self.source)

    def _image(self, row: int) -> Tensor | Undecodable:
        try:
            return torch.from_numpy(np.array(decode(self.source.read(row), self.channels, self.longest)))
        except Undecodable as fault:
            return fault

    def read(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        images, failed = [], {}
        rows = index.tolist()
        for row, image in zip(rows, self.pool.map(self._image, rows), strict=True):
            if isinstance(image, Tensor):
                images.append(image)
            else:
                failed[self.source.name(row)] = str(image)
        refuse(failed, len(rows), self.source.where)
        return pad(images)


def pad(images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Images (C, H, W) as one tensor padded with zeros at the right and the bottom, and their sizes (B, 2)."""
    sizes = torch.tensor([image.shape[1:] for image in images]).view(-1, 2)
    if not images or (sizes == sizes[0]).all():
        return torch.stack(images), None
    height, width = sizes.amax(0).tolist()
    batch = torch.zeros(len(images), images[0].shape[0], height, width, dtype=torch.uint8)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes
