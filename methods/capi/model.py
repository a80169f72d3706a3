"""The networks of CAPI: a ViT with registers and rotary positions, a predictor on top, and what protocols read."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from mimbench.encoder import Features, InputSpec
from mimbench.errors import ConfigError
from mimbench.models.mae import take
from mimbench.models.vit import PatchEmbed, ViTShape, attention, gelu


def frequencies(width: int) -> Tensor:
    """Angular frequencies (2, width) of rows and columns for a head, from 7 to 0.0007 turns over the image.

    The first half of the channels follows the row, the second the column.
    """
    if width % 4:
        raise ConfigError(f"rotary positions need a head width divisible by 4, not {width}")
    turns = 7 * 1e4 ** torch.linspace(0, -1, width // 4)
    none = torch.zeros(width // 2)
    return 2 * math.pi * torch.stack([torch.cat([turns, turns, none]), torch.cat([none, turns, turns])])


def rotate(x: Tensor, places: Tensor, freqs: Tensor) -> Tensor:
    """Heads (B, H, n, d) turned by the angles of their ``places`` (B, n, 2): row and column in [0, 1].

    Channel i is paired with i + d/2 and each turns by its own angle, so that a pair turns by a row's angle on one
    side and by a column's on the other (authors' code): no rotation, and not a function of distances alone.
    """
    angle = (places[..., :1] * freqs[0] + places[..., 1:] * freqs[1])[
        :, None
    ]  # products keep this in float32
    first, second = angle.chunk(2, dim=-1)
    sine = torch.cat([-first, second], dim=-1).sin().to(x.dtype)
    return torch.addcmul(x * angle.cos().to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sine)


class Attention(nn.Module):
    """Multi-head attention without biases, of tokens to each other or to a context."""

    freqs: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"width {width} is not a multiple of the {heads} heads")
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.register_buffer(
            "freqs", frequencies(width // heads)
        )  # parameters with a rate of 0 in the authors' code

    def forward(self, x: Tensor, places: Tensor, context: Tensor, context_places: Tensor) -> Tensor:
        """Tokens (B, n, D) at (B, n, 2), context (B, m, D) at (B, m, 2); places may have 1 for B."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        x = attention(rotate(q, places, self.freqs), rotate(k, context_places, self.freqs), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block without biases: attention, to a context that is not normed again or to itself, and an MLP."""

    def __init__(self, shape: ViTShape, drop_path: float) -> None:
        super().__init__()
        hidden = int(shape.width * shape.mlp_ratio)
        self.norm1 = nn.RMSNorm(shape.width, eps=1e-5)
        self.attn = Attention(shape.width, shape.heads)
        self.norm2 = nn.RMSNorm(shape.width, eps=1e-5)
        self.fc1 = nn.Linear(shape.width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, shape.width, bias=False)
        self.drop_path = drop_path

    def residual(self, branch: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
        """x + branch(x, others); in training a share ``drop_path`` of the images, drawn anew, goes without.

        The branch is not computed for these and scaled up for the rest.
        """
        if not self.training or self.drop_path == 0:
            return x + branch(x, *others)
        count = len(x)
        kept = torch.randperm(count, device=x.device)[: max(int(count * (1 - self.drop_path)), 1)]
        change = branch(*(t[kept] if len(t) == count else t for t in (x, *others)))
        return x.index_add(0, kept, change.to(x.dtype), alpha=count / len(kept))

    def attend(self, x: Tensor, places: Tensor, *context: Tensor) -> Tensor:
        x = self.norm1(x)
        return self.attn(x, places, *(context or (x, places)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.norm2(x))))

    def forward(self, x: Tensor, places: Tensor, *context: Tensor) -> Tensor:
        """Tokens (B, n, D) at ``places``, and either nothing or a context with its places."""
        return self.residual(self.mlp, self.residual(self.attend, x, places, *context))


