"""A method's views and masks as a picture, drawn by the code that trains."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from mimbench import config, data, registry, seeds
from mimbench.encoder import InputSpec
from mimbench.errors import ConfigError

ROWS = 4  # images shown
SIDE = 96  # pixels of one image in the picture
GAP = 6  # pixels between images
CAPTION = 16  # pixels above each column


def views(slug: str, preset: str = "smoke") -> Image.Image:
    """One row per embedded scene: the image, each of the method's views, and what its mask leaves visible."""
    module = registry.load_method(slug)
    settings = config.build(module.Config, registry.method(slug).preset(preset))
    split = data.load("digit-scenes").train
    if getattr(settings, "classes", 0) is None:
        settings = dataclasses.replace(settings, classes=len(split.classes))
    seeds.seed_everything("picture")
    model: Any = module.Model(settings).eval()
    if not hasattr(model, "views"):
        raise ConfigError(f"{slug} trains nothing, so it has no views to draw")
    batch = split.batch(torch.arange(ROWS) * 12, needs=model.needs)
    with torch.no_grad():
        drawn = model.views(batch, seeds.generator("cpu", "picture"))
        mask = model(**drawn).get("mask")
    columns = {"image": batch.images.float() / 255}
    images = {name: value for name, value in drawn.items() if value.ndim == 4 and value.shape[1] == 3}
    for number, (name, value) in enumerate(images.items(), 1):
        columns["view" if len(images) == 1 else f"view {number}"] = _pixels(value, model.input)
        if mask is not None and name == list(images)[-1]:
            columns["what stays visible"] = _visible(_pixels(value, model.input), mask)
    return _sheet(columns)


def _pixels(images: Tensor, spec: InputSpec) -> Tensor:
    """Normalised images (B, 3, H, W) back in [0, 1]."""
    mean, std = torch.tensor(spec.mean).view(1, 3, 1, 1), torch.tensor(spec.std).view(1, 3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def _visible(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, H, W) with the patches greyed that ``mask`` (B, L) or (B, h, w) hides with 1."""
    side = round(mask[0].numel() ** 0.5)
    hidden = F.interpolate(mask.reshape(len(mask), 1, side, side).float(), size=images.shape[2:])
    return images * (1 - hidden) + 0.85 * hidden


def _sheet(columns: dict[str, Tensor]) -> Image.Image:
    width = len(columns) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, CAPTION + ROWS * (SIDE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(columns.items()):
        left = GAP + column * (SIDE + GAP)
        pen.text((left, 3), name, fill="black")
        shown = F.interpolate(images, size=(SIDE, SIDE), mode="nearest")
        for row, pixels in enumerate((shown * 255).round().byte()):
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            sheet.paste(tile, (left, CAPTION + row * (SIDE + GAP)))
    return sheet
