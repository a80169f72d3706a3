"""The authors' code (alexandre-eymael/CropMAE): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import from_official_name, official_shape

from .method import Config, CrossDecoder, Model


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``SiameseMAE``."""
    if not options["norm_pix_loss"]:
        raise ConfigError("norm_pix_loss = false is not supported: the authors' scripts always normalise")
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=CrossDecoder(
            options["decoder_embed_dim"],
            options["decoder_depth"],
            options["decoder_num_heads"],
            options["decoder_dim_feedforward"],
            options["dropout"],
        ),
        mask_ratio=options["mask_ratio"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names, which are MAE's, to ours."""
    return {from_official_name(name): value for name, value in state_dict.items()}


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    outputs = model(**{name: arrays[name] for name in ("images1", "images2", "noise")})
    patches = model.encoder()(arrays["images1"]).patches
    return {
        **outputs,
        "features": patches.flatten(2).transpose(1, 2),
        "features_tokens": outputs["latent1"],
    }
