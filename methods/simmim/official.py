"""The authors' code (microsoft/SimMIM, ViT branch): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.models.mae import official_shape

from .method import Config, Model


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``VisionTransformerForSimMIM`` and mask generator."""
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        mask_unit=options["mask_patch_size"],
        mask_ratio=options["mask_ratio"],
        layer_scale=options["init_values"],
        drop_path=options["drop_path_rate"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours: ``encoder.`` becomes ``backbone.``, but for the mask token."""
    renamed = {}
    for key, value in state_dict.items():
        name = key.replace("encoder.", "backbone.", 1) if key.startswith("encoder.") else key
        renamed["mask_token" if name == "backbone.mask_token" else name] = value
    return renamed


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    images = arrays["images"]
    outputs = model(images=images, mask=arrays["mask"])
    with torch.no_grad():
        grid = model.backbone.grid
        tokens, _ = model.backbone(model.backbone.patch_embed(images), grid)
        tuned = model.encoder().for_finetuning()
        features = tuned(images).pooled
    return {**outputs, "features": features, "features_tokens": tokens}
