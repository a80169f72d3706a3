"""The authors' code (Haoqing-Wang/LocalMIM, its ViT): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.models.mae import official_decoder_shape, official_shape

from .method import Config, Model

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.")


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedAutoencoderViT``; layers and scales are fixed in it."""
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=official_decoder_shape(options),
        bins=options["hog_nbins"],
        hog_bias=options["hog_bias"],
        mask_ratio=options["mask_ratio"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours. Their Sobel kernels are constants here; their biases, one per head, one tensor."""
    ours, last = {}, len(config.layers) - 1
    offsets = []
    for name, value in sorted(state_dict.items()):  # heads in order
        if name.startswith("hog_enc."):
            if name.endswith(".bias"):
                offsets.append(value)
        elif name.startswith(ENCODER):
            ours[f"backbone.{name}"] = value
        elif name.startswith(f"norm.{last}."):
            ours[name.replace(f"norm.{last}", "backbone.norm", 1)] = value
        elif name.startswith("norm."):
            ours[name.replace("norm", "norms", 1)] = value
        else:
            ours[name.replace("decoder.", "decoders.", 1).replace(".pred.", ".head.")] = value
    if offsets:
        ours["offsets"] = torch.stack(offsets)
    return ours


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    images = arrays["images"]
    outputs = model(images=images, noise=arrays["noise"])
    with torch.no_grad():
        tuned = model.encoder().for_finetuning()
        tokens = tuned.vit(tuned.vit.embed(images))
        normed = model.backbone(model.backbone.embed(images))
        features = tuned(images).pooled
    return {**outputs, "features": features, "features_tokens": tokens, "features_tokens_normed": normed}
