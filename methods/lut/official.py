"""The authors' code (naver-ai/lut): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.models.mae import from_official_name, official_decoder_shape, official_shape

from .method import Config, Heads, Model

NORMS = {"BN": "batch", "LN": "layer", None: "none"}
UNREAD = ("ema.decoder_", "ema.mask_token", "ema.predictor.")  # of their average, which they never run


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedAutoencoderViT_LUT`` and of its training loop."""
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=official_decoder_shape(options),
        heads=Heads(
            options["head_mlp_dim"],
            NORMS[options["head_norm_layer"]],  # type: ignore[arg-type]
            options["head_act_layer"].lower(),
            options["depth_head"],
            options["depth_pred"],
        ),
        mask_ratio=options["mask_ratio"],
        normalise_target=options["norm_pix_loss"],
        mae_weight=options["w_mae"],
        bc_weight=options["w_bc"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names, with ``model.`` or ``ema.`` in front, to ours; what no forward reads is left out."""
    return {_ours(name): value for name, value in state_dict.items() if not name.startswith(UNREAD)}


def _ours(name: str) -> str:
    network, _, rest = name.partition(".")
    if rest.startswith("head."):
        rest = rest.replace("head.", "projector.", 1)
    elif not rest.startswith("predictor."):
        rest = from_official_name(rest)
    return {"model": rest, "ema": f"teacher.{rest}"}.get(network, name)


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    images = arrays["images1"]
    outputs = model(images=images, coloured=arrays["images2"], noise=arrays["noise"])
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(images))
        features = model.encoder().for_finetuning()(images).pooled
    return {**outputs, "features": features, "features_tokens": tokens}
