"""The authors' code (LTH14/mage): its checkpoints, its option names, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimbench.models.mae import official_decoder_shape, official_shape
from mimbench.models.vq import TokenizerConfig

from .method import Config, Model

OURS = ("tokenizer.",)  # theirs is a VQGAN
UNUSED = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "token_emb.position_ids"}
UNUSED_PARTS = ("decoder_pred.", "patch_embed.", "vqgan.")
NAMES = {
    "token_emb.word_embeddings.weight": "backbone.words.weight",
    "token_emb.position_embeddings.weight": "backbone.positions",
    "token_emb.LayerNorm.": "backbone.embed_norm.",
    "blocks.": "backbone.blocks.",
    "norm.": "backbone.norm.",
    "decoder_pos_embed_learned": "decoder.positions",
    "decoder_": "decoder.",
    "mlm_layer.ln.": "decoder.fc_norm.",
    "mlm_layer.": "decoder.",
}


def config_from_official(options: dict[str, Any]) -> Config:
    """Our Config for the arguments of the authors' ``MaskedGenerativeEncoderViT`` and what is fixed in its code."""
    return Config(
        image_size=options["img_size"],
        backbone=official_shape(options),
        decoder=official_decoder_shape(options),
        tokenizer=TokenizerConfig(codes=options["codebook_size"]),
        mask_mean=options["mask_ratio_mu"],
        mask_std=options["mask_ratio_std"],
        mask_min=options["mask_ratio_min"],
        mask_max=options["mask_ratio_max"],
        label_smoothing=options["label_smoothing"],
        dropout=options["dropout"],
    )


def from_official(state_dict: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The authors' names to ours. Of their words for 1000 classes only the one that stands in for any is used."""
    codes = config.tokenizer.codes
    length = 1 + (config.image_size // config.backbone.patch_size) ** 2
    found = {}
    for name, value in state_dict.items():
        if name in UNUSED or name.startswith(UNUSED_PARTS):
            continue
        start = next(start for start in NAMES if name.startswith(start))
        if name == "token_emb.word_embeddings.weight":
            value = torch.cat([value[:codes], value[-1:], value[codes + 76 : codes + 77]])
        elif name == "token_emb.position_embeddings.weight":
            value = value[None, :length]
        elif name == "mlm_layer.bias":
            value = value[0, 0, :codes]
        found[NAMES[start] + name.removeprefix(start)] = value
    return found


def replay(model: Model, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our outputs for a golden case, under the names of the authors' outputs."""
    tokens = arrays["token_indices"]
    outputs = model.complete(tokens, arrays["noise"], arrays["mask_rate"].expand(len(tokens)))
    with torch.no_grad():
        encoder = model.encoder().eval()
        encoder.tokenizer.tokens = lambda images: tokens  # type: ignore[method-assign]
        found = encoder(arrays["images"])
        backbone = model.backbone
        everything = backbone(backbone.embed(backbone.words(tokens), model.grid))
    return {
        **outputs,
        "features": found.pooled,
        "features_cls": everything[:, 0],
        "features_tokens": everything,
    }
