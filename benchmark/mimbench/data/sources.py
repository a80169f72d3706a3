"""Opening a data set by its name or place."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

from mimbench import compat, foreign, paths
from mimbench.data import arrays, embedded, folders, parquet, videos
from mimbench.data.encoded import writing
from mimbench.data.names import ENTRIES, PLACES, catalogue
from mimbench.data.split import Dataset, Split
from mimbench.errors import DataError, UnknownName
from mimbench.progress import Progress

# What the official archive unpacks to, and the torchvision class that downloads and checks it.
FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "CIFAR10"),
    "cifar100": ("cifar-100-python", "CIFAR100"),
    "stl10": ("stl10_binary", "STL10"),
    "pets": ("oxford-iiit-pet", "OxfordIIITPet"),
}


def load(place: str, progress: Progress | None = None) -> Dataset:
    """The data set of a name (see ``catalogue``), or at ``imagefolder:PATH`` or ``parquet:PATH``.

    A named one is looked for in ``MIMBENCH_DATA``, then in the user's cache, then downloaded where
    torchvision offers it. Images are decoded into the cache the first time. Raises UnknownName, and
    DataError where data are missing or damaged.
    """
    kind, sign, path = place.partition(":")
    if sign and kind in PLACES:
        return _load_place(kind, path, progress)
    if place not in ENTRIES:
        remedy = f"For a folder of images write imagefolder:{place}" if Path(place).is_dir() else ""
        raise UnknownName("data set", place, catalogue(), remedy)
    entry = ENTRIES[place]
    if not entry.layout:
        return embedded.LOADERS[place](place, entry.description, entry.preset)
    splits = _open(place, get(place), progress)
    return Dataset(place, splits["train"], splits["test"], entry.description, entry.preset)


def _open(name: str, place: Path, progress: Progress | None) -> dict[str, Split]:
    """The parts of a named data set that lies at ``place``."""
    if place.name in arrays.CIFAR:
        return arrays.cifar(name, place)
    if place.name == "stl10_binary":
        return arrays.stl10(name, place)
    if place.name == "oxford-iiit-pet":
        return folders.pets(name, place, progress)
    if name in videos.LAYOUTS:
        return videos.splits(name, place, ENTRIES[name])
    if (place / "train").is_dir() and not any(parquet.find(place).values()):
        if not (place / "val").is_dir():
            raise DataError(f"{place} has no val folder", f"Expected: {ENTRIES[name].layout}")
        return folders.class_folders(name, place, progress)
    return parquet.splits(name, place, ENTRIES[name], progress)


def _load_place(kind: str, path: str, progress: Progress | None) -> Dataset:
    place = Path(path).expanduser()
    if not path or not place.exists():
        raise DataError(f"'{path}' does not exist", f"Write {PLACES[kind]}")
    name = f"{kind}:{place.resolve().name}"  # not the whole path: it is private and differs by machine
    if kind == "parquet":
        splits = parquet.splits(name, place, None, progress)
    elif place.is_dir():
        splits = folders.class_folders(name, place, progress)
    else:
        raise DataError(f"'{path}' is a file", f"Write {PLACES[kind]}")
    train, test = splits["train"], splits["test"]
    small = max(train.store.read(train.index[:16])[0].shape[-2:]) <= 64
    text = f"{len(train):,} training and {len(test):,} test images, {len(train.classes)} classes"
    return Dataset(name, train, test, text, "cifar" if small else "paper")


def get(name: str) -> Path:
    """Where a named data set lies, after a download to the cache if it must be and can be."""
    if name not in ENTRIES:
        raise UnknownName("data set", name, ENTRIES)
    if not ENTRIES[name].layout:
        return Path(embedded.__file__).parent
    found = _locate(name)
    if found is None and name in FOLDERS:
        _download(name)
        found = _locate(name)
    if found is None:
        raise _missing(name)
    return found


def _roots() -> list[Path]:
    """Where named data sets are looked for, in this order."""
    return [folder for folder in (paths.data(), paths.cache() / "data") if folder]


def _locate(name: str) -> Path | None:
    for root in _roots():
        if inner := {**FOLDERS, **videos.LAYOUTS}.get(name, ("",))[0]:
            for folder in (root / name / inner, root / inner):
                if folder.is_dir():
                    return folder
        if (root / name / "train").is_dir() or any(parquet.find(root / name).values()):
            return root / name
    return None


def _missing(name: str, why: str = "") -> DataError:
    """What to raise when a data set is nowhere to be found."""
    looked = " or ".join(str(folder) for folder in _roots())
    user = paths.data() or "a folder that MIMBENCH_DATA names"
    return DataError(
        f"'{name}' was not found in {looked}{why}",
        f"Get it from {ENTRIES[name].origin} and put it into {user} as {ENTRIES[name].layout}",
    )


def _download(name: str) -> None:
    """Downloads, checks and unpacks a data set through torchvision, into the cache."""
    compat.torchvision()
    from torchvision import datasets

    folder = paths.cache() / "data" / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if _locate(name):
                return
            try:
                with _plain_files_alone():
                    getattr(datasets, FOLDERS[name][1])(root=str(folder), download=True)
            except DOWNLOAD_FAULTS as fault:
                raise _missing(name, f", and the download failed: {str(fault)[:120]}") from None


# Of the network, the disk, or an archive that is damaged or not what it should be.
DOWNLOAD_FAULTS = (
    *(OSError, RuntimeError, EOFError, ValueError, KeyError, http.client.HTTPException),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, DataError),
)


@contextlib.contextmanager
def _plain_files_alone() -> Iterator[None]:
    """Inside, whoever unpacks a tar archive gets plain files and folders below its folder, or an error.

    torchvision unpacks what it downloads, by a call that trusts the archive before Python 3.14. Zip archives need
    nothing: zipfile makes no links, and drops what leads out of the folder from a name.
    """

    def checked(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        foreign.below([member.name], Path("the archive"))
        if not (member.isreg() or member.isdir()):
            raise tarfile.TarError(f"the archive holds '{member.name}', which is no plain file")
        return member.replace(mode=0o755 if member.isdir() else 0o644, deep=False)

    if not hasattr(tarfile, "data_filter"):
        raise DataError("this Python cannot refuse what an archive unpacks", "Use Python 3.11.4 or newer")
    held = vars(tarfile.TarFile).get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(checked)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = held


def verify(place: str, progress: Progress | None = None) -> list[str]:
    """Reads every image and says what is wrong with a data set, one sentence each; nothing if all is well.

    Checks that each image decodes, that official files have their published MD5 sums and splits their
    published sizes, and that no test image is also a training image.
    """
    try:
        dataset = load(place, progress)
    except DataError as fault:
        return [str(fault)]
    findings = _wrong_sums(place) if place in FOLDERS else []
    expected = ENTRIES[place].sizes if place in ENTRIES else ()
    for split, size in zip((dataset.train, dataset.test), expected, strict=False):
        if len(split) != size:
            findings.append(f"{split.part} has {len(split):,} images where {size:,} were published.")
    seen: dict[str, set[bytes]] = {}
    for split in (dataset.train, dataset.test):
        try:
            seen[split.part] = _pixel_hashes(split)
        except DataError as fault:
            findings.append(str(fault))
    if len(seen) == 2 and (shared := len(seen["train"] & seen["test"])):
        findings.append(f"{shared:,} test image(s) are also in the training split, pixel by pixel.")
    return findings


def _pixel_hashes(split: Split) -> set[bytes]:
    hashes = set()
    for positions in torch.arange(len(split)).split(256):
        images, sizes = split.store.read(split.index[positions])
        for row, image in enumerate(images):
            if sizes is not None:
                image = image[:, : sizes[row, 0], : sizes[row, 1]]
            text = str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()
            hashes.add(hashlib.blake2b(text, digest_size=16).digest())
    return hashes


def _wrong_sums(name: str) -> list[str]:
    """Files of a CIFAR or STL-10 folder whose MD5 sum is not the one that torchvision knows."""
    folder = get(name)
    if folder.name != FOLDERS[name][0]:
        return []
    compat.torchvision()
    from torchvision import datasets

    kind = getattr(datasets, FOLDERS[name][1])
    sums = [*getattr(kind, "train_list", []), *getattr(kind, "test_list", [])]
    wrong = []
    for file, expected in sums:
        with (folder / file).open("rb") as stream:
            if hashlib.file_digest(stream, "md5").hexdigest() != expected:
                wrong.append(f"{folder / file} differs from the published file (MD5).")
    return wrong
