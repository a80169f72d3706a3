"""Image data in Parquet, in the layout of the Hugging Face hub: a struct {bytes, path}, or plain bytes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mimbench import config
from mimbench.data import encoded, labels, stores
from mimbench.data.encoded import Column, unreadable
from mimbench.data.names import Entry
from mimbench.data.split import Split
from mimbench.errors import DataError
from mimbench.progress import Progress

PART_NAMES = {"train": {"train"}, "val": {"val", "valid", "validation"}, "test": {"test"}}
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
SCENE_COLUMNS = ("mask", "sequence", "frame")
MOST_UNPACKED = 50  # times as large as the file may be what it holds, where that is more than
LITTLE = 2**26  # bytes
VOID = 11  # CamVid's pixels of no class


@dataclass(frozen=True)
class Table:
    """The files of one part of a data set."""

    files: tuple[Path, ...]
    rows: tuple[int, ...]  # of each file
    schema: pa.Schema
    fingerprint: str

    def images(self, column: str) -> Column:
        """The encoded images of a column."""
        return Column(self.files, column, self.rows)

    def values(self, column: str) -> list[Any]:
        """A column of numbers or strings; a missing value is an error that names the row."""
        values: list[Any] = []
        for file in self.files:
            try:
                # As a dictionary: a long text that stands in each row is held once.
                read = pq.read_table(file, columns=[column], read_dictionary=[column])
                values += _listed(read.column(0))
            except (pa.ArrowException, OSError, ValueError) as fault:
                raise unreadable(file, fault) from None
        if None in values:
            row = self.images(column).name(values.index(None))
            raise DataError(f"{values.count(None)} value(s) of '{column}' are missing, the first in {row}")
        return values

    def class_names(self, column: str) -> tuple[str, ...]:
        """The names of integer labels that the hub's metadata give, if any."""
        try:
            info = json.loads((self.schema.metadata or {})[b"huggingface"])
            names = info["info"]["features"][column]["names"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return ()
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if listed else ()


def splits(name: str, place: Path, entry: Entry | None, progress: Progress | None) -> dict[str, Split]:
    """The train and test parts of a Parquet file or of a folder of them.

    What has no test part is divided, the same way every time. CamVid also gets masks and the order of its
    frames. ``entry`` is what is known of a named data set.
    """
    tables = _tables(place, test_part="val" if name == "imagenet" else "test")
    first = next(iter(tables.values()))
    image, label = _image_column(first), _label_column(first)
    scenes = SCENE_COLUMNS if name == "camvid" else ()
    for table in tables.values():
        for column in (image, *filter(None, [label]), *scenes):
            if column not in table.schema.names:
                found = ", ".join(table.schema.names)
                raise DataError(f"{table.files[0]} has no column '{column}'", f"Its columns are {found}")
        for column in scenes:
            kind = table.schema.field(column).type
            if not (_holds_images(kind) if column == "mask" else _names_things(kind)):
                raise DataError(f"the column '{column}' of {table.files[0]} holds {kind}")
    known: list[torch.Tensor | None] = [None] * len(tables)
    classes = entry.classes if entry else ()
    if label:
        values = [table.values(label) for table in tables.values()]
        known[:], classes = labels.encode(values, first.class_names(label) or classes, str(place))
    parts: dict[str, Split] = {}
    for (part, table), numbers in zip(tables.items(), known, strict=True):
        content = config.digest(table.fingerprint, image)
        store = stores.open_store(table.images(image), content, f"{name} {part}", progress=progress)
        parts[part] = Split(
            dataset=name,
            part=part,
            store=store,
            classes=classes,
            fingerprint=config.digest(table.fingerprint, image, label, classes),
            index=torch.arange(len(store)),
            all_labels=numbers,
            note=_note(name, entry, table.images(image)),
        )
        if scenes:
            parts[part] = _with_scenes(parts[part], table, progress)
    if "all" in parts:
        source = first.images(image)
        return labels.divide(parts["all"], [source.name(row).encode() for row in range(len(source))])
    return parts


def _note(name: str, entry: Entry | None, images: Column) -> str:
    """Says so where a data set that is distributed as arrays comes as JPEG, or images are reduced."""
    if entry and entry.raw and (images.sample(1)[0] or b"").startswith(b"\xff\xd8"):
        return f"JPEG re-encoding: {name} (jpeg)"
    return stores.note(images)


def _with_scenes(split: Split, table: Table, progress: Progress | None) -> Split:
    """Masks, and the sequence and time of each frame.

    CamVid's 101 validation frames are left alone: they lie between frames of a training sequence.
    """
    content = config.digest(table.fingerprint, "mask")
    masks = stores.open_store(table.images("mask"), content, f"{split.dataset} masks", 1, progress)
    scenes, times = table.values("sequence"), table.values("frame")
    number = {scene: place for place, scene in enumerate(sorted(set(scenes)))}
    return dataclasses.replace(
        split,
        all_masks=masks,
        sequence=torch.tensor([number[scene] for scene in scenes]),
        frame=torch.tensor([int(re.sub(r"[^0-9]", "", str(time))[-18:] or 0) for time in times]),
        ignore_index=VOID,
    )


def _listed(column: pa.ChunkedArray) -> list[Any]:
    """A column's values."""
    values: list[Any] = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            names = chunk.dictionary.to_pylist()
            values += [None if place is None else names[place] for place in chunk.indices.to_pylist()]
        else:
            values += chunk.to_pylist()
    return values


def _tables(place: Path, test_part: str) -> dict[str, Table]:
    """The parts train and test, or all, of a place. ImageNet's own test labels were never published."""
    if place.is_file():
        return {"all": _open([place], place.parent)}
    files = find(place)
    if not any(files.values()):
        raise DataError(f"{place} holds no *.parquet file")
    parts = {"train": files["train"], "test": files[test_part] or files["val"]}
    if not all(parts.values()):
        parts = {"all": parts["train"] or sorted(file for group in files.values() for file in group)}
    return {part: _open(group, place) for part, group in parts.items()}


def find(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files in a folder and its folders by the part that their name states, or other.

    It looks no deeper, as an ImageNet folder takes long to walk.
    """
    parts: dict[str, list[Path]] = {part: [] for part in (*PART_NAMES, "other")}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]):
        words = set(re.split(r"[^a-z]+", file.relative_to(folder).as_posix().lower()))
        parts[next((part for part, names in PART_NAMES.items() if names & words), "other")].append(file)
    return parts


def _open(files: Sequence[Path], root: Path) -> Table:
    """Reads the footers of the files, which must have the same columns."""
    schemas, rows = [], []
    for file in files:
        try:
            footer = pq.ParquetFile(file)
            schemas.append(footer.schema_arrow)
            rows.append(footer.metadata.num_rows)
            unpacked = _unpacked(footer.metadata)
        except (pa.ArrowException, OSError, ValueError) as fault:
            raise unreadable(file, fault) from None
        size = file.stat().st_size
        if not 0 <= rows[-1] <= size or unpacked > max(MOST_UNPACKED * size, LITTLE):
            raise DataError(
                f"{file} has {size:,} bytes, and claims to hold {rows[-1]:,} rows of {unpacked:,} bytes in all",
                "No images can be packed like that",
            )
        if schemas[-1].names != schemas[0].names:
            raise DataError(f"{file} and {files[0]} have different columns")
    if not sum(rows):
        raise DataError(f"{files[0]} has no rows")
    content = encoded.fingerprint(root, [file.relative_to(root).as_posix() for file in files])
    return Table(tuple(files), tuple(rows), schemas[0], content)


def _unpacked(footer: pq.FileMetaData) -> int:
    """Bytes of all columns once they are unpacked, as the footer states them."""
    groups = (footer.row_group(number) for number in range(footer.num_row_groups))
    return sum(
        group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns)
    )


def _image_column(table: Table) -> str:
    """The column that holds the images: the only one, or the one called image or img."""
    found = [field.name for field in table.schema if _holds_images(field.type)]
    named = [name for name in IMAGE_NAMES if name in found]
    if named or len(found) == 1:
        return (named or found)[0]
    raise DataError(
        f"{table.files[0]} has {len(found) or 'no'} image columns among {', '.join(table.schema.names)}",
        "Call the column of encoded images (bytes, or a struct with bytes) 'image'",
    )


def _label_column(table: Table) -> str | None:
    """The column that holds the class, if there is one: integers or strings called label or the like."""
    for name in LABEL_NAMES:
        if name in table.schema.names and _names_things(table.schema.field(name).type):
            return name
    return None


def _names_things(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
