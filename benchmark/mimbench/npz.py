"""NumPy archives from elsewhere: sizes are compared with what is there before anything is allocated."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from mimbench.errors import DataError

UNPACKED = 100  # times its size may be what an archive unpacks to, where that is more than
LITTLE = 2**26  # bytes
HEADER = 10_000  # bytes of the description of an array


def read(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file whose names are ``wanted``, none of objects, for those are pickles.

    Raises DataError for a file that is damaged, no archive, or claims to hold more than it does.
    """
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            chosen = {name: entry for name, entry in entries.items() if wanted(name)}
            size, unpacked = file.stat().st_size, sum(entry.file_size for entry in chosen.values())
            if unpacked > max(UNPACKED * size, LITTLE):
                raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
            return {name: _array(archive, entry) for name, entry in chosen.items()}
    except Exception as fault:  # what zipfile and NumPy raise for damaged content has no common parent
        reason = str(fault).strip().partition("\n")[0] or type(fault).__name__
        raise DataError(f"{file} cannot be read as .npz: {reason}") from None


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as stream:
        shape, dtype = _description(stream)
        held = entry.file_size - stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds Python objects, which could run code when loaded")
    if (
        min(shape, default=0) < 0
        or math.prod(shape) * dtype.itemsize != held
        or max(shape, default=0) > 2**48
    ):
        raise ValueError(
            f"{entry.filename} holds {held:,} bytes, which are no array of shape {shape} of {dtype}"
        )
    with archive.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False, max_header_size=HEADER)


def _description(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if reader is None:
        raise ValueError(f"it holds an array of format {version}")
    shape, _, dtype = reader(stream, max_header_size=HEADER)
    return shape, dtype