class Backbone(nn.Module):
    """The encoder, and the predictor that asks its output what is at other places."""

    def __init__(self, shape: ViTShape, registers: int, predictor: int, drop_path: float) -> None:
        super().__init__()
        if registers < 4 or registers % 4:
            raise ConfigError(
                f"registers = {registers} cannot be spread evenly over four sides", "Choose a multiple of 4"
            )
        if min(shape.patch_size, shape.width, shape.depth, predictor) < 1:
            raise ConfigError(
                f"a ViT of {shape} with a predictor of {predictor} blocks has nothing to compute"
            )
        self.shape = shape
        self.patch_embed = PatchEmbed(shape.patch_size, 3, shape.width)
        self.registers = nn.Parameter(0.02 * torch.randn(1, registers, shape.width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, shape.width))
        self.encoder = nn.ModuleList([Block(shape, drop_path) for _ in range(shape.depth)])
        self.predictor = nn.ModuleList([Block(shape, drop_path) for _ in range(predictor)])
        self.norm = nn.RMSNorm(shape.width, eps=1e-5, elementwise_affine=False)  # ends both
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))

    def grid(self, images: Tensor) -> Tensor:
        """Row and column (1, L, 2) of each patch, from 0 to 1 over the image."""
        rows, columns = (side // self.shape.patch_size for side in images.shape[2:])
        row = torch.linspace(0, 1, rows, device=images.device)
        return torch.cartesian_prod(row, torch.linspace(0, 1, columns, device=images.device))[None]

    def border(self, places: Tensor) -> Tensor:
        """Places (B, R, 2) of the registers, evenly around the bounding box of the patches at (B, n, 2)."""
        along = torch.arange(self.registers.shape[1] // 4, device=places.device) / (
            self.registers.shape[1] // 4
        )
        zero, one = torch.zeros_like(along), torch.ones_like(along)
        row = torch.cat([along, one, 1 - along, zero])
        column = torch.cat([zero, along, one, 1 - along])
        low, high = places.amin(1, keepdim=True), places.amax(1, keepdim=True)
        return low + torch.stack([row, column], dim=1) * (high - low)

    def embed(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, R + n, D) of [registers, patches at ``visible`` (B, n), or all] and their places."""
        tokens, places = self.patch_embed(images), self.grid(images)
        if visible is not None:
            tokens, places = take(tokens, visible), places[0][visible]
        tokens = torch.cat([self.registers.expand(len(images), -1, -1), tokens], dim=1)
        return tokens, torch.cat([self.border(places), places], dim=1)

    def encode(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normed outputs (B, R + n, D) on the tokens of ``embed``, and their places."""
        x, places = self.embed(images, visible)
        for block in self.encoder:
            x = block(x, places)
        return self.norm(x), places

    def predict(self, at: Tensor, latent: Tensor, places: Tensor, blocks: int | None = None) -> Tensor:
        """Normed predictions (B, m, D) for the places ``at`` (B, m, 2), each independent of the others.

        From what ``encode`` gave, by the first ``blocks`` of the predictor, or all.
        """
        x = self.mask_token.expand(len(latent), at.shape[1], -1)
        for block in self.predictor[:blocks]:
            x = block(x, at, latent, places)
        return self.norm(x)


class BackboneEncoder(nn.Module):
    """The backbone as protocols see it (``mimbench.encoder.Encoder``), with as much of the predictor as it reads."""

    readouts = {
        "predictor": "mean over all places of the first predictor block's output after the final norm",
        "mean": "mean of patch tokens after the final norm",
    }

    def __init__(self, backbone: Backbone, input: InputSpec, pool: Literal["predictor", "mean"]) -> None:
        super().__init__()
        self.backbone = backbone
        self.input = input
        self.pool = pool
        self.readout = self.readouts[pool]
        self.name = backbone.shape.name
        self.dim = backbone.shape.width
        self.depth = backbone.shape.depth
        self.stride = backbone.shape.patch_size

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        """See ``Encoder.__call__``. A layer's map is the output of that block, before the final norm."""
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        backbone = self.backbone

        def as_map(tokens: Tensor) -> Tensor:
            return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)

        x, places = backbone.embed(images)
        kept = {}
        for number, block in enumerate(backbone.encoder):
            x = block(x, places)
            if number in layers:
                kept[number] = as_map(x)
        x = backbone.norm(x)
        patches = as_map(x)
        if self.pool == "predictor":
            pooled = backbone.predict(backbone.grid(images), x, places, blocks=1).mean(1)
        else:
            pooled = patches.mean((2, 3))
        return Features(pooled, patches, tuple(kept[n] for n in layers))

    def for_finetuning(self, drop_path: float = 0.0) -> BackboneEncoder:
        """A copy with the same readout, which the authors never fine-tune, without what does not enter it.

        ``drop_path`` rises linearly from 0 at the first block to its value at the last.
        """
        tuned = BackboneEncoder(copy.deepcopy(self.backbone), self.input, self.pool)
        tuned.backbone.predictor = tuned.backbone.predictor[: int(self.pool == "predictor")]
        if self.pool == "mean":
            del tuned.backbone.mask_token
        for number, block in enumerate(tuned.backbone.encoder):
            assert isinstance(block, Block)
            block.drop_path = drop_path * number / max(self.depth - 1, 1)
        return tuned.requires_grad_(True)

    def layer_of(self, parameter: str) -> int:
        name = parameter.removeprefix("backbone.")
        if name.startswith(("registers", "patch_embed")):
            return 0
        if name.startswith("encoder."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1
