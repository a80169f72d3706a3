"""Videos as folders of frames beside folders of masks: DAVIS-2017 and VIP as they are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from mimbench import config
from mimbench.data import encoded, stores
from mimbench.data.encoded import Files
from mimbench.data.names import Entry
from mimbench.data.split import Split
from mimbench.errors import DataError

LONGEST_SIDE = 4096  # scores are of masks at their published size, so frames are not reduced as others are


class Layout(NamedTuple):
    """Where the parts of a set of videos lie within its folder."""

    folder: str
    images: str
    masks: str
    test: str  # the list of the videos to test on
    train: str = ""  # that of the others; without one they are all that the first does not name


LAYOUTS = {
    "davis-2017": Layout(
        *("DAVIS", "JPEGImages/480p", "Annotations/480p"),
        *("ImageSets/2017/val.txt", "ImageSets/2017/train.txt"),
    ),
    "vip": Layout("VIP_Fine", "Images", "Annotations/Category_ids", "lists/val_videos.txt"),
}
VOID = 255


def splits(name: str, place: Path, entry: Entry) -> dict[str, Split]:
    """The training and test videos in the folder ``place``; frames without a mask are left out.

    Frames and masks are decoded when they are read, at their own size. Raises DataError for a missing list,
    and for a listed video without frames.
    """
    layout = LAYOUTS[name]
    test = _listed(place / layout.test)
    if layout.train:
        train = _listed(place / layout.train)
    else:
        train = sorted(f.name for f in (place / layout.masks).glob("*") if f.is_dir() and f.name not in test)
    return {
        part: _split(name, part, place, layout, videos, entry)
        for part, videos in (("train", train), ("test", test))
    }


def _listed(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError as fault:
        raise DataError(f"{file} cannot be read: {fault.strerror}", "Unpack the data set again") from None


def _split(name: str, part: str, place: Path, layout: Layout, videos: list[str], entry: Entry) -> Split:
    images: list[str] = []
    masks: list[str] = []
    sequence: list[int] = []
    frame: list[int] = []
    for number, video in enumerate(videos):
        found = {f.stem: f.name for f in (place / layout.images / video).glob("*")}
        stems = sorted(f.stem for f in (place / layout.masks / video).glob("*.png") if f.stem in found)
        if not stems:
            raise DataError(f"{place / layout.images / video} has no frames with masks in {layout.masks}")
        images += [f"{layout.images}/{video}/{found[stem]}" for stem in stems]
        masks += [f"{layout.masks}/{video}/{stem}.png" for stem in stems]
        sequence += [number] * len(stems)
        frame += range(len(stems))
    if not images:
        raise DataError(f"{place} has no videos for its {part} part")
    return Split(
        dataset=name,
        part=part,
        store=stores.Streaming(Files(place, images), longest=LONGEST_SIDE),
        classes=entry.classes,
        fingerprint=config.digest(encoded.fingerprint(place, images + masks), entry.classes),
        index=torch.arange(len(images)),
        all_masks=stores.Streaming(Files(place, masks), 1, LONGEST_SIDE),
        sequence=torch.tensor(sequence),
        frame=torch.tensor(frame),
        ignore_index=VOID,
    )
