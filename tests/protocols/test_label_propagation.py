"""Label propagation: J, F and PCK by hand, each step against a plain loop, nothing seen but first frames."""

from __future__ import annotations

import dataclasses
import io
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from skimage.morphology import dilation, disk
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import config, data, registry, runner
from mimbench.data import InMemory, Split
from mimbench.encoder import Features, InputSpec
from mimbench.errors import ConfigError, DataError, LabelLeak, MimbenchError
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.progress import quiet
from mimbench.task import Context, Result, Task

propagation = registry.load_protocol("label_propagation")
CLASSES = ("a", "b", "c", "background")
VOID = 9
RNG = np.random.default_rng(0)


class Stub(nn.Module):
    """Patch features that are the patch's class, one-hot, or the same everywhere."""

    dim, depth, stride, readout, name = len(CLASSES), 4, 4, "none", "stub"
    input = InputSpec(16, (0.0,) * 3, (1.0,) * 3)

    def __init__(self, constant: bool = False) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        level = (
            (F.avg_pool2d(images.mean(1), 4) * 255 / 60).round().long().clamp(0, 3)
        )  # grey is class times 60
        patches = F.one_hot(level, len(CLASSES)).permute(0, 3, 1, 2).float()
        if self.constant:
            patches = torch.ones_like(patches)
        return Features(patches.mean((2, 3)), patches)


def moving_blocks(scenes: int, frames: int, void: bool = False) -> Tensor:
    """Masks (scenes * frames, 32, 48): two objects of 12x12 that move by a patch a frame over the background."""
    masks = torch.full((scenes, frames, 32, 48), 3, dtype=torch.uint8)
    for scene in range(scenes):
        for frame in range(frames):
            left = 4 * (frame + scene % 3)
            masks[scene, frame, 4:16, left : left + 12] = scene % 2
            masks[scene, frame, 16:28, 36 - left : 48 - left] = 2
            if void:
                masks[scene, frame, :, -2:] = VOID
    return masks.flatten(0, 1)


