"""The authors' code (liuxingbin/dbot, branch main): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.errors import ConfigError
from mimbench.models.mae import from_official_name, official_decoder_shape, official_shape

from .method import Config, Model


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedAutoencoderViT`` and of its forward."""
    if options["tlayernorm"]:
        raise ConfigError("tlayernorm = 1 is not supported: the authors' commands leave the final norm out")
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=official_decoder_shape(options),
        first_teacher_depth=options["teacher_depth"],
        mask_ratio=options["mask_ratio"],
        normalise_target=options["norm_feature_loss"],
        drop_path=options["drop_path_rate"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names, with ``model.`` or ``teacher.`` in front for their two files, to ours in the first stage."""
    return {_ours(name): value for name, value in state_dict.items()} | {"stage": torch.tensor(0)}


def _ours(name: str) -> str:
    if name.startswith("teacher."):
        return name
    return from_official_name(name.removeprefix("model.")).replace(".predp.", ".pred.")


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs. Their mask has the class token's 1."""
    outputs = model(images=arrays["images"], noise=arrays["noise"])
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(arrays["images"]))
        features = model.encoder().for_finetuning()(arrays["images"]).pooled
    return {
        **outputs,
        "mask": F.pad(outputs["mask"], (1, 0), value=1.0),
        "features": features,
        "features_tokens": tokens,
    }
