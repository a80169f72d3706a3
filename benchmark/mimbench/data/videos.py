"""Videos as folders of frames beside masks or joints: DAVIS-2017, VIP and JHMDB as they are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mimbench import config, foreign
from mimbench.data import encoded, names, stores
from mimbench.data.encoded import Files
from mimbench.data.names import Entry
from mimbench.data.split import Split
from mimbench.errors import DataError

LONGEST_SIDE = 4096  # scores are of masks at their published size, so frames are not reduced as others are


class Layout(NamedTuple):
    """Where the parts of a set of videos lie within its folder."""

    folder: str
    images: str
    labels: str  # masks, or joints
    test: str  # the list of the videos to test on; JHMDB: the folder of its lists
    train: str = ""  # that of the others; without one they are all that the first does not name


LAYOUTS = {
    "davis-2017": Layout(
        *("DAVIS", "JPEGImages/480p", "Annotations/480p"),
        *("ImageSets/2017/val.txt", "ImageSets/2017/train.txt"),
    ),
    "vip": Layout("VIP_Fine", "Images", "Annotations/Category_ids", "lists/val_videos.txt"),
    "jhmdb": Layout("JHMDB", "Rename_Images", "joint_positions", "splits"),
}
JHMDB_SPLIT = "_test_split1.txt"  # of its three splits the one that papers on propagation test on
VOID = 255


def splits(name: str, place: Path, entry: Entry) -> dict[str, Split]:
    """The training and test videos in the folder ``place``; frames without a mask or joints are left out.

    Frames and masks are decoded when they are read, at their own size. Raises DataError for a missing list,
    for a listed video without frames, and for joints that cannot be read.
    """
    layout = LAYOUTS[name]
    if name == "jhmdb":
        train, test = _listed_by_action(place / layout.test)
    elif layout.train:
        train, test = _listed(place / layout.train), _listed(place / layout.test)
    else:
        test = _listed(place / layout.test)
        train = sorted(f.name for f in (place / layout.labels).glob("*") if f.is_dir() and f.name not in test)
    return {
        part: _split(name, part, place, layout, videos, entry)
        for part, videos in (("train", train), ("test", test))
    }


def _listed(file: Path) -> list[str]:
    try:
        names = foreign.read_text(file).split()
    except (OSError, ValueError) as fault:
        why = getattr(fault, "strerror", None) or "it is no text"
        raise DataError(f"{file} cannot be read: {why}", "Unpack the data set again") from None
    foreign.below(names, file)
    return names


def _listed_by_action(folder: Path) -> tuple[list[str], list[str]]:
    """JHMDB's training and test videos as ACTION/VIDEO: each action has a list of ``VIDEO.avi 1`` or ``2``."""
    videos: dict[str, list[str]] = {"1": [], "2": []}
    lists = sorted(f for f in folder.glob(f"*{JHMDB_SPLIT}") if not f.name.startswith("."))
    if not lists:
        raise DataError(f"{folder} has no lists *{JHMDB_SPLIT}", "Unpack the data set again")
    for file in lists:
        words = _listed(file)
        for video, part in zip(words[::2], words[1::2], strict=False):
            if part in videos:  # 0 would mean: in neither
                videos[part].append(f"{file.name.removesuffix(JHMDB_SPLIT)}/{video.removesuffix('.avi')}")
    return videos["1"], videos["2"]


def _split(name: str, part: str, place: Path, layout: Layout, videos: list[str], entry: Entry) -> Split:
    images: list[str] = []
    labels: list[str] = []  # files
    joints: list[np.ndarray] = []
    sequence: list[int] = []
    frame: list[int] = []
    for number, video in enumerate(videos):
        found = {f.stem: f.name for f in (place / layout.images / video).glob("*")}
        if name == "jhmdb":
            stems = sorted((stem for stem in found if stem.isdigit()), key=int)
            labels.append(f"{layout.labels}/{video}/joint_positions.mat")
            joints.append(_joints(place / labels[-1]))
            if len(joints[-1]) > len(stems):
                raise DataError(
                    f"{place / layout.images / video} has {len(stems)} of {len(joints[-1])} frames"
                )
            stems = stems[: len(joints[-1])]
        else:
            stems = sorted(f.stem for f in (place / layout.labels / video).glob("*.png") if f.stem in found)
            labels += [f"{layout.labels}/{video}/{stem}.png" for stem in stems]
        if not stems:
            raise DataError(f"{place / layout.images / video} has no frames with labels in {layout.labels}")
        images += [f"{layout.images}/{video}/{found[stem]}" for stem in stems]
        sequence += [number] * len(stems)
        frame += range(len(stems))
    if not images:
        raise DataError(f"{place} has no videos for its {part} part")
    return Split(
        dataset=name,
        part=part,
        store=stores.Streaming(Files(place, images), longest=LONGEST_SIDE),
        classes=entry.classes,
        fingerprint=config.digest(encoded.fingerprint(place, images + labels), entry.classes),
        index=torch.arange(len(images)),
        all_masks=None if joints else stores.Streaming(Files(place, labels), 1, LONGEST_SIDE),
        all_points=torch.from_numpy(np.concatenate(joints)) if joints else None,
        sequence=torch.tensor(sequence),
        frame=torch.tensor(frame),
        ignore_index=None if joints else VOID,
    )


def _joints(file: Path) -> np.ndarray:
    """(T, 15, 2) float64: x and y in pixels of each joint in each frame, from JHMDB's (2, 15, T) counted from 1."""
    from scipy import io

    try:
        points = io.loadmat(file, variable_names=["pos_img"])["pos_img"]
        x_and_y, count, _ = points.shape
    except Exception:  # what scipy raises for a damaged file has no common parent
        raise DataError(f"{file} cannot be read", "Unpack the data set again") from None
    if (
        points.dtype.kind not in "fiu"
        or (x_and_y, count) != (2, len(names.JHMDB))
        or not np.isfinite(points).all()
    ):
        raise DataError(f"{file} does not hold {len(names.JHMDB)} joints as x and y")
    return points.transpose(2, 1, 0).astype(np.float64) - 1
