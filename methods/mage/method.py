"""MAGE: MAsked Generative Encoder to Unify Representation Learning and Image Synthesis (Li et al., CVPR 2023,
arXiv 2211.09117).

An image becomes a grid of codes. A share of them that varies from step to step is masked, half of all, drawn from
the masked ones, are left out of the encoder altogether, and a decoder names the code of every masked place. Low
shares teach a representation, high ones generation: from nothing but masks, codes are drawn a few at a time.

Worth an ablation: ``--set mask_std=0 --set mask_mean=0.75`` fixes the share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench import augment
from mimbench.config import check
from mimbench.data import Batch
from mimbench.encoder import InputSpec
from mimbench.errors import ConfigError
from mimbench.features import frozen
from mimbench.fit import Recipe
from mimbench.models.mae import DecoderShape, initialise, take
from mimbench.models.vit import ViTShape
from mimbench.models.vq import Tokenised, Tokenizer, TokenizerConfig, fit_on_codes

from .model import Backbone, Decoder, TokenEncoder

RECIPE = Recipe(
    epochs=1600,
    batch_size=4096,  # 64 on each of 64 GPUs
    base_lr=1.5e-4,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    warmup_epochs=40,
    clip_norm=3.0,
    precision="bf16",
)

TOKENIZER = TokenizerConfig(code_width=256, width=256, depth=4)


@dataclass(frozen=True)
class Config:
    """The authors' published command for ViT-B/16 on ImageNet-1k. The tokenizer's training is ours."""

    image_size: int = 256  # side of the training crop, in pixels
    backbone: ViTShape = ViTShape()  # the encoder; its patch is the tokenizer's stride
    decoder: DecoderShape = DecoderShape(width=768)  # discarded where features are read
    tokenizer: TokenizerConfig = TOKENIZER  # stands in for the authors' VQGAN, with its codes
    tokenizer_weights: str = ""  # safetensors file of a trained tokenizer; empty: one is trained first
    mask_mean: float = 0.55  # of the normal that the masked share is drawn from (authors' command)
    mask_std: float = 0.25  # its deviation (authors' command); 0: the share is mask_mean
    mask_min: float = 0.5  # where it is cut off below; this share never enters the encoder (authors' command)
    mask_max: float = 1.0  # where it is cut off above (authors' command)
    ratio_images: int = 64  # images that have a drawn share in common: those of one GPU (authors' command)
    label_smoothing: float = 0.1  # share of the target spread over all codes (authors' code)
    dropout: float = 0.1  # on embeddings, attention, MLPs and residual branches (authors' code)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop, share of the image (authors' code)
    flip: bool = True  # random horizontal flip (authors' code)
    recipe: Recipe = RECIPE  # authors' command

    def __post_init__(self) -> None:
        check(
            self,
            "config",
            positive=("mask_mean", "mask_max", "ratio_images"),
            not_negative=("mask_std",),
            share=("mask_mean", "mask_min", "mask_max", "label_smoothing", "dropout"),
        )
        if not self.mask_min <= self.mask_max:
            raise ConfigError(f"mask_min = {self.mask_min} is above mask_max = {self.mask_max}")


class Model(Tokenised):
    """Tokenizer, encoder on the places that are not dropped, decoder on all, cross-entropy on the masked ones."""

    needs = ()

    tokenizer: Tokenizer

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.input = InputSpec(config.image_size, (0.0,) * 3, (1.0,) * 3)  # the tokenizer reads plain pixels
        tokenizer = Tokenizer(config.tokenizer, config.image_size, config.backbone.patch_size, config.flip)
        self.grid, codes = tokenizer.grid, config.tokenizer.codes
        self.length = self.grid[0] * self.grid[1]
        self.dropped = math.ceil(self.length * config.mask_min)
        if self.dropped == self.length:
            raise ConfigError(
                f"mask_min = {config.mask_min} drops all {self.length} tokens",
                "The encoder needs some to see",
            )
        self.backbone = Backbone(config.backbone, self.grid, codes, config.dropout)
        self.decoder = Decoder(config.decoder, self.backbone, codes, config.dropout)
        initialise(self)
        self.take_tokenizer(tokenizer, config.tokenizer_weights)

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One crop per image in [0, 1], the noise that ranks its tokens, and the share of them to mask."""
        config, device = self.config, batch.images.device
        images = augment.crop_and_flip(
            batch, config.image_size, config.crop_scale, generator, flip_p=0.5 * config.flip
        )
        noise = torch.rand(len(batch), self.length, generator=generator, device=device)
        draws = torch.rand(
            math.ceil(len(batch) / config.ratio_images),
            generator=generator,
            device=device,
            dtype=torch.float64,
        )
        ratio = self.mask_ratio(draws).repeat_interleave(config.ratio_images)[: len(batch)]
        return {"images": augment.as_float(images), "noise": noise, "ratio": ratio}

    def mask_ratio(self, uniform: Tensor) -> Tensor:
        """Draws from [0, 1), in float64, as draws from the normal cut off at both ends."""
        config = self.config
        mean, std, ends = config.mask_mean, config.mask_std, (config.mask_min, config.mask_max)
        if std == 0:
            return torch.full_like(uniform, mean).clamp(*ends)
        low, high = torch.special.ndtr((uniform.new_tensor(ends) - mean) / std)
        return (mean + std * torch.special.ndtri(low + (high - low) * uniform)).clamp(*ends)

    def forward(self, images: Tensor, noise: Tensor, ratio: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1], noise (B, L) and masked shares (B,)."""
        return self.complete(self.tokenizer.tokens(images), noise, ratio)

    def complete(self, tokens: Tensor, noise: Tensor, ratio: Tensor) -> dict[str, Tensor]:
        """Codes' numbers (B, L), noise (B, L) and masked shares (B,); each image's masked tokens share its loss."""
        config, backbone = self.config, self.backbone
        order = noise.argsort(dim=1)
        rank = order.argsort(dim=1)
        masked = rank < (self.length * ratio.double()).ceil()[:, None]
        kept = order[:, self.dropped :].sort(dim=1).values
        x = backbone.embed(backbone.words(tokens.masked_fill(masked, backbone.mask)), self.grid)
        latent = backbone(torch.cat([x[:, :1], take(x[:, 1:], kept)], dim=1))
        pred = self.scores(latent, kept, masked)
        scores, smoothing = pred[:, 1:].flatten(0, 1).float(), config.label_smoothing
        error = F.cross_entropy(scores, tokens.flatten(), reduction="none", label_smoothing=smoothing)
        loss = ((error.view_as(noise) * masked).sum(1) / masked.sum(1)).mean()
        mask, drop_mask = masked.to(noise.dtype), (rank < self.dropped).to(noise.dtype)
        return {"loss": loss, "pred": pred, "latent": latent, "mask": mask, "drop_mask": drop_mask}

    def scores(self, latent: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """The decoder's scores (B, 1 + L, codes); the words they are products with get no gradient from it."""
        return self.decoder(latent, kept, masked, self.backbone.words.weight[: self.backbone.mask].detach())

    def generate(self, count: int, steps: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Images (count, 3, S, S) in [0, 1] from nothing, on the generator's device."""
        if steps < 1:
            raise ConfigError(f"images cannot be generated in {steps} steps", "Use one or more")
        with frozen(self):  # type: ignore[arg-type]
            return self.tokenizer.images(self.draw(count, steps, temperature, generator))

    def draw(self, count: int, steps: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Codes' numbers (count, L), uncovered step by step from where all are masked (gen_img_uncond.py).

        Each step draws a code for every masked place and masks the least certain of them again: after step s of n,
        floor(L cos(pi s / 2n)) places, at least one and fewer than before. Certainty is the code's log-probability
        plus Gumbel noise times ``temperature``, which falls to 0.
        """
        backbone, device = self.backbone, generator.device
        tokens = torch.full((count, self.length), backbone.mask, device=device)
        everywhere = torch.arange(self.length, device=device).expand(count, -1)
        left = self.length
        for step in range(1, steps + 1):
            masked = tokens == backbone.mask
            latent = backbone(backbone.embed(backbone.words(tokens), self.grid))
            chances = self.scores(latent, everywhere, masked)[:, 1:].float().log_softmax(-1)
            drawn = torch.multinomial(chances.exp().flatten(0, 1), 1, generator=generator).view_as(tokens)
            tokens = torch.where(masked, drawn, tokens)
            if step == steps:
                break
            left = max(1, min(left - 1, math.floor(self.length * math.cos(math.pi / 2 * step / steps))))
            gumbel = -torch.empty(tokens.shape, device=device).exponential_(generator=generator).log()
            certainty = (
                chances.gather(2, tokens[..., None])[..., 0] + temperature * (1 - step / steps) * gumbel
            )
            unsure = certainty.masked_fill(~masked, math.inf).topk(left, largest=False).indices
            tokens = tokens.scatter(1, unsure, backbone.mask)
        return tokens

    def encoder(self) -> TokenEncoder:
        """Tokenizer and encoder on whole images."""
        return TokenEncoder(self.tokenizer, self.backbone, self.input, self.generate)


pretrain = fit_on_codes  # the tokenizer first
