"""The authors' code (facebookresearch/SlowFast, image variant): its checkpoints, its options, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import official_shape
from mimbench.models.vit import ViTEncoder

from .method import Config, Model

HEAD = {"pred_head.transforms.0.0.": "head.0.", "pred_head.projections.0.": "head.1."}


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the settings of the authors' ``MaskMViT``, without pooling, and of its ``HOGLayerC``."""
    if options["hog_gaussian_window"] or options["pretrain_depth"] != [options["depth"] - 1]:
        raise ConfigError(
            "a Gaussian window and predictions of inner blocks are not supported: MaskFeat has neither"
        )
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        mask_ratio=options["mask_ratio"],
        cell=options["hog_cell"],
        bins=options["hog_nbins"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours. Their HOG kernels (``hogs.``) are constants, which ours has in its code."""
    return {_ours(name): value for name, value in state_dict.items() if not name.startswith("hogs.")}


def _ours(name: str) -> str:
    for theirs, ours in HEAD.items():
        name = name.replace(theirs, ours)
    return name if name.startswith(("mask_token", "head.")) else f"backbone.{name}"


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs: ``pred`` at hidden patches only."""
    images, mask = arrays["images"], arrays["mask"].flatten(1).bool()
    outputs = model(images=images, mask=mask)
    with torch.no_grad():
        tokens = model.encode(images, torch.zeros_like(mask))
        features = ViTEncoder(model.backbone, model.input, "class")(images).pooled
    return {
        **outputs,
        "pred": outputs["pred"][mask],
        "target": outputs["target"][mask],
        "target_all": outputs["target"],
        "features": features,
        "features_tokens": tokens,
    }
