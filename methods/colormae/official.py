"""The authors' code (carlosh93/ColorMAE, on mmpretrain): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import official_decoder_shape, official_shape

from .method import Config, Model

NAMES = (
    ("backbone.layers.", "backbone.blocks."),
    ("backbone.ln1.", "backbone.norm."),
    ("patch_embed.projection.", "patch_embed.proj."),
    ("neck.decoder_", "decoder."),
    ("neck.ln1.", "decoder.norm."),
    ("neck.", "decoder."),
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
)


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the options of the authors' ``ColorMAEViT`` and mmpretrain's decoder and head."""
    if options["in_chans"] != 3:
        raise ConfigError(f"in_chans = {options['in_chans']} is not supported: images have 3 channels")
    mlp_ratio = options["feedforward_channels"] / options["embed_dim"]
    return Config(
        image_size=options["img_size"],
        backbone=official_shape({**options, "mlp_ratio": mlp_ratio}),
        decoder=official_decoder_shape({**options, "mlp_ratio": options["decoder_mlp_ratio"]}),
        mask_ratio=options["mask_ratio"],
        normalise_target=options["norm_pix_loss"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours, by parts of names replaced in the order of ``NAMES``."""
    renamed = {}
    for name, value in state_dict.items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    outputs = model(images=arrays["images"], noise=arrays["noise"])
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(arrays["images"]))
    return {**outputs, "features": tokens[:, 0], "features_tokens": tokens}
