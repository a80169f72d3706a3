"""The authors' code (facebookresearch/mae): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.models.mae import from_official_name, official_decoder_shape, official_shape

from .method import Config, Model


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedAutoencoderViT``."""
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=official_decoder_shape(options),
        mask_ratio=options["mask_ratio"],
        normalise_target=options["norm_pix_loss"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours: ``backbone`` holds the encoder, ``decoder`` the rest."""
    return {from_official_name(name): value for name, value in state_dict.items()}


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    outputs = model(images=arrays["images"], noise=arrays["noise"])
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(arrays["images"]))
        features = model.encoder()(arrays["images"]).pooled
    return {**outputs, "features": features, "features_tokens": tokens}
