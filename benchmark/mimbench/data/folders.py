"""Images as files: one folder per class, or a list of names as Oxford-IIIT Pet has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mimbench import config, foreign
from mimbench.data import encoded, labels, stores
from mimbench.data.decode import EXTENSIONS
from mimbench.data.encoded import Files
from mimbench.data.split import Split
from mimbench.errors import DataError
from mimbench.progress import Progress

MOST_BREEDS = 1000
TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that exists is the test part


def class_folders(name: str, place: Path, progress: Progress | None) -> dict[str, Split]:
    """PLACE/train/<class>/* and PLACE/test/<class>/* (or val), or PLACE/<class>/* divided the same way each time.

    Without class folders the images have no labels. Raises DataError for folders without images.
    """
    folders = {"all": place}
    if (place / "train").is_dir():
        folders = {"all": place / "train"}
        test = next((place / part for part in TEST_FOLDERS if (place / part).is_dir()), None)
        if test:
            folders = {"train": place / "train", "test": test}
    listed = {part: _scan(folder) for part, folder in folders.items()}
    empty = [str(folders[part]) for part, images in listed.items() if not images]
    if empty:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{' and '.join(empty)} holds no images", f"Files that end in {kinds} are looked for")
    seen = {label for images in listed.values() for _, label in images}
    flat = [str(folders[part]) for part, images in listed.items() if any(not label for _, label in images)]
    if flat and seen != {""}:
        raise DataError(
            f"{flat[0]} has images outside class folders, though there are class folders too",
            "Put each image into the folder of its class",
        )
    bare = sorted({c.name for folder in folders.values() for c in _class_folders(folder)} - seen)
    if bare:
        raise DataError(f"class folder(s) {', '.join(bare[:5])} of {place} hold no images")
    sources = {part: Files(folders[part], [file for file, _ in images]) for part, images in listed.items()}
    values = [[label for _, label in images] for images in listed.values()]
    return _splits(name, sources, values if seen != {""} else None, (), progress)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _scan(folder: Path) -> list[tuple[str, str]]:
    """Every image below a folder with the name of its class, the first folder on its path; sorted."""
    found = []
    try:
        files = list(_walk(str(folder)))
    except OSError as fault:
        raise DataError(f"{fault.filename} cannot be read: {fault.strerror}") from None
    for file in files:
        name = os.path.relpath(file, folder).replace(os.sep, "/")
        head, slash, _ = name.partition("/")
        found.append((name, head if slash else ""))
    return sorted(found)


def _walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    state = os.stat(folder)
    here = (state.st_dev, state.st_ino)
    if here in above:
        raise DataError(f"{folder} is a link to a folder that it lies in", "Remove the link")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, (*above, here))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield entry.path


def pets(name: str, place: Path, progress: Progress | None) -> dict[str, Split]:
    """Oxford-IIIT Pet: annotations/trainval.txt and test.txt list "image class-id species breed"."""
    sources, values = {}, []
    breeds: dict[int, str] = {}
    for part, listing in (("train", "trainval.txt"), ("test", "test.txt")):
        file = place / "annotations" / listing
        try:
            rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
            pairs = [(row[0], int(row[1]) - 1) for row in rows if row and not row[0].startswith("#")]
        except (OSError, ValueError, IndexError) as fault:
            raise DataError(f"{file} cannot be read: {fault}", f"Remove {place} and get it again") from None
        if not pairs:
            raise DataError(f"{file} lists no images")
        foreign.below((image for image, _ in pairs), file)
        if (most := max(number for _, number in pairs)) >= MOST_BREEDS:
            raise DataError(f"{file} names the class {most + 1}", f"Remove {place} and get it again")
        breeds |= {number: image.rpartition("_")[0].replace("_", " ") for image, number in pairs}
        sources[part] = Files(place / "images", [f"{image}.jpg" for image, _ in pairs])
        values.append([number for _, number in pairs])
    classes = tuple(breeds.get(number, str(number + 1)) for number in range(max(breeds) + 1))
    return _splits(name, sources, values, classes, progress)


def _splits(
    name: str,
    sources: dict[str, Files],
    values: Sequence[Sequence[str | int]] | None,
    names: tuple[str, ...],
    progress: Progress | None,
) -> dict[str, Split]:
    known: list[torch.Tensor | None] = [None] * len(sources)
    classes: tuple[str, ...] = ()
    if values:
        known[:], classes = labels.encode(values, names, name)
    found = {}
    for (part, source), numbers in zip(sources.items(), known, strict=True):
        content = encoded.fingerprint(source.root, source.names)
        store = stores.open_store(source, content, f"{name} {part}", progress=progress)
        found[part] = Split(
            dataset=name,
            part=part,
            store=store,
            classes=classes,
            fingerprint=config.digest(content, classes, numbers.tolist() if numbers is not None else None),
            index=torch.arange(len(store)),
            all_labels=numbers,
            note=stores.note(source),
        )
    if "all" in found:
        return labels.divide(found["all"], [image.encode() for image in sources["all"].names])
    return found
