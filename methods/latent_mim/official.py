"""The authors' code (yibingwei-1/LatentMIM): its checkpoints, its option names, its outputs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import official_shape
from mimbench.models.vit import patchify

from .method import Config, Model, take_patches
from .model import Decoder, Head

LOSSES = {"infonce_patches": "discrimination", "norm_l2": "regression"}


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``LMIM``. ``sim_trg`` is an argument of its forward."""
    if options["target_depth"] != options["depth"]:
        raise ConfigError("a target encoder of another depth than the online one is not supported")
    if not options["freeze_pe"]:
        raise ConfigError("freeze_pe = false is not supported: the authors' command keeps positions fixed")
    return Config(
        image_size=options["grid_size"] * options["patch_size"],
        backbone=official_shape(options),
        head=Head(options["proj_mlp_dim"], options["proj_mlp_depth"]),
        decoder=Decoder(options["decoder_embed_dim"], options["decoder_depth"], options["decoder_num_heads"]),
        patch_gap=options["patch_gap"],
        visible=options["num_vis"],
        target_sees="hidden" if options["mask_target"] else "all",
        cues=options["avg_vis_mask_token"],
        loss=LOSSES[options["loss"]],  # type: ignore[arg-type]
        temperature=options["tau"],
        similarity_weight=options["avg_sim_coeff"],
        similarity_goal=(options["sim_trg"],) * 2,
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours. Their patch projection is a matrix over (row, column, channel)."""
    p = config.backbone.patch_size
    found = {}
    for name, value in state_dict.items():
        part, _, rest = name.partition(".")
        if rest == "pos_embed.pos_embeds":
            rest, value = "pos_embed", value[None]
        if part == "decoder":
            rest = re.sub(r"\.cross_attn\.(q|kv)_proj\.", r".cross_attn.\1.", rest)
        else:
            if rest == "embed.proj.weight":
                value = value.unflatten(1, (p, p, 3)).permute(0, 3, 1, 2)
            rest = re.sub(r"^head\.linear(\d+)\.", r"head.linears.\1.", rest)
            rest = re.sub(r"^head\.norm(\d+)\.", r"head.norms.\1.", rest)
            rest = re.sub(r"^norm\.", "head.norm.", rest)
            rest = re.sub(r"^embed\.", "patch_embed.", rest)
            rest = rest if rest.startswith("head.") else f"vit.{rest}"
        part = {"encoder": "online", "target_encoder": "target"}.get(part, part)
        found[f"{part}.{rest}"] = value
    return found


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    config = model.config
    offsets = torch.stack([arrays["offset_row"], arrays["offset_col"]], dim=1)
    images = take_patches(arrays["images"], offsets, config.backbone.patch_size, config.patch_gap)
    outputs = model(images=images, noise=arrays["noise"], goal=torch.tensor(config.similarity_goal[0]))
    vit = model.online.vit
    return {
        **outputs,
        "patches": patchify(images, config.backbone.patch_size),
        "features": model.encoder()(arrays["images_eval"]).pooled,
        "features_tokens": vit(vit.embed(arrays["images_eval"])),
    }
