"""Video: the first frame's labels carried from frame to frame by the similarity of frozen patches.

The protocol of the space-time correspondence line (Jabri et al., 2020; videowalk), in which CropMAE and SiamMAE
report. Nothing is trained. Each patch of a frame takes the labels of its most similar patches in the first frame
and in a queue of the last ones: cosine similarity, only patches nearer than ``radius`` in the queue, the best
``topk``, softmax with a temperature. Labels are soft maps on the patch grid; resized bilinearly to the image's own
size, their largest class is the prediction, and masks are scored at their own size. Points (joints) are Gaussian
heat maps on that grid, carried likewise; where a map is highest, there its point is predicted.

``clips``  for short sequences and small encoders: CamVid's drives at one frame a second, cut into clips of four
           frames, and digit-scenes. Chosen by us; no paper reports it.
``davis``  DAVIS-2017 as CropMAE's code evaluates it: J&F over the objects of the first frame.
``vip``    VIP likewise: mean IoU over the pixels of all frames, in which that code counts the given one too.

``jhmdb``  JHMDB likewise: PCK@0.1 and @0.2, the share of joints predicted within that part of 0.6 times the diagonal
           of the person's joints, in the mean over joints. Their code takes the mean of a map's five highest places,
           and leaves out a joint where nothing of its map is left: one outside the first frame, or lost on the way.
           ``details.followed`` says what share of the joints is counted.

Whether there are masks or points is for the data to say, so every recipe runs on both. In the last three the
authors' queue starts full of copies of the first frame, which is ``fill``. Two things differ from their code: frames
are resized bicubically (they: bilinearly, and DAVIS beforehand), and soft maps straight to the mask's size (they:
over the input's).

Labels of the first frames are all that ``Task.clips`` shows of the test split before the predictions are final.
Pixels of ``ignore_index`` give no label and count nowhere. Intervals resample clips; clips of one drive are
alike, so on CamVid they speak of these two drives.

Held against: a plain loop over frames and places, J and F of masks and PCK of points counted by hand, and features
that know the answer, which score 100 (``tests/protocols/test_label_propagation.py``).
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench import config, iou, stats
from mimbench.data import Split
from mimbench.encoder import Encoder, normalise, resize
from mimbench.errors import ConfigError, DataError, MimbenchError
from mimbench.features import frozen
from mimbench.task import Context, Metric, Result, Task

VERSION = 1
NEEDS = ("masks or points", "frames")
RECIPES: dict[str, dict[str, Any]] = {
    "clips": {},
    "davis": {
        **{"clip": None, "size": [480, 880], "queue": 20, "fill": True, "radius": 20.0, "topk": 7},
        **{"temperature": 0.7, "scored": "inner", "semantic": False},
    },
    "vip": {
        **{"clip": None, "long_side": 880, "short_step": 64, "queue": 20, "fill": True, "radius": 20.0},
        **{"topk": 10, "temperature": 0.7, "scored": "all", "primary": "miou"},
    },
    "jhmdb": {
        **{"clip": None, "size": [320, 320], "queue": 20, "fill": True, "radius": 20.0, "topk": 7},
        "temperature": 0.7,
    },
}
PCK = (0.1, 0.2)  # how far off a point may be, in sizes of the person; the first ranks
PERSON = 0.6  # of the diagonal of the box around all points that are followed: the size of a person
TOLERANCE = 0.008  # of the image's diagonal: how far boundaries may lie apart in DAVIS's F
INFERENCE_BATCH = 16  # frames per forward; no score depends on it
AFFINITIES = 4_000_000  # similarities held at once; no score depends on it


@dataclass(frozen=True)
class Settings:
    """Everything that can move the score."""

    recipe: str = "clips"  # the name these settings go by
    clip: int | None = 4  # frames of a clip, of which the first is given; none: whole sequences
    grid: int = 32  # patches along the longer side of an input, unless that would enlarge the image
    size: tuple[int, int] | None = None  # height and width of an input instead, in pixels
    long_side: int | None = None  # longer side of an input instead, in pixels
    short_step: int | None = (
        None  # what the shorter side is cut to a multiple of; none: rounded to the stride
    )
    queue: int = 3  # last frames that a frame looks at, beside the first one
    fill: bool = False  # the queue starts full of copies of the first frame, each of which counts in topk
    radius: float = 6.0  # in patches: those of the queue count if nearer, those of the first frame always
    topk: int = 5  # most similar patches, of all these frames together, whose labels are taken
    temperature: float = 0.1  # a patch of cosine similarity s weighs exp(s / temperature)
    scored: Literal["after_first", "inner", "all"] = "after_first"  # frames; inner: nor the last, as in DAVIS
    semantic: bool = True  # a class means the same in every sequence, so there is a mean IoU over classes
    primary: Literal["j_and_f", "miou"] = "j_and_f"  # the metric that ranks, where there are masks
    sigma: float = 0.5  # in patches: the spread of a point's heat map, which is cut off at three of it
    peaks: int = 5  # highest places of a heat map, whose weighted mean is the point; 1: its arg-max

    def __post_init__(self) -> None:
        config.check(
            self,
            "label_propagation",
            positive=(
                *("grid", "size", "long_side", "short_step", "queue", "radius", "topk", "temperature"),
                *("sigma", "peaks"),
            ),
        )
        if self.clip is not None and self.clip < 2:
            raise ConfigError(
                f"label_propagation.clip = {self.clip} leaves no frame to predict", "Use 2 or more"
            )
        if self.primary == "miou" and not self.semantic:
            raise ConfigError("there is no mean IoU without semantic classes", "Use primary=j_and_f")


class LabelMap(NamedTuple):
    """A predicted label map, packed so that those of many videos fit in memory."""

    position: int  # of the frame in the test split
    packed: bytes
    size: tuple[int, int]

    def unpack(self) -> np.ndarray:
        """(H, W) uint8."""
        return np.frombuffer(zlib.decompress(self.packed), dtype=np.uint8).reshape(self.size)


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """PCK of points; of masks J&F, and the mean IoU where classes have a meaning. Intervals resample clips."""
    clips = task.clips(settings.clip)
    if not clips:
        raise DataError(f"no sequence of '{task.name}' has two frames in its test split")
    if "points" in task.train.offers:
        return evaluate_points(encoder, task, clips, settings, context)
    void = task.test.ignore_index
    with context.stage("propagation"):
        found = [
            predict(encoder, task.test, positions, mask, task.num_classes, settings, context)
            for positions, mask in context.progress.track(clips, "propagating", len(clips))
        ]
    digest = hashlib.sha256()
    for label_map in (m for maps in found for m in maps):
        digest.update(label_map.unpack().tobytes())
    details: dict[str, Any] = {"clips": len(clips), "predictions_sha256": digest.hexdigest()[:16]}

    with context.stage("scores"):
        truth = task.unseal()
        objects = [objects_of(mask.numpy(), task.classes, void) for _, mask in clips]
        chosen = [maps[scored(len(maps), settings.scored)] for maps in found]
        regions = np.stack([region_scores(m, truth, o) for m, o in zip(chosen, objects, strict=True)])
        metrics = j_and_f(regions.sum(1), context.seed)
        if settings.semantic:
            areas = np.stack([areas_of(maps, truth, task.num_classes) for maps in chosen])
            metrics |= iou.metrics(areas, context.seed)
            details["iou"] = by_class(iou.scores(areas.sum(0)).iou, task.classes)
            with np.errstate(invalid="ignore"):  # a class that is no object of any clip has no score
                j, f = regions.sum(0)[:, :2].T / regions.sum(0)[:, 2]
            details |= {"j": by_class(j, task.classes), "f": by_class(f, task.classes)}
    return Result(metrics, settings.primary, details)


def evaluate_points(
    encoder: Encoder, task: Task, clips: list[tuple[Tensor, Tensor]], settings: Settings, context: Context
) -> Result:
    """PCK of the points (J, 2) that the first frame of each clip comes with."""
    with context.stage("propagation"):
        found = [
            predict_points(encoder, task.test, positions, points, settings, context)
            for positions, points in context.progress.track(clips, "propagating", len(clips))
        ]
    digest = hashlib.sha256(b"".join(points.tobytes() for points in found))
    details: dict[str, Any] = {"clips": len(clips), "predictions_sha256": digest.hexdigest()[:16]}

    with context.stage("scores"):
        truth = task.unseal()
        hits = np.stack(
            [
                point_scores(points[frames], truth.points(positions[frames]).numpy())
                for points, (positions, _) in zip(found, clips, strict=True)
                for frames in [scored(len(points), settings.scored)]
            ]
        )
        metrics = pck(hits[..., 1:], context.seed)
        details["followed"] = 100 * float(hits[..., 1].sum() / hits[..., 0].sum())
        details["pck"] = by_class(joint_shares(hits.sum(0)[:, 1:])[:, 0], task.classes)
    return Result(metrics, f"pck_{PCK[0]}", details)


# Propagation


def input_size(height: int, width: int, stride: int, settings: Settings) -> tuple[int, int]:
    """Height and width of the encoder's input for a frame, multiples of ``stride``."""
    if settings.size is not None:
        size = settings.size
    else:
        longer = settings.long_side or min(settings.grid * stride, max(height, width))
        step = settings.short_step
        sides = [side * longer / max(height, width) for side in (height, width)]
        if step is None:
            size = tuple(stride * max(1, int(side / stride + 0.5)) for side in sides)  # type: ignore[assignment]
        else:
            cut = step * max(1, int(min(sides) // step))
            size = (longer, cut) if height > width else (cut, longer)
    if any(side % stride for side in size):
        raise ConfigError(
            f"an input of {size[0]}x{size[1]} is not a multiple of the encoder's stride of {stride}",
            "Choose another label_propagation.size or long_side",
        )
    return size


def unit_patches(
    encoder: Encoder, split: Split, positions: Tensor, settings: Settings, context: Context
) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
    """Unit patch features (P, D) of each frame, with its grid (h, w) and the size (H, W) of the image."""
    for part in positions.split(INFERENCE_BATCH):
        batch = split.batch(part, context.device)
        images = batch.images
        if batch.sizes is not None:
            if len(batch.sizes.unique(dim=0)) > 1:
                raise DataError(f"frames of one sequence of '{split.dataset}' differ in size")
            height, width = batch.sizes[0].tolist()
            images = images[:, :, :height, :width]
        size = (images.shape[2], images.shape[3])
        inputs = normalise(resize(images, input_size(*size, encoder.stride, settings)), encoder.input)
        with frozen(encoder), torch.autocast(images.device.type, enabled=False):
            patches = encoder(inputs).patches.float()
        if not patches.isfinite().all():
            raise MimbenchError(
                f"the encoder's features are not finite for frames of {split.dataset}/{split.part}",
                "Look at the loss curve of the pretraining; a diverged run cannot be scored",
            )
        grid = (patches.shape[2], patches.shape[3])
        for frame in F.normalize(patches, dim=1).flatten(2).transpose(1, 2):
            yield frame, grid, size


def soft_labels(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """What a mask (H, W) says of each patch: (P, K), sampled bilinearly at its centre; a void pixel says nothing."""
    hot = torch.stack([mask == label for label in range(classes)]).float()
    return F.interpolate(hot[None], size=grid, mode="bilinear", align_corners=False)[0].flatten(1).T


def heat_maps(points: Tensor, grid: tuple[int, int], size: tuple[int, int], sigma: float) -> Tensor:
    """A Gaussian around each point (J, 2) of an image of a ``size``, on the grid: (P, J).

    As in the authors' code, which draws patches of its own around a patch: the window begins at the point less
    3 sigma, rounded towards zero, and the centre is ``(6 sigma + 1) // 2`` from there.
    """
    sides = []
    for axis, cells, pixels in ((1, grid[0], size[0]), (0, grid[1], size[1])):
        place = points[:, axis, None] * cells / pixels
        begin, end = (place - 3 * sigma).trunc(), (place + 3 * sigma + 1).trunc()
        at = torch.arange(cells)
        apart = at - begin - (6 * sigma + 1) // 2
        sides.append((-(apart**2) / (2 * sigma**2)).exp() * ((at >= begin) & (at < end)))
    return (sides[0][:, :, None] * sides[1][:, None]).flatten(1).T.float()


def highest(maps: Tensor, grid: tuple[int, int], size: tuple[int, int], peaks: int) -> Tensor:
    """The point in pixels that each heat map (P, J) shows: (J, 2), NaN where the map is zero everywhere."""
    values, where = maps.topk(min(peaks, len(maps)), dim=0)
    weights = values / values.sum(0)
    x, y = (where % grid[1] * weights).sum(0), (where // grid[1] * weights).sum(0)
    return torch.stack([x / grid[1] * size[1], y / grid[0] * size[0]], dim=1)


def predict(
    encoder: Encoder,
    split: Split,
    positions: Tensor,
    mask: Tensor,
    classes: int,
    settings: Settings,
    context: Context,
) -> list[LabelMap]:
    """The label map of each frame of a clip (T,) whose first frame has the ``mask`` (H, W)."""

    def begin(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        return soft_labels(mask[: size[0], : size[1]].to(context.device), grid, classes)

    maps: list[LabelMap] = []
    frames = carried(encoder, split, positions, begin, settings, context)
    for position, (labels, grid, size) in zip(positions.tolist(), frames, strict=True):
        scores = labels.T.view(1, classes, *grid)
        full = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        maps.append(LabelMap(position, zlib.compress(full.to(torch.uint8).cpu().numpy().tobytes(), 1), size))
    return maps


def predict_points(
    encoder: Encoder, split: Split, positions: Tensor, points: Tensor, settings: Settings, context: Context
) -> np.ndarray:
    """(T, J, 2) float64 points of each frame of a clip (T,) whose first frame has these (J, 2); NaN where lost."""

    def begin(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        return heat_maps(points, grid, size, settings.sigma).to(context.device)

    frames = carried(encoder, split, positions, begin, settings, context)
    found = [highest(maps, grid, size, settings.peaks) for maps, grid, size in frames]
    return torch.stack(found).double().cpu().numpy()


def carried(
    encoder: Encoder,
    split: Split,
    positions: Tensor,
    begin: Callable[[tuple[int, int], tuple[int, int]], Tensor],
    settings: Settings,
    context: Context,
) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
    """Soft labels (P, K) of each frame of a clip (T,), with its grid (h, w) and the size (H, W) of the image.

    ``begin`` gives those of the first frame for a grid and a size.
    """
    queue: deque[tuple[Tensor, Tensor]] = deque(
        maxlen=settings.queue
    )  # features and labels of the last frames
    first: tuple[Tensor, Tensor] | None = None
    frames = unit_patches(encoder, split, positions, settings, context)
    for features, grid, size in frames:
        if first is None:
            labels = begin(grid, size)
            first = (features, labels)
            copies = settings.queue if settings.fill else 1
            queue.extend([first] * copies)
        else:
            labels = propagate(features, first, list(queue), grid, settings)
            queue.append((features, labels))
        yield labels, grid, size


def propagate(
    query: Tensor,
    first: tuple[Tensor, Tensor],
    queue: list[tuple[Tensor, Tensor]],
    grid: tuple[int, int],
    settings: Settings,
) -> Tensor:
    """Soft labels (P, K) of a frame's unit features (P, D) from frames given as features (P, D) and labels (P, K)."""
    y, x = torch.meshgrid(*(torch.arange(side, device=query.device) for side in grid), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1)
    labels = torch.cat([frame[1] for frame in (first, *queue)])
    found = []
    for rows in torch.arange(len(query), device=query.device).split(max(1, AFFINITIES // len(query))):
        apart = (places[rows, None] - places[None]).square().sum(2)
        far = apart >= settings.radius**2
        best: dict[int, tuple[Tensor, Tensor]] = {}  # by frame, as the queue may hold copies
        values, where = [], []
        for number, (features, _) in enumerate((first, *queue)):
            key = id(features) if number else 0
            if key not in best:
                similarity = query[rows] @ features.T
                if number:
                    similarity.masked_fill_(far, -torch.inf)
                best[key] = tuple(similarity.topk(min(settings.topk, len(features)), dim=1))  # type: ignore[assignment]
            value, at = best[key]
            values.append(value)
            where.append(at + number * len(features))
        top, pick = torch.cat(values, dim=1).topk(min(settings.topk, sum(v.shape[1] for v in values)), dim=1)
        weights = (top / settings.temperature).softmax(1)
        found.append((weights[:, :, None] * labels[torch.cat(where, dim=1).gather(1, pick)]).sum(1))
    return torch.cat(found)


# Scores


def scored(frames: int, which: str) -> slice:
    """Which frames of a clip count; of a clip of two the second always does."""
    if which == "all":
        return slice(0, None)
    return slice(1, -1 if which == "inner" and frames > 2 else None)


def objects_of(mask: np.ndarray, classes: tuple[str, ...], void: int | None) -> list[int]:
    """The labels to follow: those of the first frame's mask but void and a class called background."""
    return [k for k in np.unique(mask).tolist() if k != void and classes[k : k + 1] != ("background",)]


def truth_of(split: Split, label_map: LabelMap) -> np.ndarray:
    """The mask (H, W) of a predicted frame."""
    height, width = label_map.size
    return split.masks(torch.tensor([label_map.position]))[0, :height, :width].numpy()


def region_scores(maps: list[LabelMap], split: Split, objects: list[int]) -> np.ndarray:
    """For each class (K, 3): J and F in the mean over a clip's frames, and 1; zeros for what is no object."""
    total = np.zeros((len(split.classes), 3))
    if objects and max(objects) >= len(total):
        raise DataError(f"a mask holds label {max(objects)}, but there are {len(total)} classes")
    for label_map in maps:
        prediction, mask = label_map.unpack(), truth_of(split, label_map)
        counted = np.ones_like(mask, bool) if split.ignore_index is None else mask != split.ignore_index
        for k in objects:
            pair = (prediction == k) & counted, (mask == k) & counted
            total[k] += region(*pair), contour(*pair), 1
    return total / len(maps)


def region(prediction: np.ndarray, truth: np.ndarray) -> float:
    """DAVIS's J: intersection over union of two binary masks (H, W), 1 where both are empty."""
    union = (prediction | truth).sum()
    return float((prediction & truth).sum() / union) if union else 1.0


def contour(prediction: np.ndarray, truth: np.ndarray) -> float:
    """DAVIS's F: harmonic mean of precision and recall of the boundaries of two binary masks (H, W).

    A boundary pixel is found if one of the other mask lies within 0.8 % of the diagonal, rounded up.
    Perazzi et al., CVPR 2016; empty boundaries as in the davis2017 evaluation code.
    """
    radius = int(np.ceil(TOLERANCE * np.hypot(*truth.shape)))
    ours, theirs = boundary(prediction), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    precision = dilated(theirs, radius)[ours].mean()
    recall = dilated(ours, radius)[theirs].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a binary mask (H, W) that differ from the one at the right, below, or at the lower right."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """A binary mask (H, W) grown by a disk: painted around its pixels, which are few for a boundary."""
    height, width = mask.shape
    canvas = np.zeros((height + 2 * radius, width + 2 * radius), bool)
    y, x = mask.nonzero()
    steps = range(-radius, radius + 1)
    for down, across in ((d, a) for d in steps for a in steps if d * d + a * a <= radius * radius):
        canvas[y + radius + down, x + radius + across] = True
    return canvas[radius : radius + height, radius : radius + width]


def j_and_f(per_clip: np.ndarray, seed: int) -> dict[str, Metric]:
    """Means over all objects, in percent, from their sums of J, of F and of 1 per clip (N, 3)."""
    if not per_clip[:, 2].any():
        raise DataError("no first frame of the test split shows an object, so there is nothing to follow")
    weights = {"j_and_f": (0.5, 0.5, 0), "j_mean": (1, 0, 0), "f_mean": (0, 1, 0)}
    found = {}
    for name, weight in weights.items():

        def percent(sums: np.ndarray, weight: tuple[float, ...] = weight) -> np.ndarray:
            with np.errstate(invalid="ignore"):  # a resample may hold no object
                return 100 * (sums @ np.array(weight)) / sums[..., 2]

        low, high = stats.bootstrap(per_clip, percent, seed=seed)
        found[name] = Metric(float(percent(per_clip.sum(0))), low, high, len(per_clip))
    return found


def areas_of(maps: list[LabelMap], split: Split, classes: int) -> np.ndarray:
    """Areas (3, K) of a clip's predictions, as ``mimbench.iou`` has them."""
    total = np.zeros((3, classes), np.int64)
    for label_map in maps:
        prediction = torch.from_numpy(label_map.unpack().copy())[None]
        truth = torch.from_numpy(truth_of(split, label_map))[None]
        total += iou.areas(iou.confusion(prediction, truth, classes, split.ignore_index))[0].numpy()
    return total


def point_scores(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each of the points (T, J, 2) its frames, those where it is followed, and hits by ``PCK``: (J, 2 + 2)."""
    followed = ~np.isnan(predicted[..., 0])
    seen = followed[..., None]
    box = np.where(seen, truth, -np.inf).max(1) - np.where(seen, truth, np.inf).min(1)
    person = PERSON * np.linalg.norm(box, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # a single point has no size, and is missed
        off = np.linalg.norm(predicted - truth, axis=2) / person
    return np.stack([np.ones_like(followed), followed, *(off <= share for share in PCK)], axis=2).sum(0)


def joint_shares(hits: np.ndarray) -> np.ndarray:
    """What point_scores (..., J, 1 + 2), summed over clips, say without the first: (..., J, 2), NaN if never seen."""
    with np.errstate(invalid="ignore"):
        return hits[..., 1:] / hits[..., :1]


def pck(per_clip: np.ndarray, seed: int) -> dict[str, Metric]:
    """PCK in percent, in the mean over points, from each clip's frames and hits of each point (N, J, 1 + 2)."""
    if not per_clip[..., 0].any():
        raise DataError("no first frame of the test split shows a point, so there is nothing to follow")
    found = {}
    for number, share in enumerate(PCK):

        def percent(sums: np.ndarray, number: int = number) -> np.ndarray:
            shares = joint_shares(sums)[..., number]
            with np.errstate(invalid="ignore"):  # a resample may show no point
                return 100 * np.nansum(shares, axis=-1) / (~np.isnan(shares)).sum(-1)

        low, high = stats.bootstrap(per_clip, percent, seed=seed)
        found[f"pck_{share}"] = Metric(float(percent(per_clip.sum(0))), low, high, len(per_clip))
    return found


def by_class(values: np.ndarray, classes: tuple[str, ...]) -> dict[str, float | None]:
    """Shares (K,) as percentages by name; None for what has no score."""
    return {
        name: None if np.isnan(value) else 100 * float(value)
        for name, value in zip(classes, values, strict=True)
    }
