"""What MAE (He et al., 2022) gave to the papers that build on it: masking by noise, normalised pixels, its decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mimbench.errors import ConfigError
from mimbench.models.vit import Block, PatchEmbed, ViT, ViTShape, sincos_positions


@dataclass(frozen=True)
class DecoderShape:
    """The size of MAE's decoder; the default is the paper's (Table 1)."""

    width: int = 512  # channels of a token
    depth: int = 8  # transformer blocks
    heads: int = 16  # attention heads per block
    mlp_ratio: float = 4.0  # hidden width of the MLP over width


def visible_patches(total: int, mask_ratio: float) -> int:
    """How many of ``total`` patches a ratio leaves visible. Raises ConfigError when it is none or all of them."""
    keep = int(total * (1 - mask_ratio))
    if not 0 < keep < total:
        raise ConfigError(
            f"mask_ratio = {mask_ratio} leaves {keep} of {total} patches visible",
            "Choose a ratio that keeps and hides at least one patch",
        )
    return keep


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens of (B, L, D) at ``index`` (B, N), in its order: (B, N, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def random_masking(tokens: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the ``keep`` tokens of (B, L, D) with the smallest ``noise`` (B, L), in that order (Sec. 3).

    Returns the kept tokens (B, keep, D), the mask (B, L) with 1 where a token was dropped, and the
    permutation (B, L) that brings [kept, dropped] back to raster order.
    """
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return take(tokens, shuffle[:, :keep]), (restore >= keep).to(tokens.dtype), restore


def restore_order(visible: Tensor, mask_token: Tensor, restore: Tensor) -> Tensor:
    """[class, visible] (B, 1 + keep, D) to (B, 1 + L, D) in raster order, a mask token in every empty place."""
    empty = mask_token.expand(len(visible), restore.shape[1] + 1 - visible.shape[1], -1)
    patches = take(torch.cat([visible[:, 1:], empty], dim=1), restore)
    return torch.cat([visible[:, :1], patches], dim=1)


def standardise(x: Tensor) -> Tensor:
    """Zero mean and unit unbiased variance along the last dimension: the normalised target of MAE (Sec. 3)."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt()


class Decoder(nn.Module):
    """Mask tokens in the empty places, transformer blocks on all, a linear layer to what each patch should be.

    A method with blocks of its own gives ``block``, which makes one; they may read a memory besides the tokens.
    """

    pos_embed: Tensor

    def __init__(
        self, shape: DecoderShape, encoder: ViT, outputs: int, block: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__()
        block = block or (lambda: Block(shape.width, shape.heads, shape.mlp_ratio))
        self.embed = nn.Linear(encoder.shape.width, shape.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        table = sincos_positions(shape.width, *encoder.grid)
        self.register_buffer("pos_embed", torch.cat([torch.zeros(1, shape.width), table])[None])
        self.blocks = nn.ModuleList([block() for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.pred = nn.Linear(shape.width, outputs)

    def tokens(self, latent: Tensor, restore: Tensor, *memory: Tensor) -> Tensor:
        """Normed tokens (B, 1 + L, W) from [class, visible patches] (B, 1 + keep, D) and the permutation (B, L)."""
        x = restore_order(self.embed(latent), self.mask_token, restore) + self.pos_embed
        for block in self.blocks:
            x = block(x, *memory)
        return self.norm(x)

    def forward(self, latent: Tensor, restore: Tensor, *memory: Tensor) -> Tensor:
        """Predictions for every patch (B, L, outputs), the class token's left out."""
        return self.pred(self.tokens(latent, restore, *memory))[:, 1:]


def initialise(model: nn.Module) -> None:
    """Xavier-uniform matrices with the patch projection read as one, zero biases, tokens from N(0, 0.02)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.view(len(module.proj.weight), -1))
    for token in ("cls_token", "mask_token"):
        for name, parameter in model.named_parameters():
            if name.endswith(token):
                nn.init.normal_(parameter, std=0.02)


def official_shape(options: dict[str, Any]) -> ViTShape:
    """The encoder's shape from the arguments of ``MaskedAutoencoderViT``, which code based on MAE's has kept."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return ViTShape(*(options[name] for name in names))


def official_decoder_shape(options: dict[str, Any]) -> DecoderShape:
    """The decoder's shape from the same arguments."""
    names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "mlp_ratio")
    return DecoderShape(*(options[name] for name in names))


def from_official_name(name: str) -> str:
    """A parameter's name in MAE's code as ours, where ``backbone`` is the ViT and ``decoder`` the decoder above."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")):
        return f"backbone.{name}"
    return "decoder.mask_token" if name == "mask_token" else name.replace("decoder_", "decoder.", 1)
