"""Vector quantisation with a codebook on the unit sphere, and an image tokenizer that is trained with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import augment, seeds
from mimbench.checkpoint import load_strictly, load_weights
from mimbench.data import Batch, Split
from mimbench.errors import CheckpointError, ConfigError
from mimbench.fit import History, Recipe, fit
from mimbench.progress import Progress


class Quantiser(nn.Module):
    """Replaces vectors by the nearest of ``codes`` unit vectors, which follow them by moving averages.

    Both are compared by cosine. In training each code moves to ``decay`` code + (1 - decay) mean of the unit
    vectors assigned to it and is brought back to length 1; a code without any stays (BEiT v2, Sec. 3.1 and
    norm_ema_quantizer.py). With ``revive`` a code that is used less than this share of an even use, by a
    moving average too, is moved to a vector of the batch.
    """

    codebook: Tensor
    use: Tensor

    def __init__(self, codes: int, width: int, decay: float = 0.99, revive: float = 0.0) -> None:
        super().__init__()
        if codes < 2 or width < 1:
            raise ConfigError(f"a codebook of {codes} codes of width {width} distinguishes nothing")
        self.decay = decay
        self.revive = revive
        self.register_buffer("codebook", F.normalize(torch.randn(codes, width), dim=1))
        self.register_buffer("use", torch.full((codes,), 1 / codes))  # share of vectors, averaged

    def nearest(self, z: Tensor) -> Tensor:
        """Numbers of the nearest codes (...) of vectors (..., D)."""
        with torch.autocast(z.device.type, enabled=False):
            return (F.normalize(z.float(), dim=-1) @ self.codebook.T).argmax(-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (..., D) as codes (..., D), straight-through, with their numbers (...) and the commitment loss.

        The loss is the mean squared distance of the unit vectors to their codes, with gradient to the former.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)
            numbers = self.nearest(z)
            found = F.embedding(numbers, self.codebook)
            loss = F.mse_loss(z, found)
            if self.training:
                self._follow(z.detach().flatten(0, -2), numbers.flatten())
            return z + (found - z).detach(), numbers, loss

    @torch.no_grad()
    def _follow(self, z: Tensor, numbers: Tensor) -> None:
        count = torch.zeros_like(self.use).index_add_(0, numbers, torch.ones_like(z[:, 0]))
        total = torch.zeros_like(self.codebook).index_add_(0, numbers, z)
        mean = torch.where(count[:, None] > 0, F.normalize(total, dim=1), self.codebook)
        moved = F.normalize(torch.lerp(mean, self.codebook, self.decay), dim=1)
        self.use.lerp_(count / len(z), 1 - self.decay)
        if self.revive:
            dead = self.use < self.revive / len(self.use)
            chosen = z[torch.randint(len(z), self.use.shape, device=z.device)]
            moved = torch.where(dead[:, None], chosen, moved)
            self.use.copy_(torch.where(dead, 1 / len(self.use), self.use))
        self.codebook.copy_(moved)

    @torch.no_grad()
    def start_from(self, z: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Sets the codes by k-means on the directions of vectors (N, D): spherical, from random ones of them."""
        z = F.normalize(z.float(), dim=1)
        if len(z) < len(self.codebook):
            raise ConfigError(
                f"{len(z)} vectors are too few to start {len(self.codebook)} codes from",
                "Set fewer codes or a larger batch",
            )
        chosen = torch.randperm(len(z), generator=generator, device=z.device)[: len(self.codebook)]
        self.codebook.copy_(z[chosen])
        for _ in range(rounds):
            numbers = self.nearest(z)
            total = torch.zeros_like(self.codebook).index_add_(0, numbers, z)
            empty = total.norm(dim=1, keepdim=True) == 0
            self.codebook.copy_(torch.where(empty, self.codebook, F.normalize(total, dim=1)))


def perplexity(numbers: Tensor, codes: int) -> Tensor:
    """exp(entropy) of how often codes were used: from 1 to ``codes``, the number of codes in even use."""
    share = torch.zeros(codes, device=numbers.device).index_add_(
        0, numbers.flatten(), torch.full((numbers.numel(),), 1 / numbers.numel(), device=numbers.device)
    )
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())


