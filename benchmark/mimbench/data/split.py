"""A split of a data set: uint8 images with whatever labels, masks and frame order they come with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mimbench import seeds
from mimbench.errors import DataError, LabelLeak

HOLDOUT_SEED = 20211111  # fixes the validation split of every data set, whatever the run's seed


class Store(Protocol):
    """Where pixels lie: in memory, in a decoded cache on disk, or still encoded."""

    def __len__(self) -> int: ...

    def read(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 images (B, 3, H, W) and their true sizes (B, 2) as height, width.

        Smaller images are padded with zeros at the right and the bottom; sizes is None when all images
        fill the tensor.
        """
        ...


class InMemory:
    """A store whose images all have one size and fit in memory."""

    def __init__(self, images: Tensor) -> None:
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """As ``Store.read``; rows that follow each other are not copied, so nobody may write into them."""
        first, count = int(index[0]) if len(index) else 0, len(index)
        if torch.equal(index, torch.arange(first, first + count, device=index.device)):
            return self.images[first : first + count], None
        return self.images[index.to(self.images.device)], None


@dataclass
class Batch:
    """B images with what was asked for beside them."""

    images: Tensor  # (B, 3, H, W) uint8, padded at the right and the bottom
    sizes: Tensor | None  # (B, 2) true height and width; None when no image is padded
    index: Tensor  # (B,) positions in the split
    labels: Tensor | None = None  # (B,) int64
    masks: Tensor | None = None  # (B, H, W) uint8 class per pixel
    frames: Tensor | None = None  # (B, 3, H, W) uint8: another frame of the same scene
    progress: float = 0.0  # share of training already done, in [0, 1)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Split:
    """Images of one part (train, val, test) of a data set."""

    dataset: str
    part: str
    store: Store
    classes: tuple[str, ...]
    fingerprint: str  # changes with any pixel, label or order
    index: Tensor  # (N,) which rows of the store belong to this split
    all_labels: Tensor | None = None  # (rows of the store,) int64
    all_masks: Store | None = None  # single-channel masks, repeated to the store's layout
    all_points: Tensor | None = None  # (rows, J, 2) float64: x and y of J points, in pixels from 0
    sequence: Tensor | None = None  # (rows,) scene of each frame
    frame: Tensor | None = None  # (rows,) place in time within the scene
    ignore_index: int | None = None  # mask value that no metric counts
    note: str = ""  # what a reader must know, e.g. "JPEG re-encoding"
    sealed: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def offers(self) -> tuple[str, ...]:
        """What stands beside the images: any of labels, masks, points, frames."""
        present = {
            "labels": self.all_labels,
            "masks": self.all_masks,
            "points": self.all_points,
            "frames": self.sequence,
        }
        return tuple(name for name, value in present.items() if value is not None)

    @property
    def labels(self) -> Tensor:
        """(N,) int64 class of each image."""
        if self.sealed:
            raise LabelLeak(f"labels of {self.dataset}/{self.part} were read before all choices were final")
        if self.all_labels is None:
            raise DataError(f"'{self.dataset}' has no labels", "Choose a labelled data set with --dataset")
        return self.all_labels[self.index]

    def masks(self, positions: Tensor) -> Tensor:
        """(B, H, W) uint8 class of each pixel, for some positions of this split."""
        if self.sealed:
            raise LabelLeak(f"masks of {self.dataset}/{self.part} were read before all choices were final")
        if self.all_masks is None:
            raise DataError(f"'{self.dataset}' has no segmentation masks", "Try digit-scenes or camvid")
        return self.all_masks.read(self.index[positions])[0][:, 0]

    def points(self, positions: Tensor) -> Tensor:
        """(B, J, 2) float64 x and y of each point in pixels, for some positions of this split."""
        if self.sealed:
            raise LabelLeak(f"points of {self.dataset}/{self.part} were read before all choices were final")
        if self.all_points is None:
            raise DataError(f"'{self.dataset}' has no points", "Try jhmdb")
        return self.all_points[self.index[positions]]

    def without_labels(self) -> Split:
        """The same images without labels, masks and points; asking for them is a LabelLeak."""
        return dataclasses.replace(self, sealed=True, all_labels=None, all_masks=None, all_points=None)

    def subset(self, positions: Tensor, part: str | None = None) -> Split:
        """Some of this split's images; the fingerprint follows the choice."""
        chosen = self.index[positions]
        rows = hashlib.sha256(self.fingerprint.encode() + chosen.numpy().tobytes()).hexdigest()[:12]
        return dataclasses.replace(self, index=chosen, part=part or self.part, fingerprint=rows)

    def holdout(self, share: float = 0.1) -> tuple[Split, Split]:
        """A fixed (train, validation) division of this split, the same for every run and seed.

        Frames of one scene resemble each other, so scenes stay whole; where there are too few of them for
        that, the last frames of each scene are held out.
        """
        draws = seeds.generator("cpu", HOLDOUT_SEED, self.dataset)
        if self.sequence is None or self.frame is None:
            order = torch.randperm(len(self), generator=draws)
        else:
            scene, time = self.sequence[self.index], self.frame[self.index]
            scenes, number, frames = scene.unique(return_inverse=True, return_counts=True)
            if len(scenes) * share >= 2:
                order = torch.randperm(len(scenes), generator=draws)[number].argsort(stable=True)
            else:
                order = _places_from_end(number, time, frames).argsort(stable=True)
        count = max(1, round(len(self) * share))
        if count >= len(self):
            raise DataError(f"'{self.dataset}' has {len(self)} image(s), too few for a validation split")
        return (
            self.subset(order[count:].sort().values, "train"),
            self.subset(order[:count].sort().values, "val"),
        )

    def clips(self, length: int | None = None) -> list[Tensor]:
        """Positions of the frames of each scene in order of time, cut into clips of ``length`` frames.

        What is left at the end of a scene is a shorter clip; single frames are left out.
        """
        if self.sequence is None or self.frame is None:
            raise DataError(f"'{self.dataset}' has no sequences of frames", "Try digit-scenes or camvid")
        scene, time = self.sequence[self.index], self.frame[self.index]
        order = time.argsort(stable=True)
        order = order[scene[order].argsort(stable=True)]
        scenes = order.split(scene.unique(return_counts=True)[1].tolist())
        return [clip for one in scenes for clip in one.split(length or len(one)) if len(clip) > 1]

    def partners(self, positions: Tensor, gap: tuple[int, int], generator: torch.Generator) -> Tensor:
        """For each position another one of the same scene, ``gap`` = (least, most) frames away.

        Where a scene offers none that far away, the nearest other frame is taken; a scene of one frame
        gives the frame itself.
        """
        if self.sequence is None or self.frame is None:
            raise DataError(f"'{self.dataset}' has no frame pairs", "Try digit-scenes or camvid")
        least, most = max(1, gap[0]), max(1, *gap)
        scene, time = self.sequence[self.index], self.frame[self.index]
        # One number line for all frames, on which scenes lie too far apart to be confused.
        line = scene * (time.max() - time.min() + most + 1) + time - time.min()
        line, order = line.sort(stable=True)
        rank = order.argsort()[positions]
        own = line[rank]
        low, end_low = torch.searchsorted(line, own - most), torch.searchsorted(line, own - least, right=True)
        high, end_high = (
            torch.searchsorted(line, own + least),
            torch.searchsorted(line, own + most, right=True),
        )
        before, after = end_low - low, end_high - high
        noise = torch.rand(len(positions), generator=generator, device=generator.device).cpu()
        pick = (noise * (before + after)).long()
        chosen = torch.where(pick < before, low + pick, high + pick - before)

        previous, following = (rank - 1).clamp(min=0), (rank + 1).clamp(max=len(line) - 1)
        far = torch.iinfo(torch.int64).max
        distances = [
            torch.where(
                (scene[order[mate]] == scene[positions]) & (mate != rank), (line[mate] - own).abs(), far
            )
            for mate in (previous, following)
        ]
        nearest = torch.where(distances[0] <= distances[1], previous, following)
        nearest = torch.where(torch.minimum(*distances) == far, rank, nearest)
        return order[torch.where(before + after > 0, chosen.clamp(max=len(line) - 1), nearest)]

    def batch(
        self,
        positions: Tensor,
        device: torch.device | str = "cpu",
        needs: tuple[str, ...] = (),
        gap: tuple[int, int] = (1, 1),
        generator: torch.Generator | None = None,
    ) -> Batch:
        """The images at ``positions`` (B,) of this split on ``device``, with the ``needs`` beside them."""
        images, sizes = self.store.read(self.index[positions])
        batch = Batch(images.to(device, non_blocking=True), sizes, positions)
        if sizes is not None:
            batch.sizes = sizes.to(device)
        if "labels" in needs:
            batch.labels = self.labels[positions].to(device)
        if "masks" in needs:
            batch.masks = self.masks(positions).to(device)
        if "frames" in needs:
            generator = generator or seeds.generator("cpu", 0)
            second = self.partners(positions, gap, generator)
            batch.frames = self.store.read(self.index[second])[0].to(device)
        return batch

    def batches(
        self, size: int, device: torch.device | str = "cpu", needs: tuple[str, ...] = ()
    ) -> Iterator[Batch]:
        """The whole split in order, in batches of at most ``size``."""
        for positions in torch.arange(len(self)).split(size):
            yield self.batch(positions, device, needs)


def _places_from_end(scene: Tensor, time: Tensor, frames: Tensor) -> Tensor:
    """(N,) how far each frame stands from the end of its scene, as a share of the scene's frames."""
    order = time.argsort(stable=True)
    order = order[scene[order].argsort(stable=True)]  # by scene, then by time
    ends = frames.cumsum(0)
    left = torch.empty(len(scene), dtype=torch.float64)
    left[order] = (ends[scene[order]] - 1 - torch.arange(len(scene))).double() / frames[scene[order]]
    return left


@dataclass(frozen=True)
class Dataset:
    """A named data set with its two parts."""

    name: str
    train: Split
    test: Split
    description: str = ""
    default_preset: str = "cifar"  # the preset that suits its images

    @property
    def fingerprint(self) -> str:
        return f"{self.train.fingerprint}+{self.test.fingerprint}"
