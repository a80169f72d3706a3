"""The authors' code (facebookresearch/simsiam): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.models.resnet import ResNetShape

from .method import Config, Model


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``SimSiam`` and its torchvision backbone."""
    return Config(
        image_size=options["img_size"],
        backbone=ResNetShape(options["block"], tuple(options["layers"]), tuple(options["widths"])),
        width=options["dim"],
        predictor_hidden=options["pred_dim"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """``encoder.fc.`` is our projector, the rest of ``encoder.`` our backbone; the predictor keeps its name."""
    renamed = {}
    for key, value in state_dict.items():
        name = key.removeprefix("module.").replace("encoder.fc.", "projector.", 1)
        renamed[name.replace("encoder.", "backbone.", 1)] = value
    return renamed


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs.

    ``features`` are read in eval mode with the buffers from before the training step.
    """
    with torch.no_grad():
        features = model.eval().encoder()(arrays["images1"]).pooled
    outputs = model.train()(images1=arrays["images1"], images2=arrays["images2"])
    after = {}
    for ours, theirs in (("backbone.bn1", "encoder.bn1"), ("predictor.1", "predictor.1")):
        norm = model.get_submodule(ours)
        after[f"after/{theirs}.running_mean"] = norm.running_mean
        after[f"after/{theirs}.running_var"] = norm.running_var
    return {**outputs, **after, "features": features}