@dataclass(frozen=True)
class TokenizerConfig:
    """An image tokenizer and how it is trained."""

    codes: int = 1024  # entries of the codebook
    code_width: int = 32  # channels of a code
    width: int = 64  # channels of the convolutions
    depth: int = 2  # residual blocks before and after the codes
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image
    recipe: Recipe = Recipe(
        epochs=2, batch_size=128, base_lr=1e-3, lr_batch=128, betas=(0.9, 0.95), weight_decay=0.0
    )


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, each after a norm over groups and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = math.gcd(width, 8)
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Tokenizer(nn.Module):
    """A convolutional VQ-VAE (van den Oord et al., 2017): an image as a grid of codes, one a patch, and back.

    Its loss is the mean squared error of pixels in [0, 1], scaled by their variance of about 1/16, plus the
    commitment loss; there is neither a perceptual nor an adversarial term. Images enter with pixels in [0, 1].
    """

    needs = ()

    def __init__(self, config: TokenizerConfig, image_size: int, patch_size: int, flip: bool) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(
                f"image size {image_size} is not a multiple of the tokenizer's patch size {patch_size}"
            )
        self.config, self.image_size, self.flip = config, image_size, flip
        self.grid = (image_size // patch_size,) * 2
        width = config.width
        self.encode = nn.Sequential(
            nn.Conv2d(3, width, patch_size, stride=patch_size),
            *(Residual(width) for _ in range(config.depth)),
            nn.Conv2d(width, config.code_width, 1),
            nn.BatchNorm2d(config.code_width, affine=False),  # else all directions are alike at first
        )
        self.quantise = Quantiser(config.codes, config.code_width, revive=0.3)
        self.decode = nn.Sequential(
            nn.Conv2d(config.code_width, width, 1),
            *(Residual(width) for _ in range(config.depth)),
            nn.ConvTranspose2d(width, 3, patch_size, stride=patch_size),
        )

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image."""
        scale, flip = self.config.crop_scale, 0.5 * self.flip
        images = augment.crop_and_flip(batch, self.image_size, scale, generator, flip_p=flip)
        return {"images": augment.as_float(images)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1]; logs how many codes are in even use (``perplexity``)."""
        z = self.encode(images).permute(0, 2, 3, 1)
        codes, numbers, commitment = self.quantise(z)
        pred = self.decode(codes.permute(0, 3, 1, 2))
        error = F.mse_loss(pred.float(), images)
        used = perplexity(numbers, self.config.codes)
        return {"loss": 16 * error + commitment, "error": error, "perplexity": used, "pred": pred}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The codes' numbers (B, L), raster order, of images (B, 3, H, W) in [0, 1], always in float32."""
        with torch.autocast(images.device.type, enabled=False):
            return self.quantise.nearest(self.encode(images.float()).permute(0, 2, 3, 1)).flatten(1)

    @torch.no_grad()
    def images(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from codes' numbers (B, L)."""
        codes = F.embedding(tokens, self.quantise.codebook).unflatten(1, self.grid)
        return self.decode(codes.permute(0, 3, 1, 2)).clamp(0, 1)


class Tokenised(nn.Module):
    """What reads images through a frozen tokenizer, which stays in eval mode whatever else trains."""

    tokenizer: nn.Module

    def take_tokenizer(self, tokenizer: nn.Module, weights: str = "") -> None:
        """Freezes a tokenizer. ``weights`` names what an earlier run left as ``tokenizer/model.safetensors``.

        Raises CheckpointError for weights that are not of this tokenizer.
        """
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        if not weights:
            return
        file = Path(weights).expanduser()
        try:
            load_strictly(tokenizer, load_weights(file), file)
        except CheckpointError as fault:
            raise CheckpointError(
                f"tokenizer_weights: {fault.problem}",
                "Name the weights of a tokenizer of this method, with the settings that it was trained with",
            ) from None

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for the tokenizer: its statistics and codes would move."""
        super().train(mode)
        self.tokenizer.eval()
        return self


def fit_on_codes(
    model: Any,
    split: Split,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    name: str = "pretraining",
    **how: Any,
) -> History:
    """Trains a model's tokenizer, unless its weights were given, and then the model; called as ``mimbench.fit.fit``.

    The tokenizer stays in the folder ``tokenizer``, and what it cost counts.
    """
    if model.config.tokenizer_weights:
        return fit(model, split, recipe, folder=folder, name=name, **how)
    place = folder / "tokenizer" if folder else None
    model.tokenizer.requires_grad_(True)
    first = fit_tokenizer(model.tokenizer, split, folder=place, name=f"{name}: tokenizer", **how)
    return fit(model, split, recipe, folder=folder, name=name, **how).include(first, "the tokenizer")


def fit_tokenizer(
    tokenizer: Tokenizer,
    split: Split,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    folder: Path | None,
    name: str,
) -> History:
    """Trains a tokenizer, with codes that start as cluster centres, and freezes it."""
    tokenizer.to(device)
    count = min(len(split), max(256, -(-4 * tokenizer.config.codes // math.prod(tokenizer.grid))))
    generator = seeds.generator(device, seed, "codebook")
    with torch.no_grad():
        chosen = torch.randperm(len(split), generator=seeds.generator("cpu", seed, "codebook"))[:count]
        batch = split.batch(chosen, device)
        z = tokenizer.encode(tokenizer.views(batch, generator)["images"])
    tokenizer.quantise.start_from(z.permute(0, 2, 3, 1).flatten(0, 2), generator)
    recipe = tokenizer.config.recipe
    history = fit(
        tokenizer, split, recipe, seed=seed, device=device, progress=progress, folder=folder, name=name
    )
    tokenizer.requires_grad_(False)
    if history.curve:
        used = history.curve[-1]["perplexity"]
        history.warnings.append(
            f"the tokenizer uses {used:.0f} of {tokenizer.config.codes} codes (perplexity)"
        )
    return history
