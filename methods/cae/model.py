"""The networks of CAE: an encoder of visible patches, a regressor of their hidden neighbours' latents, a decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimbench.errors import ConfigError
from mimbench.models.beit import Block
from mimbench.models.vit import (
    MLP,
    ViT,
    ViTShape,
    attention,
    drop_path,
    sincos_positions,
    spread_drop_path,
)


def positions(width: int, grid: tuple[int, int]) -> Tensor:
    """The sine-cosine table (L, width) of MAE with its halves exchanged: the row comes first (authors' code)."""
    return sincos_positions(width, *grid).roll(width // 2, dims=1)


def blocks(make: type[nn.Module], shape: ViTShape, layer_scale: float, drop_path: float) -> nn.ModuleList:
    """``shape.depth`` blocks; their stochastic depth rises linearly from 0 to ``drop_path``."""
    made = nn.ModuleList([make(shape, layer_scale) for _ in range(shape.depth)])
    spread_drop_path(made, drop_path)
    return made


class Encoder(ViT):
    """A ViT with layer scale, and no bias on keys."""

    def __init__(self, image_size: int, shape: ViTShape, layer_scale: float, drop_path: float) -> None:
        super().__init__(image_size, shape)
        self.blocks = blocks(Block, shape, layer_scale, drop_path)
        self.pos_embed[0, 1:] = positions(shape.width, self.grid)


class CrossAttention(nn.Module):
    """Attention whose keys and values are made from different versions of the same tokens; keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"the decoder's width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """From (B, M, W) to (B, N, W), both."""
        projected = (self.q(query), self.k(key), self.v(value))
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class RegressorBlock(nn.Module):
    """Hidden patches read visible and hidden ones. The norm before the MLP replaces what the MLP adds to."""

    def __init__(self, shape: ViTShape, layer_scale: float, drop_path: float = 0.0) -> None:
        super().__init__()
        width = shape.width
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))
        self.attn = CrossAttention(width, shape.heads)
        self.mlp = MLP(width, int(width * shape.mlp_ratio))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))
        self.drop_path = drop_path

    def forward(self, x: Tensor, context: Tensor, place: Tensor, context_place: Tensor) -> Tensor:
        """Hidden tokens (B, M, W) and what they read (B, N, W), each with positions: for queries and keys only."""
        read = self.attn(self.norm_q(x + place), self.norm_k(context + context_place), self.norm_v(context))
        x = self.norm2(x + drop_path(self.gamma_1 * read, self.drop_path, self.training))
        return x + drop_path(self.gamma_2 * self.mlp(x), self.drop_path, self.training)


class Regressor(nn.Module):
    """From the latents of visible patches to those of hidden ones. Only the latter change from block to block."""

    def __init__(self, shape: ViTShape, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.blocks = blocks(RegressorBlock, shape, layer_scale, drop_path)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

    def forward(self, visible: Tensor, place: Tensor, visible_place: Tensor) -> Tensor:
        """Predicted latents (B, M, W) at ``place`` (B, M, W) from ``visible`` ones (B, V, W), without class token."""
        x = self.mask_token.expand_as(place)
        context_place = torch.cat([visible_place, place], dim=1)
        for block in self.blocks:
            x = block(x, torch.cat([visible, x], dim=1), place, context_place)
        return self.norm(x)


class Decoder(nn.Module):
    """From predicted latents to codes. It sees no visible patch: what it needs must be in the prediction."""

    def __init__(self, shape: ViTShape, layer_scale: float, drop_path: float, codes: int) -> None:
        super().__init__()
        self.blocks = blocks(Block, shape, layer_scale, drop_path)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, codes)

    def forward(self, predicted: Tensor, place: Tensor) -> Tensor:
        """Logits (B, M, codes) of predicted latents (B, M, W) at ``place`` (B, M, W)."""
        x = predicted + place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
