"""The authors' code (TonyLianLong/CrossMAE): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mimbench.errors import ConfigError
from mimbench.models.mae import official_shape

from .method import Config, Decoder, Model

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.")


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedAutoencoderViT`` and of its forward."""
    if not options["weight_fm"]:
        raise ConfigError(
            "weight_fm = false is not supported: the authors' forward then asks for a norm that they never make"
        )
    depth, chosen = options["depth"], list(options["use_fm"])
    # A single -1 means all blocks; elsewhere negative numbers count from the last.
    blocks = None if chosen == [-1] else tuple(block % depth for block in chosen)
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=Decoder(
            options["decoder_embed_dim"],
            options["decoder_depth"],
            options["decoder_num_heads"],
            options["self_attn"],
        ),
        mask_ratio=options["mask_ratio"],
        prediction_ratio=options["kept_mask_ratio"],
        mixed_blocks=blocks,
        mix_input=options["use_input"],
        normalise_target=options["norm_pix_loss"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours: the encoder's get the prefix ``backbone.``, the decoder's stay."""
    renamed = {key.replace("wfm.linear.", "mixture."): value for key, value in state_dict.items()}
    return {f"backbone.{k}" if k.startswith(ENCODER) else k: v for k, v in renamed.items()}


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    outputs = model(images=arrays["images"], noise=arrays["noise"])
    with torch.no_grad():
        features = model.encoder()(arrays["images"]).pooled
        norm, model.backbone.norm = model.backbone.norm, nn.Identity()
        tokens = model.backbone(model.backbone.embed(arrays["images"]))
        model.backbone.norm = norm
    return {
        **outputs,
        "mask": outputs["predicted"],  # theirs is 0 where a patch is neither seen nor decoded
        "latent": outputs["maps"],
        "memory": outputs["memory"].permute(0, 2, 3, 1),
        "features": features,
        "features_tokens": tokens,
    }
