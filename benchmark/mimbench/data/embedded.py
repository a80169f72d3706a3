"""Data that comes with the package: handwritten digits, and scenes composed of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mimbench.data.labels import stable_split
from mimbench.data.split import Dataset, InMemory, Split

_FILE = Path(__file__).with_name("digits.npz")

SIDE = 64  # of a scene, in pixels
FRAMES = 4  # of a scene
SCENES = {"train": 300, "test": 75}
CLUTTER, BYSTANDERS = 6, 2  # pieces of digits in the background, small digits before it
BACKGROUND = 10  # mask value of everything that is no whole digit


def _digits() -> tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor]]:
    """Grey levels 0 to 16, (1797, 8, 8) uint8; labels (1797,) int64; the rows of train and of test.

    The digits are the test part of the UCI set of optical digits (Alpaydin and Kaynak, 1998), as
    scikit-learn ships it. About a fifth of each class is for testing.
    """
    with np.load(_FILE) as stored:
        grey, labels = stored["images"], stored["labels"].astype(np.int64)
    train, test = stable_split([image.tobytes() for image in grey], torch.from_numpy(labels))
    return grey, labels, {"train": train, "test": test}


def digits(name: str, description: str, preset: str) -> Dataset:
    """The digits as RGB images of 8x8."""
    grey, labels, rows = _digits()
    levels = np.round(np.arange(17) * 255 / 16).astype(np.uint8)
    pixels = torch.from_numpy(levels[grey])[:, None].expand(-1, 3, -1, -1).contiguous()
    splits = {}
    for part, chosen in rows.items():
        splits[part] = Split(
            dataset=name,
            part=part,
            store=InMemory(pixels),
            classes=tuple("0123456789"),
            fingerprint=_hash(pixels[chosen], torch.from_numpy(labels)[chosen]),
            index=chosen,
            all_labels=torch.from_numpy(labels),
        )
    return Dataset(name, splits["train"], splits["test"], description, preset)


@functools.cache
def digit_scenes(name: str, description: str, preset: str) -> Dataset:
    """Scenes of three digits that move before a moving, cluttered background.

    Scenes of a split hold only digits of that split. Masks give 0 to 9 for digits and 10 for the rest,
    clutter included. The label of a frame is its leading digit: the one drawn largest, and in front.
    """
    grey, labels, rows = _digits()
    splits = {}
    for seed, (part, chosen) in enumerate(rows.items()):
        pixels, masks, leaders = _render(grey[chosen], labels[chosen], SCENES[part], seed)
        splits[part] = Split(
            dataset=name,
            part=part,
            store=InMemory(pixels),
            classes=(*"0123456789", "background"),
            fingerprint=_hash(pixels, masks, leaders),
            index=torch.arange(len(pixels)),
            all_labels=leaders,
            all_masks=InMemory(masks),
            sequence=torch.arange(SCENES[part]).repeat_interleave(FRAMES),
            frame=torch.arange(FRAMES).repeat(SCENES[part]),
        )
    return Dataset(name, splits["train"], splits["test"], description, preset)


LOADERS: dict[str, Callable[[str, str, str], Dataset]] = {"digits": digits, "digit-scenes": digit_scenes}


def _hash(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:12]


def _render(
    grey: np.ndarray, labels: np.ndarray, scenes: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (scenes * 4, 3, 64, 64), masks (scenes * 4, 1, 64, 64) and leading digits (scenes * 4,).

    The same bytes on every machine: the generator's stream is frozen by NumPy, and the arithmetic is of
    single steps that IEEE 754 defines, with sines and cosines rounded well above their last place.
    """
    draw = np.random.RandomState(seed)
    sprites = CLUTTER + BYSTANDERS + 1  # drawn in this order, the leading digit last

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return draw.uniform(low, high, (scenes, *shape))

    chosen = draw.randint(len(grey), size=(scenes, sprites), dtype=np.int64)
    shapes = grey[chosen] / 16
    for scene, sprite in np.ndindex(scenes, CLUTTER):  # clutter is a piece of 5x5 cells
        top, left = draw.randint(4, size=2, dtype=np.int64)
        piece = np.zeros((8, 8))
        piece[top : top + 5, left : left + 5] = 1
        shapes[scene, sprite] *= piece
    shapes = np.pad(shapes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    size = uniform(14, 22, sprites)  # sides of the 8x8 cells, in pixels
    centre = uniform(4, SIDE - 4, sprites, 2)
    speed = uniform(-3, 3, sprites, 2)  # pixels per frame
    size[:, -1], centre[:, -1] = uniform(32, 40), uniform(26, SIDE - 26, 2)
    growth, angle, spin = (
        uniform(-0.05, 0.05, sprites),
        uniform(-0.25, 0.25, sprites),
        uniform(-0.06, 0.06, sprites),
    )
    drift = uniform(-2, 2, 2)  # of the background and its clutter, in pixels per frame
    speed[:, :CLUTTER] = drift[:, None]
    base, texture = uniform(0.3, 0.7, 3), uniform(-0.12, 0.12, 14, 14, 3)
    light = uniform(0, 0.25, sprites, 3)
    colour = np.where(uniform(0, 1, sprites, 1) < 0.5, light, 1 - light)  # far from any background

    line = np.arange(SIDE, dtype=np.float64)
    images = np.empty((scenes, FRAMES, 3, SIDE, SIDE), np.uint8)
    masks = np.empty((scenes, FRAMES, 1, SIDE, SIDE), np.uint8)
    for scene, time in np.ndindex(scenes, FRAMES):
        cells = [(line - drift[scene, axis] * time + 8) / 8 for axis in (0, 1)]
        y, x = np.broadcast_arrays(cells[0][:, None], cells[1][None])
        canvas = base[scene] + _bilinear(texture[scene], y, x)
        mask = np.full((SIDE, SIDE), BACKGROUND, np.uint8)
        for sprite in range(sprites):
            turn = angle[scene, sprite] + spin[scene, sprite] * time
            cos, sin = (round(float(f(turn)) * 4096) / 4096 for f in (np.cos, np.sin))
            side = size[scene, sprite] * (1 + growth[scene, sprite] * time)
            middle = centre[scene, sprite] + speed[scene, sprite] * time
            window = tuple(slice(max(0, int(m - side)), max(0, int(m + side) + 1)) for m in middle)
            y = (line[window[0]] - middle[0])[:, None] * (8 / side)
            x = (line[window[1]] - middle[1])[None] * (8 / side)
            cover = _bilinear(shapes[scene, sprite], cos * y - sin * x + 4.5, sin * y + cos * x + 4.5)
            opacity = np.clip(2.5 * cover - 0.5, 0, 1)
            canvas[window] += opacity[..., None] * (colour[scene, sprite] - canvas[window])
            if sprite >= CLUTTER:
                mask[window][opacity >= 0.5] = labels[chosen[scene, sprite]]
        images[scene, time] = (canvas * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1)
        masks[scene, time, 0] = mask
    leaders = torch.from_numpy(labels[chosen[:, -1]]).repeat_interleave(FRAMES)
    return torch.from_numpy(images).flatten(0, 1), torch.from_numpy(masks).flatten(0, 1), leaders


def _bilinear(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values of a grid (n, n) or (n, n, channels) at points in cells; points outside take the border's."""
    y, x = (np.clip(axis, 0, len(grid) - 1.001) for axis in (y, x))
    row, column = y.astype(np.int32), x.astype(np.int32)
    y, x = y - row, x - column
    if grid.ndim == 3:
        y, x = y[..., None], x[..., None]
    upper = grid[row, column] * (1 - x) + grid[row, column + 1] * x
    lower = grid[row + 1, column] * (1 - x) + grid[row + 1, column + 1] * x
    return upper * (1 - y) + lower * y
