"""Data sets that are distributed as arrays: CIFAR's pickles and STL-10's binary files."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from mimbench import config
from mimbench.data import encoded, labels, stores
from mimbench.data.split import Split
from mimbench.errors import DataError

# folder: (files of train, files of test, file of class names, its key, key of the labels)
CIFAR = {
    "cifar-10-batches-py": (
        [f"data_batch_{number}" for number in range(1, 6)],
        ["test_batch"],
        ("batches.meta", "label_names"),
        "labels",
    ),
    "cifar-100-python": (["train"], ["test"], ("meta", "fine_label_names"), "fine_labels"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays in plain containers and refuses everything else, as a pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":  # how Python 3 writes bytes for Python 2
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="latin1").load()
    except Exception as fault:  # a damaged pickle can raise anything, from KeyError to MemoryError
        raise _damaged(file, str(fault) or type(fault).__name__) from None
    if not isinstance(content, dict):
        raise _damaged(file, "no table")
    return content


def _damaged(file: Path, why: str) -> DataError:
    return DataError(f"{file} cannot be read: {why}", f"Remove {file.parent} and get it again")


def cifar(name: str, folder: Path) -> dict[str, Split]:
    """CIFAR-10 or CIFAR-100 from the official Python version, unpacked."""
    train, test, (meta, names_key), label_key = CIFAR[folder.name]
    named = _unpickle(folder / meta).get(names_key, ())
    if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
        raise _damaged(folder / meta, f"its '{names_key}' are no names")
    classes = tuple(named)
    parts = {"train": train, "test": test}
    values = [_cifar_labels(folder, files, label_key) for files in parts.values()]
    known, classes = labels.encode(values, classes, str(folder))

    def pixels(files: list[str]) -> Iterator[np.ndarray]:
        for file in files:
            data = _unpickle(folder / file).get("data")
            if not _is_pixels(data):
                raise _damaged(folder / file, "its 'data' is not (N, 3072) of bytes")
            yield data.reshape(-1, 3, 32, 32)

    found = {}
    for (part, files), numbers in zip(parts.items(), known, strict=True):
        content = encoded.fingerprint(folder, files)
        found[part] = _split(name, part, content, pixels(files), numbers, classes)
    return found


def _cifar_labels(folder: Path, files: list[str], key: str) -> list[int]:
    values: list[int] = []
    for file in files:
        table = _unpickle(folder / file)
        numbers, data = table.get(key), table.get("data")
        if not _is_pixels(data):
            raise _damaged(folder / file, "its 'data' is not (N, 3072) of bytes")
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise _damaged(folder / file, f"its '{key}' are no list of whole numbers")
        if len(numbers) != len(data):
            raise _damaged(folder / file, f"its '{key}' do not fit its 'data'")
        values += numbers
    return values


def _is_pixels(data: Any) -> TypeGuard[np.ndarray]:
    return (
        isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    )


def stl10(name: str, folder: Path) -> dict[str, Split]:
    """STL-10's labelled training and test images from the binary version, unpacked.

    Images are stored column by column; labels count from 1.
    """
    try:
        classes = tuple((folder / "class_names.txt").read_text(encoding="utf-8").split())
        values = [np.fromfile(folder / f"{part}_y.bin", np.uint8) for part in ("train", "test")]
    except OSError as fault:
        raise _damaged(Path(fault.filename), str(fault.strerror)) from None
    except UnicodeDecodeError:
        raise _damaged(folder / "class_names.txt", "it is no text") from None
    known, classes = labels.encode([(v.astype(int) - 1).tolist() for v in values], classes, str(folder))

    def pixels(file: Path, count: int) -> Iterator[np.ndarray]:
        try:
            images = np.memmap(file, np.uint8, "r", shape=(count, 3, 96, 96))
        except (OSError, ValueError) as fault:
            raise _damaged(file, str(fault)) from None
        if images.nbytes != file.stat().st_size:
            raise _damaged(file, f"it does not hold {count} images of 96x96")
        yield from (images[start : start + 500].swapaxes(2, 3) for start in range(0, count, 500))

    found = {}
    for part, numbers in zip(("train", "test"), known, strict=True):
        content = encoded.fingerprint(folder, [f"{part}_X.bin", f"{part}_y.bin"])
        chunks = pixels(folder / f"{part}_X.bin", len(numbers))
        found[part] = _split(name, part, content, chunks, numbers, classes)
    return found


def _split(
    name: str,
    part: str,
    content: str,
    chunks: Iterator[np.ndarray],
    numbers: torch.Tensor,
    classes: tuple[str, ...],
) -> Split:
    store = stores.open_arrays(chunks, content)
    return Split(
        dataset=name,
        part=part,
        store=store,
        classes=classes,
        fingerprint=config.digest(content, classes),
        index=torch.arange(len(store)),
        all_labels=numbers,
    )
