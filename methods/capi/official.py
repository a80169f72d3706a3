"""The authors' code (facebookresearch/capi): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mimbench.errors import ConfigError
from mimbench.models.vit import ViTShape

from .method import Config, Model
from .model import Attention

MASKING = {"InverseBlock": "inverse_block", "Block": "block", "Uniform": "random"}
FIXED = {
    "norm_layer_type": "RMSNorm",
    "final_norm_elementwise_affine": False,
    "register_coordinates": "edge",
    "scale_reg_to_visible": True,
    "bias": True,
}
NAMES = {
    "teacher.head.": "clustering.",
    "student.head.last_layer.weight_g": "head.gain",
    "student.head.last_layer.weight_v": "head.direction",
    ".backbone.": ".",
    ".decoder.blocks.": ".predictor.",
    ".encoder.blocks.": ".encoder.",
    ".residual1.fn.rope.": ".attn.",
    ".residual1.fn.": ".attn.",
    ".residual1.norm.": ".norm1.",
    ".residual2.fn.": ".",
    ".residual2.norm.": ".norm2.",
    ".patch_embed.": ".patch_embed.proj.",
}


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the authors' options of ``EncoderDecoder``, the clustering and the masks."""
    for name, value in FIXED.items():
        if options[name] != value:
            raise ConfigError(f"{name} = {options[name]} is not supported: the authors' config has {value}")
    return Config(
        image_size=options["img_size"],
        backbone=ViTShape(
            options["patch_size"], options["embed_dim"], options["encoder_depth"], options["num_heads"]
        ),
        registers=options["n_registers"],
        predictor=options["decoder_depth"],
        drop_path=options["drop_path_rate"],
        prototypes=options["num_clusters"],
        mask_ratio=options["mask_ratio"],
        masking=MASKING[options["masking_generator"]],  # type: ignore[arg-type]
        roll=options["masking_roll"],
        predicted=options["prediction_subsampling"],
        student_temperature=options["student_temp"],
        target_temperature=options["target_temp"],
        clustering_temperature=options["pred_temp"],
        sinkhorn_iterations=options["n_sk_iter"],
        positionwise=options["positionwise_sk"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names of student, teacher and both heads to ours.

    What they release is the averaged student by itself, ``backbone.`` and ``head.``: our teacher, and our head.
    """
    return {_ours(name): value for name, value in state_dict.items()}


def _ours(name: str) -> str:
    if name.startswith(("backbone.", "head.")):
        name = ("teacher." if name[0] == "b" else "student.") + name
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs. Indices are flat over the batch.

    The authors differentiate the rotary frequencies, which they then train at a rate of 0; only here do we.
    """
    for module in model.student.modules():
        if isinstance(module, Attention):
            module.freqs = nn.Parameter(module.freqs)
    images = arrays["images"]
    visible, predicted = (
        arrays[name].view(len(images), -1) % model.patches for name in ("visible_indices", "predict_indices")
    )
    outputs = model(images=images, visible=visible, predicted=predicted)
    for name in ("target", "pred_before_head", "pred"):
        outputs[name] = outputs[name].flatten(0, 1)
    with torch.no_grad():
        found = model.encoder()(images)
        return {
            **outputs,
            "assignments": model.assign(images)[0],
            "features": found.patches.permute(0, 2, 3, 1),
            "features_registers": model.teacher.encode(images)[0][:, : model.config.registers],
            "features_global": found.pooled,
        }
