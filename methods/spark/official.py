"""The authors' code (keyu-tian/SparK): its checkpoints, its option names, its outputs."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor

from mimbench.models.resnet import ResNetShape

from .method import Config, Model
from .model import ConvNeXtShape

UNUSED = ("imn_m", "imn_s", "norm_black")  # buffers of the authors' ``SparK`` that nothing reads


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the authors' options, the shape of the network spelt out."""
    shape: dict[str, Any]
    if options["encoder"] == "resnet":
        block: Literal["basic", "bottleneck"] = "basic" if options["block"] == "BasicBlock" else "bottleneck"
        shape = {"resnet": ResNetShape(block, tuple(options["layers"]), tuple(options["widths"]))}
    else:
        shape = {"convnext": ConvNeXtShape(tuple(options["depths"]), tuple(options["dims"]))}
    return Config(
        image_size=options["img_size"],
        architecture=options["encoder"],
        drop_path=options["drop_path_rate"],
        mask_ratio=options["mask_ratio"],
        decoder_width=options["decoder_width"],
        **shape,
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours; their mask tokens (1, C, 1, 1) are vectors here."""
    renamed = {}
    for key, value in state_dict.items():
        if key in UNUSED:
            continue
        name = key.replace("sparse_encoder.sp_cnn.", "backbone.", 1)
        name = re.sub(r"^densify_(norm|proj)s\.(\d+)", r"densify.\2.\1", name)
        name = re.sub(r"^mask_tokens\.(\d+)", r"densify.\1.mask_token", name)
        name = name.replace("dense_decoder.dec.", "decoder.blocks.", 1).replace(".up_sample.", ".up.", 1)
        name = name.replace("dense_decoder.", "decoder.", 1)
        renamed[name] = value.flatten() if name.endswith("mask_token") else value
    return renamed


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs.

    ``features`` are those of the dense network in eval mode, before the training step moves its statistics.
    """
    with torch.no_grad():
        features = model.eval().encoder()(arrays["images"])
    outputs = model.train()(images=arrays["images"], noise=arrays["noise"])
    return {
        **outputs,
        "active": 1 - outputs["mask"],
        "features": features.pooled,
        "features_map": features.patches,
    }
