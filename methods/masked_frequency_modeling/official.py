"""The authors' code (Jiahao000/MFM): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.encoder import normalise
from mimbench.errors import ConfigError
from mimbench.models.mae import official_shape

from .method import Config, LearnedViT, Model, filtered


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the authors' options of a ViT. Raises ConfigError for switches that no config of theirs sets."""
    size = options["img_size"]
    band = options["mask_radius2"] ** 2 <= 2 * (size // 2) ** 2
    if band or options["with_matrix"] or options["ave_spectrum"] or options["patch_factor"] != 1:
        raise ConfigError("masks of a band, weighted or averaged spectra and spectra of patches are not here")
    return Config(
        image_size=size,
        backbone=official_shape(options),
        radius=options["mask_radius1"],
        low_pass=options["sample_ratio"],
        hidden_only=options["recover_target_type"] == "masked",
        gamma=options["loss_gamma"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours: ``encoder.`` becomes ``backbone.``, the two biases of a block go into its ``qkv``."""
    renamed = {}
    for key, value in state_dict.items():
        name = f"backbone.{key.removeprefix('encoder.')}" if key.startswith("encoder.") else key
        for bias in ("q_bias", "v_bias"):
            name = name.replace(f"attn.{bias}", f"attn.qkv.{bias}")
        renamed[name] = value
    return renamed


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    assert isinstance(model.backbone, LearnedViT)
    mask = arrays["mask"].bool()
    images, corrupted = arrays["images"], filtered(arrays["images"], mask)
    whole = normalise(images, model.input)
    outputs = model(images=whole, corrupted=normalise(corrupted, model.input), mask=mask)
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(whole))
        features = model.encoder().for_finetuning()(whole).pooled
    return {**outputs, "corrupted": corrupted, "features": features, "features_tokens": tokens}