def video(part: str, masks: Tensor, frames: int, shuffle: bool = True) -> Split:
    """Grey images of the masks, whose frames do not lie in order."""
    number = torch.arange(len(masks))
    order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(0)) if shuffle else number
    masks = masks[order]
    images = masks.masked_fill(masks == VOID, 3)[:, None].mul(60).repeat(1, 3, 1, 1)
    return Split(
        dataset="blocks",
        part=part,
        store=InMemory(images),
        classes=CLASSES,
        fingerprint=part,
        index=number,
        all_masks=InMemory(masks[:, None]),
        sequence=(number // frames)[order],
        frame=(number % frames * 30)[order],
        ignore_index=VOID,
    )


def settings(recipe: str = "clips", **changes: Any) -> Any:
    table = config.merge(propagation.RECIPES[recipe], changes)
    return config.build(propagation.Settings, table | {"recipe": recipe})


def evaluate(encoder: nn.Module, test: Split, folder: Path, recipe: str = "clips", **changes: Any) -> Result:
    context = Context(torch.device("cpu"), 0, quiet(), folder / "work")
    return propagation.evaluate(encoder, Task(test, test), settings(recipe, **changes), context)


def vit() -> ViTEncoder:
    torch.manual_seed(0)
    shape = ViTShape(patch_size=4, width=16, depth=2, heads=2)
    return ViTEncoder(ViT(16, shape), InputSpec(16), "class").eval()


# J and F


def test_j_and_f_of_masks_counted_by_hand() -> None:
    truth = np.zeros((8, 12), bool)
    truth[2:6, 2:6] = True
    near, far = np.roll(truth, 1, axis=1), np.roll(truth, 2, axis=1)
    assert propagation.region(near, truth) == 12 / 20
    assert propagation.region(truth, truth) == 1
    # The boundary is the ring of rows and columns 1 to 5: pixels that differ from one to the right or below.
    ring = np.zeros_like(truth)
    ring[1:6, 1:6] = True
    ring[2:5, 2:5] = False
    assert np.array_equal(propagation.boundary(truth), ring)
    # 0.8 % of the diagonal is rounded up to one pixel, so all is found where the square moves by one. By two, of
    # the ring's 16 pixels those are found in its upper and lower row, but for the left end (4 and 4), and in its
    # right column those next to such a row (2).
    assert propagation.contour(near, truth) == 1
    assert propagation.contour(far, truth) == 10 / 16


def test_f_of_empty_masks() -> None:
    empty, full = np.zeros((6, 6), bool), np.eye(6, dtype=bool)
    assert propagation.contour(empty, empty) == 1
    assert propagation.contour(empty, full) == 0
    assert propagation.contour(full, empty) == 0
    assert propagation.region(empty, empty) == 1


def test_f_is_what_davis_defines() -> None:
    """Against a slow version: every boundary pixel looks for another within the tolerance."""
    for size, count in (((40, 60), 30), ((200, 150), 12)):
        pair = [np.zeros(size, bool) for _ in range(2)]
        for mask in pair:
            for _ in range(count):
                y, x = (RNG.integers(0, side - 8) for side in size)
                mask[y : y + 8, x : x + 8] = True
        radius = math.ceil(0.008 * math.hypot(*size))
        edges = []
        for mask in pair:
            edge = np.zeros(size, bool)
            for y, x in np.ndindex(*size):
                low, right = min(y + 1, size[0] - 1), min(x + 1, size[1] - 1)
                edge[y, x] = len({mask[y, x], mask[low, x], mask[y, right], mask[low, right]}) == 2
            edges.append(edge)
            assert np.array_equal(propagation.boundary(mask), edge)
            assert np.array_equal(propagation.dilated(edge, radius), dilation(edge, disk(radius)))
        points = [np.argwhere(edge) for edge in edges]
        apart = ((points[0][:, None] - points[1][None]) ** 2).sum(2)
        precision = (apart.min(1) <= radius**2).mean()
        recall = (apart.min(0) <= radius**2).mean()
        expected = 2 * precision * recall / (precision + recall)
        assert 0.01 < expected < 0.99
        assert propagation.contour(*pair) == pytest.approx(expected)


def test_objects_are_weighed_alike_and_void_counts_nowhere() -> None:
    masks = moving_blocks(1, 3)
    masks[1:, :4] = VOID
    test = video("test", masks, 3, shuffle=False)
    wrong = masks[1].clone()
    wrong[:4] = 0  # wrong on void pixels only
    wrong[wrong == 2] = 3  # the second object is lost
    maps = [propagation.LabelMap(1, zlib.compress(wrong.numpy().tobytes()), (32, 48))]
    found = propagation.region_scores(maps, test, [0, 2])
    assert found.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    metrics = propagation.j_and_f(np.array([[1.0, 1, 2], [3, 1, 3], [0, 0, 0]]), 0)
    assert metrics["j_mean"].value == pytest.approx(80)
    assert metrics["f_mean"].value == pytest.approx(40)
    assert metrics["j_and_f"].value == pytest.approx(60)
    assert metrics["j_and_f"].low <= 60 <= metrics["j_and_f"].high


# PCK


def test_heat_maps_and_their_peaks_by_hand() -> None:
    # Patches of 16: the points lie at (2.5, 3.5) and (0.5, 2); the third is left of the frame.
    points = torch.tensor([[40.0, 56.0], [8.0, 32.0], [-40.0, 32.0]], dtype=torch.float64)
    maps = propagation.heat_maps(points, (6, 8), (96, 128), 0.5)
    first, second, none = maps.T.view(3, 6, 8)
    across = torch.tensor([0, math.exp(-8), math.exp(-2), 1, math.exp(-2), 0, 0, 0])
    down = torch.tensor([0, 0, math.exp(-8), math.exp(-2), 1, math.exp(-2)])
    torch.testing.assert_close(first, down[:, None] * across)
    # 0.5 - 1.5 is -1, so the first column of the window is outside; and 2 - 1.5 is rounded to 0.
    across = torch.tensor([math.exp(-2), 1, math.exp(-2), 0, 0, 0, 0, 0])
    down = torch.tensor([math.exp(-8), math.exp(-2), 1, math.exp(-2), 0, 0])
    torch.testing.assert_close(second, down[:, None] * across)
    assert not none.any()

    peak = propagation.highest(maps, (6, 8), (96, 128), 1)
    assert peak[:2].tolist() == [[48, 64], [16, 32]]
    assert peak[2].isnan().all()
    # The five highest places of a whole map are its centre and the four beside it.
    torch.testing.assert_close(propagation.highest(maps, (6, 8), (96, 128), 5)[0], peak[0])
    half = maps[:, :1].clone()
    half[4 * 8 + 3] = 0  # without the centre the fifth is a corner, and of four alike any
    x, y = propagation.highest(half, (6, 8), (96, 128), 4)[0].tolist()
    assert (x, y) == (pytest.approx(48), pytest.approx(64))


def test_pck_of_points_counted_by_hand() -> None:
    # Two frames of three joints. The box is 30 x 40, so the person's size is 0.6 * 50 = 30: 3 and 6 pixels count.
    truth = np.array([[[0, 0], [30, 0], [0, 40]]] * 2, float)
    predicted = truth + np.array([[[3, 0], [0, 4], [5, 5]], [[0, 0], [6, 0], [0, -2.9]]])
    one = propagation.point_scores(predicted, truth)
    assert one.tolist() == [[2, 2, 2, 2], [2, 2, 0, 2], [2, 2, 1, 1]]
    # What is lost counts nowhere, not even for the box: 30 x 0 is left of it, so 1.8 and 3.6 pixels count.
    predicted[0, 2] = np.nan
    predicted[1, :2] = np.nan  # a single joint has no size
    two = propagation.point_scores(predicted, truth)
    assert two.tolist() == [[2, 1, 0, 1], [2, 1, 0, 0], [2, 1, 0, 0]]
    never = np.array([[2, 0, 0, 0]] * 3)

    metrics = propagation.pck(np.stack([one, two, never])[..., 1:].astype(float), 0)
    assert metrics["pck_0.1"].value == pytest.approx(100 * (2 / 3 + 0 / 3 + 1 / 3) / 3)
    assert metrics["pck_0.2"].value == pytest.approx(100 * (3 / 3 + 2 / 3 + 1 / 3) / 3)
    assert metrics["pck_0.1"].low <= metrics["pck_0.1"].value <= metrics["pck_0.1"].high
    # A joint that no clip shows is no part of the mean.
    one[2, 1:] = 0
    assert propagation.pck(one[None, :, 1:].astype(float), 0)["pck_0.2"].value == 100
    with pytest.raises(DataError, match="shows a point"):
        propagation.pck(never[None, :, 1:].astype(float), 0)


def walking(scenes: int, frames: int) -> Split:
    """Three joints, each a patch of its own grey, that go a patch to the right with every frame; no masks."""
    masks = torch.full((scenes, frames, 32, 48), 3, dtype=torch.uint8)
    points = torch.zeros(scenes, frames, 3, 2, dtype=torch.float64)
    for joint, (left, top) in enumerate(((8, 8), (16, 16), (12, 24))):
        for frame in range(frames):
            x = left + 4 * frame
            masks[:, frame, top : top + 4, x : x + 4] = joint
            points[:, frame, joint] = torch.tensor([x, top])
    grey = video("test", masks.flatten(0, 1), frames, shuffle=False)
    points = points.flatten(0, 1)
    return dataclasses.replace(
        grey, classes=CLASSES[:3], all_masks=None, all_points=points, ignore_index=None
    )


def test_joints_told_apart_by_features_are_found_and_constants_are_not(tmp_path: Path) -> None:
    test = walking(2, 4)
    exact = evaluate(Stub(), test, tmp_path, peaks=1)
    assert exact.primary == "pck_0.1"
    assert {name: metric.value for name, metric in exact.metrics.items()} == {"pck_0.1": 100, "pck_0.2": 100}
    assert exact.details["followed"] == 100
    assert exact.details["pck"] == {"a": 100, "b": 100, "c": 100}
    constant = evaluate(Stub(constant=True), test, tmp_path, peaks=1)
    assert constant.metrics["pck_0.2"].value < 50
    beside = evaluate(Stub(), test, tmp_path, "jhmdb", size=[32, 48])  # the mean of five places
    assert beside.metrics["pck_0.1"].value <= beside.metrics["pck_0.2"].value <= 100
    assert test.all_points is not None
    test.all_points[:, 2, 0] -= 200  # now outside the frames
    without = evaluate(Stub(), test, tmp_path, peaks=1)
    assert without.details["followed"] == pytest.approx(200 / 3)
    assert without.details["pck"] == {"a": 100, "b": 100, "c": None}


def test_no_points_but_those_of_first_frames_are_shown(tmp_path: Path) -> None:
    """Other points in the other frames change no prediction, and those of first frames do."""
    test = walking(3, 4)
    assert test.frame is not None
    later = test.frame > 0
    outcomes = []
    for rows in (later & False, later, ~later):
        points = test.all_points.clone()
        points[rows] = points[rows].flip(1)
        outcomes.append(evaluate(vit(), dataclasses.replace(test, all_points=points), tmp_path))
    predictions = [outcome.details["predictions_sha256"] for outcome in outcomes]
    assert predictions[0] == predictions[1] != predictions[2]
    assert outcomes[0].metrics != outcomes[1].metrics

    task = Task(test, test)
    for peek in (task.test, task.test.subset(torch.arange(3)), task.test.holdout(0.5)[0]):
        assert peek.offers == ("frames",)
        assert peek.all_points is None
        with pytest.raises(LabelLeak, match="points of blocks"):
            peek.points(torch.arange(1))
    for positions, points in task.clips(4):
        assert torch.equal(points, test.points(positions[:1])[0])
    with pytest.raises(LabelLeak, match="more than the first"):
        task.clips(2)
    assert torch.equal(task.unseal().points(torch.arange(5)), test.all_points[:5])
    with pytest.raises(DataError, match="no points"):
        video("test", moving_blocks(1, 2), 2).points(torch.arange(1))


# Propagation


def slow_step(
    query: Tensor, first: tuple[Tensor, Tensor], queue: list, grid: tuple[int, int], chosen: Any
) -> Tensor:
    """One frame's labels, pixel by pixel."""
    height, width = grid
    out = torch.zeros_like(first[1])
    for place in range(height * width):
        candidates = [(float(query[place] @ key), label) for key, label in zip(*first, strict=True)]
        for keys, labels in queue:
            for other in range(height * width):
                y, x = place // width - other // width, place % width - other % width
                if math.hypot(y, x) < chosen.radius:
                    candidates.append((float(query[place] @ keys[other]), labels[other]))
        best = sorted(candidates, key=lambda pair: -pair[0])[: chosen.topk]
        weights = [math.exp(similarity / chosen.temperature) for similarity, _ in best]
        for weight, (_, label) in zip(weights, best, strict=True):
            out[place] += weight / sum(weights) * label
    return out


@pytest.mark.parametrize("budget", [10**6, 50])
@pytest.mark.parametrize(
    "changes", [{"radius": 2.0, "topk": 7}, {"radius": 1.5, "topk": 100, "temperature": 0.7}]
)
def test_a_step_is_that_of_a_plain_loop(changes: dict, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with copies of the first frame in the queue, more neighbours than there are, and in small pieces."""
    monkeypatch.setattr(propagation, "AFFINITIES", budget)
    generator = torch.Generator().manual_seed(0)
    grid, chosen = (4, 5), settings(**changes)
    frames = [
        (
            F.normalize(torch.randn(20, 6, generator=generator), dim=1),
            torch.rand(20, 3, generator=generator).softmax(1),
        )
        for _ in range(4)
    ]
    query, queue = frames[3][0], [frames[0], frames[0], frames[1], frames[2]]
    found = propagation.propagate(query, frames[0], queue, grid, chosen)
    torch.testing.assert_close(found, slow_step(query, frames[0], queue, grid, chosen))


def test_the_queue_holds_what_the_authors_code_looks_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frame t sees the first frame and frames t - n to t - 1, where those before the first are copies of it."""
    seen: list[list[int]] = []
    frames: list[int] = []

    def watch(query: Tensor, first: tuple, queue: list, grid: tuple, chosen: Any) -> Tensor:
        frames.append(query.data_ptr())
        seen.append([([first[0].data_ptr(), *frames]).index(keys.data_ptr()) for keys, _ in queue])
        return first[1]

    monkeypatch.setattr(propagation, "propagate", watch)
    test = video("test", moving_blocks(1, 6), 6, shuffle=False)
    evaluate(Stub(), test, tmp_path, clip=None, queue=3, fill=True)
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    seen.clear()
    frames.clear()
    evaluate(Stub(), test, tmp_path, clip=None, queue=3)
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize(
    "chosen",
    [{}, {"recipe": "vip", "long_side": 48, "short_step": 16}, {"recipe": "davis", "size": [32, 48]}],
)
def test_true_classes_as_features_score_100_and_constants_do_not(chosen: dict, tmp_path: Path) -> None:
    test = video("test", moving_blocks(4, 4, void=True), 4)
    exact = evaluate(Stub(), test, tmp_path, **chosen)
    assert exact.metrics["j_and_f"].value > 97  # corners are rounded
    assert exact.metrics["j_and_f"].n == 4
    constant = evaluate(Stub(constant=True), test, tmp_path, **chosen)
    assert constant.metrics["j_and_f"].value < 50
    assert constant.metrics.keys() == exact.metrics.keys()
    if chosen.get("recipe") == "davis":
        assert "miou" not in exact.metrics
        return
    assert exact.metrics["miou"].value > 97
    assert exact.details["j"]["background"] is None  # no object, but a class of the mean IoU
    assert exact.details["iou"]["background"] > 97
    assert exact.details["j"]["c"] > 95


def test_clips_follow_time_and_are_cut() -> None:
    test = video("test", moving_blocks(2, 5), 5)
    clips = Task(test, test).clips(2)
    assert [len(positions) for positions, _ in clips] == [2, 2, 2, 2]  # a single frame is left of each scene
    for positions, mask in clips:
        assert test.sequence[positions].unique().numel() == 1
        assert test.frame[positions].diff().tolist() == [30]
        assert torch.equal(mask, test.masks(positions)[0])
    assert [len(positions) for positions, _ in Task(test, test).clips()] == [5, 5]
    with pytest.raises(DataError, match="two frames"):
        evaluate(Stub(), test.subset(torch.arange(1)), Path())


def test_nothing_but_first_frames_is_shown(tmp_path: Path) -> None:
    """Other labels of the other frames change no prediction, and those of first frames do."""
    test = video("test", moving_blocks(3, 4), 4)
    assert test.frame is not None
    later = test.frame > 0
    outcomes = []
    for rows in (later & False, later, ~later):
        masks = test.all_masks.images.clone()
        masks[rows] = (masks[rows] + 1) % len(CLASSES)
        outcomes.append(evaluate(vit(), dataclasses.replace(test, all_masks=InMemory(masks)), tmp_path))
    predictions = [outcome.details["predictions_sha256"] for outcome in outcomes]
    assert predictions[0] == predictions[1] != predictions[2]
    assert outcomes[0].metrics != outcomes[1].metrics

    task = Task(test, test)
    with pytest.raises(LabelLeak, match="more than the first"):
        task.clips(1)
    task.clips(4)
    with pytest.raises(LabelLeak, match="more than the first"):
        task.clips(2)
    with pytest.raises(LabelLeak):
        task.test.masks(torch.arange(1))


def test_no_score_depends_on_how_much_is_done_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = video("test", moving_blocks(2, 7), 7)
    noise = torch.randint(0, 60, test.store.images.shape, generator=torch.Generator().manual_seed(0))
    test = dataclasses.replace(test, store=InMemory((test.store.images + noise).to(torch.uint8)))
    whole = evaluate(vit(), test, tmp_path, clip=7)
    monkeypatch.setattr(propagation, "INFERENCE_BATCH", 3)
    monkeypatch.setattr(propagation, "AFFINITIES", 20_000)
    pieces = evaluate(vit(), test, tmp_path, clip=7)
    assert whole.metrics == pieces.metrics
    assert whole.details == pieces.details


@pytest.mark.parametrize(
    ("recipe", "image", "stride", "expected"),
    [
        ("clips", (360, 480), 4, (96, 128)),
        ("clips", (64, 64), 16, (64, 64)),
        ("clips", (20, 64), 16, (16, 64)),
        ("davis", (480, 854), 16, (480, 880)),
        ("vip", (720, 1280), 16, (448, 880)),  # 495 cut to a multiple of 64
        ("vip", (1280, 720), 8, (880, 448)),
    ],
)
def test_input_sizes(recipe: str, image: tuple, stride: int, expected: tuple) -> None:
    assert propagation.input_size(*image, stride, settings(recipe)) == expected


def test_wrong_settings_and_broken_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no frame to predict"):
        settings(clip=1)
    with pytest.raises(ConfigError, match="without semantic"):
        settings("davis", primary="miou")
    with pytest.raises(ConfigError, match="stride of 4"):
        evaluate(Stub(), video("test", moving_blocks(1, 4), 4), tmp_path, size=[30, 48])
    empty = video("test", torch.full((4, 32, 48), 3, dtype=torch.uint8), 4)
    with pytest.raises(DataError, match="object"):
        evaluate(Stub(), empty, tmp_path)
    broken = vit()
    nn.init.constant_(next(broken.parameters()), math.nan)
    with pytest.raises(MimbenchError, match="not finite"):
        evaluate(broken, video("test", moving_blocks(1, 4), 4), tmp_path)


# Data as users download them


def write_videos(place: Path, layout: str, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """A tiny DAVIS or VIP folder; returns the masks of each video."""
    images, masks = {
        "DAVIS": ("JPEGImages/480p", "Annotations/480p"),
        "VIP_Fine": ("Images", "Annotations/Category_ids"),
    }[layout]
    written = {}
    for video_name, (height, width) in sizes.items():
        for folder in (images, masks):
            (place / layout / folder / video_name).mkdir(parents=True)
        written[video_name] = np.zeros((3, height, width), np.uint8)
        for frame in range(3):
            mask = written[video_name][frame]
            mask[4 : height // 2, 8 + 4 * frame : width // 2] = 1
            mask[height // 2 :, : width // 3] = 2
            picture = Image.fromarray(mask)
            picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            picture.save(place / layout / masks / video_name / f"{frame:05}.png")
            grey = Image.fromarray(np.repeat(mask[..., None] * 60, 3, axis=2))
            stream = io.BytesIO()
            grey.save(stream, "jpeg", quality=95)
            (place / layout / images / video_name / f"{frame:05}.jpg").write_bytes(stream.getvalue())
    return written


@pytest.mark.parametrize(("name", "layout"), [("davis-2017", "DAVIS"), ("vip", "VIP_Fine")])
def test_folders_as_they_are_downloaded(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"put it into .* as {layout}/"):
        data.load(name)
    written = write_videos(tmp_path, layout, {"bear": (48, 64), "swan": (48, 72), "dog": (384, 704)})
    lists = tmp_path / layout / ("ImageSets/2017" if layout == "DAVIS" else "lists")
    lists.mkdir(parents=True)
    (lists / ("val.txt" if layout == "DAVIS" else "val_videos.txt")).write_text("swan\ndog\n")
    if layout == "DAVIS":
        with pytest.raises(DataError, match=r"train\.txt"):
            data.load(name)
        (lists / "train.txt").write_text("bear\n")
    found = data.load(name)
    assert (len(found.train), len(found.test)) == (3, 6)
    assert found.test.offers == ("masks", "frames")
    clips = found.test.clips()
    assert [clip.tolist() for clip in clips] == [[0, 1, 2], [3, 4, 5]]
    for clip, video_name in zip(clips, ("swan", "dog"), strict=True):  # at their own size, 704 pixels too
        assert np.array_equal(found.test.masks(clip).numpy(), written[video_name])
        assert found.test.batch(clip).images.shape[2:] == written[video_name].shape[1:]
    recipe = {"recipe": "davis", "size": [48, 64]}
    if layout != "DAVIS":
        recipe = {"recipe": "vip", "long_side": 64, "short_step": 16}
    exact = evaluate(Stub(), found.test, tmp_path, **recipe)
    assert exact.metrics["j_and_f"].value > 60  # on patches of up to 44 pixels
    assert exact.metrics["j_and_f"].n == 2
    next((tmp_path / layout / "Annotations").rglob("swan/00001.png")).unlink()
    assert len(data.load(name).test) == 5  # a frame without a mask is left out
    (lists / ("val.txt" if layout == "DAVIS" else "val_videos.txt")).write_text("cat\n")
    with pytest.raises(DataError, match="cat has no frames"):
        data.load(name)


def write_jhmdb(
    place: Path, videos: dict[str, int], size: tuple[int, int] = (48, 64)
) -> dict[str, np.ndarray]:
    """A tiny JHMDB folder with the number of frames of each ACTION/VIDEO; returns the points of each."""
    written = {}
    for name, frames in videos.items():
        images, joints = place / "JHMDB/Rename_Images" / name, place / "JHMDB/joint_positions" / name
        images.mkdir(parents=True)
        joints.mkdir(parents=True)
        start = RNG.uniform(0, 1, (15, 2)) * (size[1] - 8, size[0])
        written[name] = start + np.arange(frames)[:, None, None] * (2, 0)
        for frame in range(frames):
            pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{frame + 1:05}.png")
        (images / "._00001.png").write_bytes(b"what a Mac leaves")
        scipy.io.savemat(joints / "joint_positions.mat", {"pos_img": written[name].transpose(2, 1, 0) + 1})
    return written


def test_a_jhmdb_folder_as_it_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"put it into .* as JHMDB/"):
        data.load("jhmdb")
    written = write_jhmdb(tmp_path, {"wave/me_1": 11, "wave/you_2": 3, "run/far!": 4, "run/away": 2})
    with pytest.raises(DataError, match=r"no lists \*_test_split1\.txt"):
        data.load("jhmdb")
    lists = tmp_path / "JHMDB/splits"
    lists.mkdir()
    (lists / "wave_test_split1.txt").write_text("me_1.avi 2\nyou_2.avi 1\n")
    (lists / "run_test_split1.txt").write_text("far!.avi 2 \naway.avi 1 \n")
    (lists / "run_test_split2.txt").write_text("far!.avi 1 \naway.avi 2 \n")
    found = data.load("jhmdb")
    assert (len(found.train), len(found.test)) == (5, 15)
    assert found.test.offers == ("points", "frames")
    assert len(found.test.classes) == 15
    clips = found.test.clips()
    assert [len(clip) for clip in clips] == [4, 11]
    for clip, name in zip(clips, ("run/far!", "wave/me_1"), strict=True):
        np.testing.assert_allclose(found.test.points(clip).numpy(), written[name], atol=1e-12)
        place = tmp_path / "JHMDB/Rename_Images" / name
        for row, image in enumerate(found.test.batch(clip).images):  # in order of their numbers
            expected = np.array(Image.open(place / f"{row + 1:05}.png")).transpose(2, 0, 1)
            assert np.array_equal(image.numpy(), expected)
    result = evaluate(vit(), found.test, tmp_path, "jhmdb", size=[48, 64])
    assert result.metrics["pck_0.1"].n == 2
    assert 0 < result.details["followed"] <= 100

    def targets(*protocols: str, on: str | None = None) -> dict[str, data.Dataset]:
        plan = runner._Plan(runner.Request(("mae",), protocols, "jhmdb", eval_dataset=on))
        return runner._targets(plan, found, quiet())

    assert targets("label_propagation:jhmdb")["label_propagation"] is found
    plan = runner._Plan(runner.Request(("mae",), ("label_propagation",)))
    assert runner._evaluation_data(plan.request, plan.protocols[0], data.load("digits")) == "digit-scenes"
    with pytest.raises(ConfigError, match="segmentation needs masks, which 'jhmdb'"):
        targets("segmentation", on="jhmdb")
    with pytest.raises(ConfigError, match="needs masks or points, which 'digits'"):
        targets("label_propagation", on="digits")

    joints = tmp_path / "JHMDB/joint_positions/wave/me_1/joint_positions.mat"
    scipy.io.savemat(joints, {"pos_img": np.ones((2, 15, 5))})
    assert len(data.load("jhmdb").test) == 4 + 5  # frames without joints are left out
    scipy.io.savemat(joints, {"pos_img": np.ones((2, 15, 12))})
    with pytest.raises(DataError, match="11 of 12 frames"):
        data.load("jhmdb")
    scipy.io.savemat(joints, {"pos_img": np.ones((2, 14, 11))})
    with pytest.raises(DataError, match="15 joints"):
        data.load("jhmdb")
    for damaged in (b"", b"no matrix" * 30):
        joints.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            data.load("jhmdb")


def test_real_drives(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips of CamVid: colours of an untrained network already carry the road over three seconds."""
    monkeypatch.setenv("MIMBENCH_DATA", str(real_data))
    result = evaluate(vit(), data.load("camvid").test.subset(torch.arange(8)), tmp_path, grid=16)
    assert result.details["clips"] == 2
    assert result.details["j"]["road"] > 40
    assert 10 < result.metrics["j_and_f"].value < 80
