"""The authors' code (microsoft/unilm, beit2): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import official_shape

from .method import Config, Model
from .model import TokenizerConfig

OURS = ("tokenizer.",)  # they keep the tokenizer in a file of its own
NAMES = {"mask_token": "mask_token", "lm_head": "head", "cls_pt_layers": "aggregate"}


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``VisionTransformerForMaskedImageModelingCLS``."""
    if not options["shared_lm_head"] or not options["use_shared_rel_pos_bias"]:
        raise ConfigError("only a shared head and a shared position bias are supported, as in the paper")
    shape = official_shape(options)
    return Config(
        image_size=options["img_size"],
        backbone=shape,
        layer_scale=options["init_values"],
        drop_path=options["drop_path_rate"],
        hidden=options["num_mask_patches"],
        smallest_block=options["min_mask_patches_per_block"],
        early_layer=options["early_layers"],
        aggregation_depth=options["head_layers"],
        tokenizer=TokenizerConfig(encoder=shape, codes=options["vocab_size"]),
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours."""
    return {_ours(name): value for name, value in state_dict.items()}


def _ours(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{NAMES[first]}{dot}{rest}" if first in NAMES else f"backbone.{name}"


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    images = arrays["images"]
    outputs = model.predict(images, arrays["mask"], arrays["token_indices"])
    with torch.no_grad():
        tokens, _ = model.backbone(model.backbone.patch_embed(images), model.grid)
        features = model.encoder().for_finetuning()(images).pooled
    return {**outputs, "features": features, "features_tokens": tokens}
