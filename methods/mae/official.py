"""The authors' code (facebookresearch/mae): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.models.vit import ViTShape

from .method import Config, Decoder, Model

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedAutoencoderViT``."""
    return Config(
        image_size=options["img_size"],
        backbone=ViTShape(
            options["patch_size"],
            options["embed_dim"],
            options["depth"],
            options["num_heads"],
            options["mlp_ratio"],
        ),
        decoder=Decoder(options["decoder_embed_dim"], options["decoder_depth"], options["decoder_num_heads"]),
        mask_ratio=options["mask_ratio"],
        normalise_target=options["norm_pix_loss"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours: the encoder's get the prefix ``backbone.``, the decoder's stay."""
    return {f"backbone.{k}" if k.startswith(ENCODER) else k: v for k, v in state_dict.items()}


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    outputs = model(images=arrays["images"], noise=arrays["noise"])
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(arrays["images"]))
        features = model.encoder()(arrays["images"]).pooled
    return {**outputs, "features": features, "features_tokens": tokens}
