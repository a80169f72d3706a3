"""The authors' code (UCSC-VLAA/DMAE): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import from_official_name, official_decoder_shape, official_shape

from .method import Config, Model

ONLY = {
    "embedding_distillation_func": "L1",
    "aligned_feature_projection_mode": "fc-1layer",
    "student_reconstruction_target": "original_img",
}
TEACHER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' two models, the teacher's with ``teacher_`` in front.

    Raises ConfigError for what their published command does not use.
    """
    for name, value in ONLY.items():
        if options[name] != value:
            raise ConfigError(f"{name} = {options[name]} is not supported: the authors' command has {value}")
    names = ("embed_dim", "depth", "num_heads", "mlp_ratio")
    teacher = options | {name: options[f"teacher_{name}"] for name in names}
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=official_decoder_shape(options),
        teacher_backbone=official_shape(teacher),
        student_layers=tuple(options["aligned_blks_indices"]),
        teacher_layers=tuple(options["teacher_aligned_blks_indices"]),
        mask_ratio=options["mask_ratio"],
        normalise_target=options["norm_pix_loss"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours: the student's, with ``model.`` in front or nothing, and those after ``teacher.``.

    The teacher's decoder, its mask token included, is left out: our teacher is an encoder. The authors run that
    decoder, but use what it gives for another target than the published one alone.
    """
    ours = {}
    for name, value in state_dict.items():
        if name.startswith("teacher."):
            if name.removeprefix("teacher.").startswith(TEACHER):
                ours[name] = value
        else:
            ours[_student(name.removeprefix("model."))] = value
    return ours


def _student(name: str) -> str:
    return from_official_name(name.replace("aligned_feature_projection_heads.", "projections."))


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs; its features are as for fine-tuning."""
    images, noise = arrays["images"], arrays["noise"]
    outputs = model(images=images, noise=noise)
    with torch.no_grad():
        tokens = model.backbone(model.backbone.embed(images))
        features = model.encoder().for_finetuning()(images).pooled
    aligned = model.teach(images, noise)[0]
    return {**outputs, "teacher_aligned": aligned, "features": features, "features_tokens": tokens}
