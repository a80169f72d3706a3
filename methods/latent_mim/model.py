"""The networks of Latent MIM: an encoder with a projection, and a decoder that predicts latents from latents."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench.errors import ConfigError
from mimbench.models.mae import take
from mimbench.models.vit import MLP, Attention, CrossAttention, ViT, ViTShape, gelu


@dataclass(frozen=True)
class Head:
    """The projection on top of both encoders, discarded after pretraining."""

    hidden: int = 4096  # width between its layers (authors' config)
    depth: int = 3  # linear layers (authors' config)


@dataclass(frozen=True)
class Decoder:
    """Blocks of self-attention, cross-attention to the visible tokens, and an MLP."""

    width: int = 512  # channels of a token (authors' code)
    depth: int = 3  # blocks (authors' command)
    heads: int = 16  # attention heads (authors' code)


def positions(width: int, side: int) -> Tensor:
    """MAE's sine-cosine table (1, 1 + side^2, width), class token zero, over [0, side] instead of [0, side - 1]."""
    if width % 4:
        raise ConfigError(f"sine-cosine positions need a width divisible by 4, not {width}")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.linspace(0, side, side, dtype=torch.float64)[:, None] * frequencies
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    table = torch.cat([code.repeat(side, 1), code.repeat_interleave(side, dim=0)], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float()[None]


class Projection(nn.Module):
    """The ViT's final norm, then linear layers without bias, each with a norm behind it, GELU between."""

    def __init__(self, width: int, head: Head) -> None:
        super().__init__()
        if head.depth < 1:
            raise ConfigError(f"head.depth = {head.depth} leaves no layer to project with")
        sizes = [width] + [head.hidden] * (head.depth - 1) + [width]
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linears = nn.ModuleList([nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)])
        self.norms = nn.ModuleList([nn.LayerNorm(size) for size in sizes[1:]])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens)
        for number, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = norm(linear(gelu(x) if number else x))
        return x


class ProjectedViT(nn.Module):
    """An encoder with its projection. The final norm belongs to the latter: both are dropped after pretraining."""

    def __init__(self, image_size: int, shape: ViTShape, head: Head) -> None:
        super().__init__()
        self.vit = ViT(image_size, shape)
        self.vit.norm = nn.Identity()
        self.vit.pos_embed.copy_(positions(shape.width, self.vit.grid[0]))
        self.head = Projection(shape.width, head)

    def forward(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Latents (B, 1 + n, D) of the class token and the patches ``chosen`` (B, n), seeing nothing else."""
        return self.head(self.vit(take(self.vit.embed(images), chosen)))


class DecoderBlock(nn.Module):
    """Queries look at each other, then at the visible tokens; the norms come first."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = Attention(width, heads)
        self.norm2q = nn.LayerNorm(width, eps=1e-6)
        self.norm2kv = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        query = query + self.self_attn(self.norm1(query))
        query = query + self.cross_attn(self.norm2q(query), self.norm2kv(memory))
        return query + self.mlp(self.norm3(query))


class LatentDecoder(nn.Module):
    """From visible latents to a prediction for every hidden patch."""

    pos_embed: Tensor
    nearness: Tensor

    def __init__(self, shape: ViTShape, decoder: Decoder, side: int, cues: bool) -> None:
        super().__init__()
        self.cues = cues
        self.embed = nn.Linear(shape.width, decoder.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        table = positions(decoder.width, side)
        self.register_buffer("pos_embed", table)
        # What the cues weigh by is fixed: (L, L), the scaled products of the patches' positions.
        nearness = table[0, 1:] @ table[0, 1:].T / decoder.width**0.5
        self.register_buffer("nearness", nearness, persistent=False)
        self.blocks = nn.ModuleList(
            [DecoderBlock(decoder.width, decoder.heads, shape.mlp_ratio) for _ in range(decoder.depth)]
        )
        self.norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.head = nn.Linear(decoder.width, shape.width)

    def queries(self, memory: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """The decoder's class token and one query per hidden patch (B, 1 + M, W), with positions.

        A query is the mask token plus a cue: the visible tokens ``memory`` (B, V, W), before they get positions,
        averaged by how near they are.
        """
        token = self.mask_token.expand(*hidden.shape, -1)
        if self.cues:
            weights = self.nearness[hidden[:, :, None], visible[:, None, :]].softmax(-1)
            token = token + weights.to(memory.dtype) @ memory
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(token), -1, -1), token + self.pos_embed[0, 1:][hidden]], dim=1)

    def forward(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predicted latents (B, M, D) of ``hidden`` (B, M) from [class, ``visible``] latents (B, 1 + V, D)."""
        memory = self.embed(latent)
        query = self.queries(memory[:, 1:], visible, hidden)
        place = self.pos_embed[0, 1:][visible]
        memory = memory + torch.cat([self.pos_embed[:, :1].expand(len(place), -1, -1), place], dim=1)
        for block in self.blocks:
            query = block(query, memory)
        return self.head(self.norm(query))[:, 1:]
