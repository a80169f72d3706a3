"""What is special to CropMAE: the pair of views, the order of the decoder, gradient through both branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mimbench import config, data, registry, seeds
from mimbench.data import Batch
from mimbench.errors import ConfigError

MODULE = registry.load_method("cropmae")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("cropmae").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def coordinates(count: int = 64, size: int = 64) -> Batch:
    """Images whose red and green channels are their own column and row, so that a crop tells its box."""
    ramp = torch.arange(size, dtype=torch.uint8) * 3
    image = torch.stack(
        [ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size).byte()]
    )
    return Batch(image.expand(count, -1, -1, -1).clone(), None, torch.arange(count))


def boxes(model: Any, view: torch.Tensor) -> torch.Tensor:
    """Least and greatest column and row (B, 4) seen in a view."""
    mean = torch.tensor(model.input.mean).view(1, 3, 1, 1)
    std = torch.tensor(model.input.std).view(1, 3, 1, 1)
    place = ((view * std + mean) * 255 / 3)[:, :2]
    return torch.cat([place.amin((2, 3)), place.amax((2, 3))], dim=1)


def flipped(view: torch.Tensor) -> torch.Tensor:
    return view[:, 0, :, 0].mean(1) > view[:, 0, :, -1].mean(1)


def test_the_local_crop_lies_inside_the_global_one() -> None:
    model = build()
    views = model.views(coordinates(), seeds.generator("cpu", 0))
    whole, part = boxes(model, views["images1"]), boxes(model, views["images2"])
    assert (part[:, :2] >= whole[:, :2] - 0.6).all()
    assert (part[:, 2:] <= whole[:, 2:] + 0.6).all()
    area = lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])  # noqa: E731
    share = area(part) / area(whole)
    assert share.min() > 0.2
    assert share.max() < 0.7


def test_the_other_pairs_of_the_paper() -> None:
    batch = coordinates()
    model = build(pairs="local_to_global")
    views = model.views(batch, seeds.generator("cpu", 0))
    straight = build().views(batch, seeds.generator("cpu", 0))
    assert torch.equal(views["images1"], straight["images2"])
    assert torch.equal(views["images2"], straight["images1"])
    same = build(pairs="same").views(batch, seeds.generator("cpu", 0))
    assert torch.equal(same["images1"], same["images2"])
    apart = build(pairs="random").views(batch, seeds.generator("cpu", 0))
    inside = boxes(model, apart["images2"])[:, :2] >= boxes(model, apart["images1"])[:, :2] - 0.6
    assert not inside.all()


def test_the_two_flips_are_independent() -> None:
    model = build(flip=True)
    views = model.views(coordinates(400), seeds.generator("cpu", 0))
    first, second = flipped(views["images1"]), flipped(views["images2"])
    for share in (first.float().mean(), second.float().mean(), (first == second).float().mean()):
        assert 0.4 < share < 0.6


def test_two_frames_make_it_siammae() -> None:
    """The same crop and the same flip of both frames, and nine visible patches of 196."""
    model = build(pairs="frames", flip=True)
    assert model.needs == ("frames",)
    batch = coordinates()
    batch.frames = batch.images
    views = model.views(batch, seeds.generator("cpu", 0))
    assert torch.equal(views["images1"], views["images2"])
    paper = config.build(MODULE.Config, {"pairs": "frames", "mask_ratio": 0.95})
    assert int((paper.image_size // 16) ** 2 * (1 - paper.mask_ratio)) == 9
    scenes = data.load("digit-scenes").train
    drawn = scenes.batch(torch.arange(8), needs=("frames",), gap=(1, 2))
    loss = model.train()(**model.views(drawn, seeds.generator("cpu", 0)))["loss"]
    assert torch.isfinite(loss)


def test_two_patches_stay_visible_in_every_preset() -> None:
    assert int(196 * (1 - MODULE.Config().mask_ratio)) == 2
    assert build().keep == 2
    with pytest.raises(ConfigError, match="leaves 0 of 64"):
        build(mask_ratio=0.985)


def test_the_view_seen_in_full_gets_gradient() -> None:
    model = build()
    first = torch.randn(2, 3, 32, 32, requires_grad=True)
    model(images1=first, images2=torch.randn(2, 3, 32, 32), noise=torch.rand(2, 64))["loss"].backward()
    assert first.grad.abs().sum() > 0


def test_the_decoder_block_crosses_then_mixes_channels_then_tokens() -> None:
    torch.manual_seed(0)
    block = MODULE.DecoderBlock(MODULE.CrossDecoder(width=8, heads=2, hidden=16)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    query, memory = torch.randn(2, 5, 8), torch.randn(2, 7, 8)

    def attend(layer: nn.MultiheadAttention, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (F.linear(s, w, b) for s, w, b in zip(
            (x, y, y), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True
        ))  # fmt: skip
        heads = []
        for part in range(2):
            s = slice(4 * part, 4 * part + 4)
            heads.append((q[..., s] @ k[..., s].transpose(1, 2) / 2).softmax(-1) @ v[..., s])
        return layer.out_proj(torch.cat(heads, -1))

    x = block.norm2(query + attend(block.multihead_attn, query, memory))
    x = block.norm3(x + block.linear2(F.gelu(block.linear1(x))))
    expected = block.norm1(x + attend(block.self_attn, x, x))
    torch.testing.assert_close(block(query, memory), expected, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = build()
    given = {
        "images1": torch.randn(2, 3, 32, 32),
        "images2": torch.randn(2, 3, 32, 32),
        "noise": torch.rand(2, 64),
    }
    assert torch.equal(model(**given)["loss"], model(**given)["loss"])
    model.train()
    assert not torch.equal(model(**given)["loss"], model(**given)["loss"])
