"""Vector quantisation and the tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mimbench import data
from mimbench.errors import ConfigError
from mimbench.fit import Recipe
from mimbench.models.vq import Quantiser, Tokenizer, TokenizerConfig, fit_tokenizer, perplexity
from mimbench.progress import quiet


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_vector_gets_the_code_of_the_least_angle() -> None:
    quantiser = Quantiser(20, 6).eval()
    z = vectors(7, 5, 6)
    expected = F.cosine_similarity(z[..., None, :], quantiser.codebook, dim=-1).argmax(-1)
    assert torch.equal(quantiser.nearest(z), expected)
    codes, numbers, loss = quantiser(z)
    assert torch.equal(numbers, expected)
    torch.testing.assert_close(codes, quantiser.codebook[expected])
    torch.testing.assert_close(loss, (F.normalize(z, dim=-1) - codes).square().mean())


def test_the_gradient_passes_straight_through() -> None:
    z = vectors(8, 6).requires_grad_()
    codes, _, _ = Quantiser(4, 6).eval()(z)
    weight = vectors(8, 6, seed=1)
    (through,) = torch.autograd.grad((codes * weight).sum(), z)
    (expected,) = torch.autograd.grad((F.normalize(z, dim=-1) * weight).sum(), z)
    torch.testing.assert_close(through, expected)


def test_codes_follow_their_vectors_and_unused_ones_stay() -> None:
    quantiser = Quantiser(6, 3, decay=0.9)
    before = quantiser.codebook.clone()
    z = vectors(4, 3)
    numbers = quantiser.nearest(z)
    quantiser(z)
    for number in range(6):
        mine = F.normalize(z, dim=1)[numbers == number]
        expected = before[number]
        if len(mine):
            mean = F.normalize(mine.sum(0), dim=0)
            expected = F.normalize(0.9 * before[number] + 0.1 * mean, dim=0)
        torch.testing.assert_close(quantiser.codebook[number], expected)
    assert len(numbers.unique()) < 6
    torch.testing.assert_close(quantiser.codebook.norm(dim=1), torch.ones(6))
    fixed = quantiser.codebook.clone()
    quantiser.eval()(z)
    assert torch.equal(quantiser.codebook, fixed)


def test_dead_codes_come_back_where_vectors_are() -> None:
    torch.manual_seed(0)
    z = F.normalize(torch.tensor([3.0, 0.0, 0.0]) + 0.5 * vectors(400, 3), dim=1)
    plain, reviving = Quantiser(16, 3, decay=0.8), Quantiser(16, 3, decay=0.8, revive=0.5)
    reviving.load_state_dict(plain.state_dict())
    for _ in range(60):
        plain(z)
        reviving(z)
    assert perplexity(reviving.nearest(z), 16) > 1.5 * perplexity(plain.nearest(z), 16)
    assert len(reviving.nearest(z).unique()) == 16


def test_k_means_finds_clusters() -> None:
    centres = F.normalize(vectors(5, 8), dim=1)
    z = centres.repeat(40, 1) + 0.02 * vectors(200, 8, seed=1)
    best = 0.0
    for seed in range(5):
        quantiser = Quantiser(5, 8)
        quantiser.start_from(z, torch.Generator().manual_seed(seed))
        best = max(best, float((quantiser.codebook @ centres.T).amax(0).min()))
    assert best > 0.999
    with pytest.raises(ConfigError, match="3 vectors are too few to start 5 codes"):
        quantiser.start_from(z[:3], torch.Generator())


def test_perplexity_counts_codes_in_even_use() -> None:
    assert perplexity(torch.arange(8).repeat(3), 20) == pytest.approx(8)
    assert perplexity(torch.zeros(5, dtype=torch.int64), 20) == pytest.approx(1)
    share = [0.5, 0.25, 0.25]
    assert perplexity(torch.tensor([0, 0, 1, 2]), 9) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in share))
    )


def test_a_tokenizer_learns_to_rebuild_images_and_is_frozen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    split = data.load("digits", quiet()).train
    recipe = Recipe(epochs=3, batch_size=64, base_lr=3e-3, lr_batch=64, compile=False)
    config = TokenizerConfig(codes=32, code_width=8, width=16, depth=1, recipe=recipe)
    tokenizer = Tokenizer(config, 16, 4, flip=False)
    options = {"seed": 0, "device": torch.device("cpu"), "progress": quiet(), "name": "tokenizer"}
    history = fit_tokenizer(tokenizer, split, folder=tmp_path, **options)
    images = tokenizer.views(split.batch(torch.arange(200)), torch.Generator())["images"]
    tokens = tokenizer.tokens(images)
    assert tokens.shape == (200, 16)
    assert perplexity(tokens, 32) > 8
    rebuilt = tokenizer.images(tokens)
    assert F.mse_loss(rebuilt, images) < 0.4 * images.var()
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    # what an earlier run trained is loaded
    again = Tokenizer(config, 16, 4, flip=False)
    assert fit_tokenizer(again, split, folder=tmp_path, **options) == history
    assert torch.equal(again.tokens(images), tokens)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="image size 30 is not a multiple"):
        Tokenizer(TokenizerConfig(), 30, 4, flip=False)
    with pytest.raises(ConfigError, match="1 codes"):
        Quantiser(1, 8)
