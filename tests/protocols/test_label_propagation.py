"""Label propagation: J and F by hand, each step against a plain loop, and nothing seen but first frames."""

from __future__ import annotations

import dataclasses
import io
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.morphology import dilation, disk
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import config, data, registry
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


def evaluate(encoder: nn.Module, test: Split, folder: Path, **changes: Any) -> Result:
    context = Context(torch.device("cpu"), 0, quiet(), folder / "work")
    return propagation.evaluate(encoder, Task(test, test), settings(**changes), context)


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


def test_real_drives(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips of CamVid: colours of an untrained network already carry the road over three seconds."""
    monkeypatch.setenv("MIMBENCH_DATA", str(real_data))
    result = evaluate(vit(), data.load("camvid").test.subset(torch.arange(8)), tmp_path, grid=16)
    assert result.details["clips"] == 2
    assert result.details["j"]["road"] > 40
    assert 10 < result.metrics["j_and_f"].value < 80
