"""A method's views, masks and reconstructions as pictures, drawn by the code that trains."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from mimbench import config, data, registry, seeds
from mimbench.data import Split
from mimbench.encoder import InputSpec
from mimbench.errors import ConfigError
from mimbench.models.vit import patchify, unpatchify

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


def reconstructions(model: Any, split: Split) -> Image.Image:
    """One row per image of ``split``: the image, what the encoder saw of it, and the trained model's prediction.

    Hidden patches or frequencies show what was predicted, visible ones the image. Where the target was standardised
    patch by patch, the prediction has lost each patch's mean and deviation and is shown with the true ones, as the
    authors of MAE do. Raises ConfigError for a method that predicts no pixels.
    """
    model = model.eval()
    batch = split.batch(torch.arange(ROWS) * (len(split) // ROWS), needs=model.needs)
    with torch.no_grad():
        drawn = model.views(batch, seeds.generator("cpu", "picture"))
        outputs = model(**drawn)
    images = {name: value for name, value in drawn.items() if value.ndim == 4 and value.shape[1] == 3}
    # Of two views the one that is not remembered in full is predicted: CroCo remembers the second, CropMAE the first.
    target = images.get("images", images.get("images1" if "latent2" in outputs else "images2"))
    pred, mask = outputs.get("pred"), outputs.get("mask")
    if target is None or pred is None:
        raise ConfigError("the method predicts no pixels, so it reconstructs nothing")
    if pred.shape != target.shape:
        patch = math.isqrt(pred.shape[-1] // 3)
        true = patchify(target, patch) if patch and target.shape[-1] % patch == 0 else target
        if "loss_pred" in outputs and mask is not None:  # HPM lists what is visible first
            pred = torch.zeros_like(pred).scatter(
                1, mask.argsort(dim=1, stable=True)[..., None].expand_as(pred), pred
            )
        if pred.shape != true.shape:
            raise ConfigError("the method predicts no pixels, so it reconstructs nothing")
        if getattr(model.config, "normalise_target", True):
            pred = pred * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        pred = unpatchify(pred, patch)
    kept = drawn.get("mask")
    if "corrupted" in drawn and kept is not None and kept.dtype == torch.bool:  # MFM: of the spectrum
        kept = torch.fft.ifftshift(kept, dim=(1, 2))[:, None]
        spectrum = torch.where(kept, torch.fft.fft2(target), torch.fft.fft2(pred))
        pred = torch.fft.ifft2(spectrum).real
    shown, predicted = _pixels(target, model.input), _pixels(pred, model.input)
    if mask is None or "corrupted" in drawn:
        seen = _pixels(drawn.get("corrupted", target), model.input)
        return _sheet({"image": shown, "what is seen": seen, "predicted": predicted})
    hidden = _upsampled(mask, shown)
    columns = {"image": shown, "what is seen": _visible(shown, mask)}
    return _sheet(columns | {"predicted": shown * (1 - hidden) + predicted * hidden})


def _pixels(images: Tensor, spec: InputSpec) -> Tensor:
    """Normalised images (B, 3, H, W) back in [0, 1]."""
    mean, std = torch.tensor(spec.mean).view(1, 3, 1, 1), torch.tensor(spec.std).view(1, 3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def _visible(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, H, W) with the patches greyed that ``mask`` (B, L) or (B, h, w) hides with 1."""
    hidden = _upsampled(mask, images)
    return images * (1 - hidden) + 0.85 * hidden


def _upsampled(mask: Tensor, images: Tensor) -> Tensor:
    """A mask (B, L) or (B, h, w) at the size of images: (B, 1, H, W) float."""
    side = round(mask[0].numel() ** 0.5)
    return F.interpolate(mask.reshape(len(mask), 1, side, side).float(), size=images.shape[2:])


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
