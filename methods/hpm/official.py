"""The authors' code (Haochen-Wang409/HPM): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import official_decoder_shape, official_shape

from .method import Config, Model

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
NETWORKS = {"model": "student", "ema": "teacher"}  # a checkpoint's state_dict and its ema_state_dict


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedAutoencoderViT`` and of its ``generate_mask``."""
    if options["vis_mask_ratio"]:
        raise ConfigError("vis_mask_ratio above 0 is not supported: it is UM-MAE's and off in HPM's scripts")
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=official_decoder_shape(options),
        mask_ratio=options["mask_ratio"],
        hard_share=(0.0, 0.5) if options["guide"] else (0.5, 0.5),
        relative=options["relative"],
        normalise_target=options["norm_pix_loss"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names, with ``model.`` or ``ema.`` in front, to those of our student and teacher."""
    return {_ours(name): value for name, value in state_dict.items()}


def _ours(name: str) -> str:
    network, _, rest = name.partition(".")
    if network not in NETWORKS:  # one network's state dict by itself
        network, rest = "model", name
    if rest.startswith(ENCODER):
        rest = f"backbone.{rest}"
    for part in ("blocks", "norm", "pred"):
        rest = rest.replace(f"decoder_{part}_losspred.", f"loss_predictor.{part}.")
        rest = rest.replace(f"decoder_{part}.", f"reconstructor.{part}.")
    return f"{NETWORKS[network]}.{rest}"


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs.

    The authors shuffle the patches that are not mined and keep the first ones; as noise this is each patch's
    place in the shuffled list.
    """
    images, shuffle = arrays["images"], arrays["shuffle"]
    difficulty = model.difficulty(images)
    hard = difficulty.shape[1] - shuffle.shape[1]
    hardest = difficulty.argsort(dim=1)[:, shuffle.shape[1] :]
    others = torch.ones_like(difficulty).scatter(1, hardest, 0.0).bool()
    noise = torch.zeros_like(difficulty)
    noise[others] = shuffle.argsort(dim=1).flatten().float()
    outputs = model(images=images, noise=noise, hard=torch.full((len(images),), hard))
    vit = model.student.backbone
    with torch.no_grad():
        tokens = vit(vit.embed(images))
        features = model.encoder()(images).pooled
    return {**outputs, "features": features, "features_tokens": tokens}
