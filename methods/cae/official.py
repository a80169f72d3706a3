"""The authors' code (Atten4Vis/CAE): its checkpoints, its option names, its outputs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import official_decoder_shape, official_shape
from mimbench.models.vq import TokenizerConfig

from .method import Config, Model

OURS = ("tokenizer.",)  # theirs is DALL-E's, a file of its own
NAMES = (
    (r"^encoder\.", "backbone."),
    (r"^(alignment_encoder|teacher)\.", "alignment."),  # the latter in older checkpoints
    (r"^encoder_to_regresser\.", "project.0."),
    (r"^encoder_to_regresser_norm\.", "project.1."),
    (r"^mask_token$", "regressor.mask_token"),
    (r"^rd_pos_embed$", "places"),
    (r"^regresser\.regressor_blocks\.", "regressor.blocks."),
    (r"^regresser\.", "regressor."),
    (r"^decoder\.decoder_blocks\.", "decoder.blocks."),
    (r"\.norm1_([qkv])\.", r".norm_\1."),
    (r"\.cross_attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.cross_attn\.", ".attn."),
    (r"_cross\b", ""),  # norm2_cross, mlp_cross, gamma_1_cross, gamma_2_cross
)


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``ContextAutoencoderViT`` and of their script."""
    if options["model_type"] != "cae":
        raise ConfigError(f"'{options['model_type']}' is another method", "Only model_type = cae is here")
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        regressor_depth=options["regressor_depth"],
        decoder=official_decoder_shape(options),
        layer_scale=options["init_values"],
        drop_path=options["drop_path_rate"],
        mask_ratio=options["num_mask_patches"] / (options["img_size"] // options["patch_size"]) ** 2,
        smallest_block=options["min_mask_patches_per_block"],
        align_weight=options["align_loss_weight"],
        tokenizer=TokenizerConfig(codes=options["decoder_num_classes"]),
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours. Their positions of regressor and decoder have a row for an unused class token."""
    found = {}
    for name, value in state_dict.items():
        ours = name
        for theirs, replacement in NAMES:
            ours = re.sub(theirs, replacement, ours)
        found[ours] = value[:, 1:] if ours == "places" else value
    return found


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    outputs = model(images=arrays["images"], mask=arrays["mask"], tokens=arrays["token_indices"])
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(arrays["images"]))
        features = model.encoder()(arrays["images"]).pooled
    logits = outputs["pred"].flatten(0, 1)
    return {**outputs, "pred": logits, "features": features, "features_tokens": tokens}
