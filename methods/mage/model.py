"""The networks of MAGE: an encoder and a decoder of codes, and the encoder behind its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench.encoder import Features, InputSpec
from mimbench.models.mae import DecoderShape
from mimbench.models.vit import (
    Block,
    ViTShape,
    attention,
    drop_path,
    dropout,
    gelu,
    resize_positions,
    spread_drop_path,
)
from mimbench.models.vq import Tokenised, Tokenizer

SURROGATE_TEMPERATURE = 0.1  # of the soft choice of codes whose gradient stands for that of the hard one


class TokenBlock(Block):
    """The plain block with dropout on attention weights, the MLP's hidden units and both branches."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, rate: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate if self.training else 0.0
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        found = self.attn.proj(attention(q, k, v, drop=rate).transpose(1, 2).flatten(2))
        x = x + drop_path(dropout(found, rate), self.drop_path, self.training)
        found = self.mlp.fc2(dropout(gelu(self.mlp.fc1(self.norm2(x))), rate))
        return x + drop_path(dropout(found, rate), self.drop_path, self.training)


class Backbone(nn.Module):
    """A ViT over codes: embeddings of codes, mask and class with learned positions, blocks, a final norm."""

    def __init__(self, shape: ViTShape, grid: tuple[int, int], codes: int, rate: float) -> None:
        super().__init__()
        self.shape, self.grid, self.rate = shape, grid, rate
        self.mask, self.cls = codes, codes + 1  # their rows among the words
        self.words = nn.Embedding(codes + 2, shape.width)
        self.positions = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], shape.width))
        self.embed_norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.blocks = nn.ModuleList(
            [TokenBlock(shape.width, shape.heads, shape.mlp_ratio, rate) for _ in range(shape.depth)]
        )
        self.norm: nn.Module = nn.LayerNorm(shape.width, eps=1e-6)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def embed(self, words: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embedded words (B, L, D) of a grid to inputs (B, 1 + L, D) of the blocks, class first."""
        cls = self.words.weight[self.cls].expand(len(words), 1, -1)
        places = resize_positions(self.positions[:, 1:], self.grid, grid)
        x = torch.cat([cls, words], dim=1) + torch.cat([self.positions[:, :1], places], dim=1)
        return dropout(self.embed_norm(x), self.rate, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, 1 + n, D) of the class and any places to normed outputs."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """The encoder's class output in every masked place, blocks, and a score for each code."""

    def __init__(self, shape: DecoderShape, backbone: Backbone, codes: int, rate: float) -> None:
        super().__init__()
        width = shape.width
        self.embed = nn.Linear(backbone.shape.width, width)
        self.positions = nn.Parameter(torch.empty(1, backbone.positions.shape[1], width))
        self.blocks = nn.ModuleList(
            [TokenBlock(width, shape.heads, shape.mlp_ratio, rate) for _ in range(shape.depth)]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc = nn.Linear(width, backbone.shape.width)
        self.fc_norm = nn.LayerNorm(backbone.shape.width)
        self.bias = nn.Parameter(torch.zeros(codes))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, latent: Tensor, kept: Tensor, masked: Tensor, words: Tensor) -> Tensor:
        """Scores (B, 1 + L, codes), the class's first.

        ``latent`` (B, 1 + n, D) are the outputs for class and places ``kept`` (B, n), of which some are ``masked``
        (B, L) and count as absent. Scores are products with the codes' ``words`` (codes, D).
        """
        cls, seen = self.embed(latent).split([1, kept.shape[1]], dim=1)
        place = kept[..., None].expand(-1, -1, cls.shape[2])
        tokens = cls.expand(-1, masked.shape[1], -1).scatter(1, place, seen)
        x = torch.cat([cls, torch.where(masked[..., None], cls, tokens)], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.fc_norm(gelu(self.fc(self.norm(x))))
        return F.linear(x, words, self.bias)


class TokenEncoder(Tokenised):
    """MAGE as protocols see it (``mimbench.encoder.Encoder``), with ``generate`` (see ``Model``) beside it."""

    tokenizer: Tokenizer

    def __init__(
        self,
        tokenizer: Tokenizer,
        backbone: Backbone,
        input: InputSpec,
        generate: Callable[[int, int, float, torch.Generator], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.backbone, self.input, self.generate = tokenizer, backbone, input, generate
        shape = backbone.shape
        self.name, self.dim, self.depth, self.stride = shape.name, shape.width, shape.depth, shape.patch_size
        self.readout = "mean of the last block's tokens, then a norm without weights"
        self.fc_norm = nn.LayerNorm(self.dim, eps=1e-6, elementwise_affine=False)

    def words(self, images: Tensor) -> Tensor:
        """Embedded codes (B, L, D). To attackers, who need a gradient, the choice of a code looks like a soft one."""
        words = self.backbone.words(self.tokenizer.tokens(images))
        if not images.requires_grad:
            return words
        z = F.normalize(self.tokenizer.encode(images).flatten(2).transpose(1, 2), dim=-1)
        weights = (z @ self.tokenizer.quantise.codebook.T / SURROGATE_TEMPERATURE).softmax(-1)
        soft = weights @ self.backbone.words.weight[: self.backbone.mask]
        return soft + (words - soft).detach()

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        """See ``Encoder.__call__``. A layer's map is the output of that block, before the final norm."""
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)

        def as_map(tokens: Tensor) -> Tensor:
            return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)

        x = self.backbone.embed(self.words(images), grid)
        kept = {}
        for number, block in enumerate(self.backbone.blocks):
            x = block(x)
            if number in layers:
                kept[number] = as_map(x)
        pooled = self.fc_norm(x[:, 1:].mean(1))
        return Features(pooled, as_map(self.backbone.norm(x)), tuple(kept[n] for n in layers))

    def for_finetuning(self, drop_path: float = 0.0) -> TokenEncoder:
        """A copy whose norm after the mean has weights, with dropout on embeddings only, as in the authors' code.

        The tokenizer stays as it is: its parameters become buffers, which nothing trains.
        """
        tuned = TokenEncoder(copy.deepcopy(self.tokenizer), copy.deepcopy(self.backbone), self.input)
        tuned.fc_norm = nn.LayerNorm(self.dim, eps=1e-6)
        tuned.readout = "mean of the last block's tokens, then a fresh norm"
        tuned.backbone.norm = nn.Identity()
        spread_drop_path(tuned.backbone.blocks, drop_path)
        for block in tuned.backbone.blocks:
            block.rate = 0.0  # type: ignore[assignment]
        for part in tuned.tokenizer.modules():
            for name, value in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.register_buffer(name, value.detach())
        return tuned.requires_grad_(True)

    def layer_of(self, parameter: str) -> int:
        name = parameter.removeprefix("backbone.")
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1 if name.startswith(("norm", "fc_norm")) else 0
