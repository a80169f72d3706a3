"""The authors' code (naver/croco): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mimbench.errors import ConfigError
from mimbench.models.mae import DecoderShape
from mimbench.models.vit import ViTShape

from .method import Config, Model

PREFIXES = {
    "patch_embed.": "backbone.patch_embed.",
    "enc_blocks.": "backbone.blocks.",
    "enc_norm.": "backbone.norm.",
    "enc_pos_embed": "backbone.positions.table",
    "mask_token": "decoder.mask_token",
    "decoder_embed.": "decoder.embed.",
    "dec_pos_embed": "decoder.positions.table",
    "dec_blocks.": "decoder.blocks.",
    "dec_norm.": "decoder.norm.",
    "prediction_head.": "decoder.pred.",
}


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``CroCoNet``, with ``norm_pix_loss`` of their criterion."""
    if not options["norm_im2_in_dec"]:
        raise ConfigError("norm_im2_in_dec = false is not supported: the authors' commands leave it on")
    kind = options["pos_embed"]
    if kind != "cosine" and not kind.startswith("RoPE"):
        raise ConfigError(f"pos_embed = {kind} is neither cosine nor RoPE with its base, such as RoPE100")
    encoder = ("patch_size", "enc_embed_dim", "enc_depth", "enc_num_heads", "mlp_ratio")
    decoder = ("dec_embed_dim", "dec_depth", "dec_num_heads", "mlp_ratio")
    return Config(
        image_size=options["img_size"],
        backbone=ViTShape(*(options[name] for name in encoder)),
        decoder=DecoderShape(*(options[name] for name in decoder)),
        positions="sincos" if kind == "cosine" else "rope",
        rope_base=100.0 if kind == "cosine" else float(kind.removeprefix("RoPE")),
        mask_ratio=options["mask_ratio"],
        normalise_target=options["norm_pix_loss"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours. Only models with sine-cosine positions have tables of them (L, D)."""
    found = {}
    for name, value in state_dict.items():
        start = next((p for p in PREFIXES if name.startswith(p)), None)
        ours = name if start is None else name.replace(start, PREFIXES[start], 1)
        found[ours] = value[None] if name.endswith("pos_embed") else value
    return found


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    outputs = model(**{name: arrays[name] for name in ("images1", "images2", "noise")})
    patches = model.encoder()(arrays["images1"]).patches
    return {**outputs, "features": patches.flatten(2).transpose(1, 2)}
