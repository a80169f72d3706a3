"""Encoded images, wherever they lie: files in folders, or a column of Parquet files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mimbench import config, paths
from mimbench.errors import DataError

GIB = 2**30
MOST_BYTES = 2**28  # of an encoded image; a larger one is taken for missing


class Encoded(Protocol):
    """Encoded images in a fixed order. A missing one is None; who decodes reports it by name."""

    where: str  # for messages

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bytes | None]: ...

    def name(self, row: int) -> str: ...

    def sample(self, count: int) -> list[bytes | None]:
        """A few of the images, to guess the size of all."""
        ...


class Files:
    """Image files under one folder, named relative to it."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names, self.where = root, names, str(root)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[bytes | None]:
        return (self.read(row) for row in range(len(self)))

    def name(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> bytes | None:
        file = self.root / self.names[row]
        try:
            state = file.stat()
            readable = stat.S_ISREG(state.st_mode) and state.st_size <= MOST_BYTES
            return file.read_bytes() if readable else None
        except OSError:
            return None

    def sample(self, count: int) -> list[bytes | None]:
        return [self.read(row) for row in range(0, len(self), max(1, len(self) // count))]


class Column:
    """A column of encoded images, over one or more Parquet files."""

    def __init__(self, files: Sequence[Path], column: str, rows: Sequence[int]) -> None:
        self.files, self.column, self.rows = files, column, rows
        self.where = str(files[0] if len(files) == 1 else files[0].parent)

    def __len__(self) -> int:
        return sum(self.rows)

    def __iter__(self) -> Iterator[bytes | None]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for file in self.files:
            try:
                for batch in pq.ParquetFile(file).iter_batches(256, columns=[self.column]):
                    values = batch.column(0)
                    if pa.types.is_struct(values.type):
                        values = values.field("bytes")
                    yield from values.to_pylist()
            except (pa.ArrowException, OSError, ValueError) as fault:
                raise unreadable(file, fault) from None

    def name(self, row: int) -> str:
        for file, rows in zip(self.files, self.rows, strict=True):
            if row < rows:
                return f"row {row} of {file.name}"
            row -= rows
        raise IndexError(row)

    def sample(self, count: int) -> list[bytes | None]:
        return [data for data, _ in zip(self, range(count), strict=False)]


def unreadable(file: Path, fault: Exception) -> DataError:
    """What to raise when a Parquet file cannot be read."""
    reason = str(fault).partition("\n")[0]
    return DataError(f"{file} cannot be read: {reason}", "It may be truncated: copy or download it again")


def fingerprint(root: Path, names: Sequence[str]) -> str:
    """A short hash of the names and the content of files below ``root``.

    Files of more than 16 GiB in all are known by name and size only. The hash is remembered under the
    names, sizes and times of change, so that files are read for it once.
    """
    states = []
    for name in names:
        try:
            states.append((root / name).stat())
        except OSError as fault:
            raise DataError(f"{root / name} cannot be read: {fault.strerror}") from None
        if not stat.S_ISREG(states[-1].st_mode):  # a pipe would be waited for, and a device may have no end
            raise DataError(f"{root / name} is no file", "Remove it")
    sizes = [state.st_size for state in states]
    if sum(sizes) > 16 * GIB:
        return config.digest(list(names), sizes)
    times = [state.st_mtime_ns for state in states]
    stamp = config.digest(str(root.resolve()), list(names), sizes, times, length=24)
    note = paths.cache() / "fingerprints" / stamp
    if note.is_file():
        return note.read_text(encoding="ascii")
    total = hashlib.sha256()
    for name in names:
        try:
            with (root / name).open("rb") as stream:
                total.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
        except OSError as fault:
            raise DataError(f"{root / name} cannot be read: {fault.strerror}") from None
    found = total.hexdigest()[:12]
    with writing(note):
        _write_whole(note, found)
    return found


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns a failure to write at ``place`` into a DataError with the remedy."""
    try:
        yield
    except OSError as fault:
        raise DataError(
            f"{place} cannot be written: {fault.strerror or fault}",
            "Point MIMBENCH_CACHE at a folder that is writable and has room",
        ) from None


def _write_whole(place: Path, text: str) -> None:
    """Writes a small file so that readers see all of it or nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=place.parent)
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(text)
    os.replace(part, place)
